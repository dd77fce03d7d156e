"""Checkpoints: the only file that knows orbax (its v1 API)."""

from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp


def latest_step(directory: Path) -> int | None:
    """The last step saved in a folder, or None."""
    if not Path(directory).is_dir():
        return None
    with _checkpointer(directory) as checkpointer:
        latest = checkpointer.latest
        return None if latest is None else latest.step


def save(directory: Path, step: int, state: dict) -> None:
    """Save a state under its step, atomically; a step saved before is left alone."""
    with _checkpointer(directory) as checkpointer:
        if checkpointer.latest is None or checkpointer.latest.step < step:
            checkpointer.save(step, state)


def restore(directory: Path, like: dict, step: int | None = None) -> dict:
    """The state of a step (None: the latest), with the structure of `like`.

    Raises:
      ValueError: what is saved has other shapes or names than `like`.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    with _checkpointer(directory) as checkpointer:
        try:
            state = checkpointer.load(step, abstract)
        except Exception as error:
            # orbax hides the true reason behind "incompatible handler".
            reason = error.__cause__ or error
            raise ValueError(
                f"the checkpoint in {directory} does not fit this model: {reason}"
            ) from error
    return state


def _checkpointer(directory: Path):
    keep = ocp.training.preservation_policies.LatestN(1)
    return ocp.training.Checkpointer(
        Path(directory).absolute(), preservation_policy=keep
    )
