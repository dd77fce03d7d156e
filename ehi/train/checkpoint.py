"""Checkpoints. Only this file knows orbax (its v1 API).

If there are several processes, all call these functions, in the same order. They use
the folder that process 0 names; the others may have other workdirs.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from ehi.parallel.processes import is_loss, said_by_first


class Writer:
    """Saves states while training goes on; leaving the block waits for the last save.

    A state is copied off the devices before `save` returns, so the next step may donate
    it. It appears under its step when it is complete, so a crash leaves the checkpoint
    before it. A save waits for the one before it.
    """

    def __init__(self, directory: Path):
        self._directory = _of_first(directory)
        _is_there(self._directory)
        self._checkpointer = _checkpointer(self._directory)

    def __enter__(self) -> "Writer":
        return self

    def save(self, step: int, state: dict) -> None:
        """Save a state under its step, unless that or a later step is saved."""
        latest = self._checkpointer.latest
        if latest is None or latest.step < step:
            with self._explained(), _directories_first():
                # Without force, orbax skips a save while another is under way.
                self._checkpointer.save_async(step, _savable(state), force=True)

    def __exit__(self, kind, error, traceback) -> None:
        # A save that waits for a lost process would never end.
        if error is None or not is_loss(error):
            with self._explained():
                self._checkpointer.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise what went wrong in the background, mostly a full disk, as OSError."""
        try:
            yield
        except (ValueError, OSError) as error:
            if is_loss(error):
                raise
            reason = str(error).strip().split("\n", 1)[0]
            raise OSError(
                f"a checkpoint could not be written to {self._directory}, the one "
                f"before it is kept: {reason}"
            ) from error


def latest_step(directory: Path) -> int | None:
    """The last step saved in a folder, or None.

    Raises:
      NotADirectoryError: the path is a file, or a link to nothing.
      ValueError: the path has a backslash, or is not UTF-8.
    """
    directory = _of_first(directory)
    if not _is_there(directory):
        return None
    with _checkpointer(directory) as checkpointer:
        latest = checkpointer.latest
    step = said_by_first("" if latest is None else str(latest.step))
    return int(step) if step else None


def save(directory: Path, step: int, state: dict) -> None:
    """Save a state under its step, atomically; see `Writer`."""
    with Writer(directory) as writer:
        writer.save(step, state)


def restore(directory: Path, like: dict, step: int | None = None) -> dict:
    """The state of a step (None: the latest), with the structure of `like`.

    Its arrays are placed as those of `like`, whatever devices they were saved from.

    Raises:
      FileNotFoundError: no such step is saved there.
      ValueError: the saved state has other shapes or names than `like`, or is damaged.
    """
    directory = _of_first(directory)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    with _checkpointer(directory) as checkpointer:
        try:
            return checkpointer.load(step, abstract)
        except Exception as error:
            # orbax hides the reason behind "incompatible handler".
            reason = error.__cause__ or error
            if type(reason).__name__ == "StepNotFoundError":
                raise FileNotFoundError(
                    f"no checkpoint in {directory}: {reason}"
                ) from None
            misfits = _misfits(checkpointer, step, abstract)
            if misfits:
                raise ValueError(
                    f"the checkpoint in {directory} does not fit this model: "
                    + "; ".join(misfits)
                ) from error
            line = str(reason).strip().split("\n", 1)[0][:300]
            raise ValueError(
                f"the checkpoint in {directory} is damaged (remove it, and this phase "
                f"starts again): {line}"
            ) from error


def _misfits(checkpointer, step: int | None, wanted: dict, most: int = 3) -> list[str]:
    """Differences in names and shapes between the saved and the wanted state."""
    try:
        there = _shapes(checkpointer.metadata(step).metadata)
    except Exception:  # the metadata is damaged
        return []
    if not there:  # the shapes are read from the arrays, which are damaged
        return []
    here = _shapes(wanted)
    found = [
        f"{name} is {there.get(name, 'missing')} there, {here.get(name, 'missing')} "
        "here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    more = [f"and {len(found) - most} others"] if len(found) > most else []
    return found[:most] + more


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """'params/head/w1' -> shape, of arrays or of their descriptions."""
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: hasattr(x, "shape")
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def _checkpointer(directory: Path):
    keep = ocp.training.preservation_policies.LatestN(1)
    return ocp.training.Checkpointer(directory, preservation_policy=keep)


def _is_there(directory: Path) -> bool:
    """Whether the folder exists; what cannot be a folder is refused."""
    try:
        str(directory).encode()
    except UnicodeEncodeError as error:  # tensorstore takes paths in UTF-8
        raise ValueError(
            f"the checkpoint folder {str(directory)!r} is not UTF-8 to this process; "
            "rename it, or set PYTHONUTF8=1"
        ) from error
    if "\\" in str(directory):  # it would write to, and read from, another folder
        raise ValueError(
            f"the checkpoint folder {str(directory)!r} has a backslash, which "
            "tensorstore takes as a slash; rename it"
        )
    kind = "folder" if directory.is_dir() else "other" * os.path.lexists(directory)
    kind = said_by_first(kind)
    if kind == "other":
        raise NotADirectoryError(
            f"{directory} is a file or a link to nothing; allowed: a folder, or a path "
            "where nothing is"
        )
    return kind == "folder"


def _directories_first() -> ocp.Context:
    """Create the folders of a save before its threads start.

    Created in the background, a folder that fails leaves threads behind that wait for
    it, and the process does not end for 20 minutes.
    """
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    return context


def _of_first(directory: Path) -> Path:
    return Path(said_by_first(str(Path(directory).absolute())))


def _savable(state: dict) -> dict:
    """The state with arrays that one process holds alone as NumPy; process 0 writes."""
    if jax.process_count() == 1:
        return state

    def host(x):
        own = isinstance(x, jax.Array) and x.is_fully_addressable
        return np.asarray(x) if own else x

    return jax.tree.map(host, state)
