"""A workdir belongs to one experiment: its config.json says which."""

import hashlib
import json
import logging
from pathlib import Path

import jax

from ehi.eval.records import atomic_write
from ehi.parallel.processes import is_first

LOG = logging.getLogger("ehi")

# Changing these adds rows to a workdir; changing anything else is another experiment.
FREE_FIELDS = ("systems", "budgets")
INPUTS = "inputs.json"
_CHOSEN = (("tree", "branching"), ("leaves", "num_codewords"))  # to fit the corpus
_OF_SEARCH = ("adaptive", "spill", "start")  # fields that no parameter depends on


def own_folder(workdir: Path) -> Path:
    """Where a process keeps what it makes for itself: the workdir for process 0.

    Fits and embeddings of a trained tower are made by every process, so that none waits
    for another, and two never write one file. Checkpoints are written by all together
    to where process 0 has them. So the workdir must be a folder that all can see.
    """
    return workdir if is_first() else workdir / "processes" / str(jax.process_index())


def claim(config, workdir: Path) -> None:
    """Refuse a workdir that holds another experiment, before anything is touched."""
    path = workdir / "config.json"
    ours = json.loads(config.to_json())
    if path.exists():
        theirs = _read_config(path)
        for section, name in _CHOSEN:  # if 0: to be chosen, as it was then
            ours[section][name] = ours[section][name] or theirs[section][name]
        names = sorted(set(ours) | set(theirs))
        differ = [
            name
            for name in names
            if name not in FREE_FIELDS and ours.get(name) != theirs.get(name)
        ]
        if differ:
            raise ValueError(
                f"{workdir} holds another experiment: its config.json differs in "
                f"{', '.join(differ)}; choose another --workdir (nothing was changed)"
            )
        LOG.info("%s: reusing what is complete, resuming what is not", workdir)


def write_config(config, workdir: Path) -> None:
    """Write config.json, with what was chosen to fit the corpus."""
    if not is_first():
        return
    text = json.dumps(json.loads(config.to_json()), indent=2) + "\n"
    atomic_write(workdir / "config.json", text.encode())


def claim_inputs(inputs, workdir: Path, finished: Path | None = None) -> None:
    """Refuse a workdir whose rows were made of other data, weights or parameters.

    Args:
      inputs: from `load_inputs`.
      workdir: of this experiment; inputs.json in it says what it was made of.
      finished: workdir of the run whose parameters are taken, or None.

    Raises:
      ValueError: another data set or tower than before, or than `finished` has.
    """
    ours = {
        "data": inputs.dataset.source | {"corpus": inputs.dataset.corpus_sha256},
        "tower": inputs.pretrained.sha256,
        "checkpoint": None if finished is None else _identity(finished),
    }
    path = workdir / INPUTS
    theirs = _read_json(path) if path.exists() else ours
    other = [name for name in ours if theirs.get(name) != ours[name]]
    if other:
        raise ValueError(
            f"{workdir} was made of another {', '.join(other)}: the files behind the "
            "same config have changed; choose another --workdir (nothing was changed)"
        )
    if finished is not None:
        check_tower(inputs.pretrained, finished)
    if is_first() and not path.exists():
        atomic_write(path, (json.dumps(ours, indent=2) + "\n").encode())


def check_tower(pretrained, finished: Path) -> None:
    """Refuse a tower that a finished run was not trained with."""
    path = finished / INPUTS
    if path.exists() and _read_json(path).get("tower") != pretrained.sha256:
        raise ValueError(
            f"the tower {pretrained.name} is not the one that {finished} was trained "
            "with: give its --config.tower.name"
        )


def with_tree_of(config, finished: Path):
    """The config with the number of leaves that a finished run was trained with.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it was trained with another head, tree or kind of leaves.
    """
    path = finished / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"--checkpoint={finished} holds no finished run")
    theirs = _read_config(path)
    config = config.copy_and_resolve_references()
    for section, name in _CHOSEN:
        config[section][name] = theirs[section][name]
    ours = json.loads(config.to_json())
    for section in ("head", "tree", "leaves"):
        for name, value in ours[section].items():
            if name not in _OF_SEARCH and theirs[section].get(name, value) != value:
                raise ValueError(
                    f"{section}.{name} is {value!r}, --checkpoint={finished} was "
                    f"trained with {theirs[section][name]!r}"
                )
    return config


def _identity(finished: Path) -> str:
    """sha256 of what a run was and of how it went."""
    digest = hashlib.sha256()
    for name in ("config.json", "metrics.jsonl"):
        path = finished / name
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def _read_config(path: Path) -> dict:
    """What `write_config` wrote."""
    found = _read_json(path)
    if not all(isinstance(found.get(name), dict) for name in ("tree", "leaves")):
        raise ValueError(f"{path} is damaged: it is no config of an experiment")
    return found


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return found
