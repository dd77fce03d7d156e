"""A workdir belongs to one experiment: its config.json says which."""

import json
import logging
from pathlib import Path

import jax

from ehi.eval.records import atomic_write
from ehi.train.processes import is_first

LOG = logging.getLogger("ehi")

# Changing these adds rows to a workdir; changing anything else is another experiment.
FREE_FIELDS = ("systems", "budgets")


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
        theirs = json.loads(path.read_text())
        if not ours["tree"]["branching"]:  # to be chosen, as it was then
            ours["tree"]["branching"] = theirs["tree"]["branching"]
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


def with_tree_of(config, finished: Path):
    """The config with the number of leaves that a finished run was trained with."""
    path = finished / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"--checkpoint={finished} holds no finished run")
    config = config.copy_and_resolve_references()
    config.tree.branching = json.loads(path.read_text())["tree"]["branching"]
    return config
