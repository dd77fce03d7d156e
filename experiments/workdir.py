"""A workdir belongs to one experiment: its config.json says which."""

import json
import logging
from pathlib import Path

from ehi.eval.records import atomic_write

LOG = logging.getLogger("ehi")

# Changing these adds rows to a workdir; changing anything else is another experiment.
FREE_FIELDS = ("systems", "budgets")


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
