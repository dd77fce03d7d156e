"""A workdir belongs to one experiment, which its config.json and inputs.json name."""

import hashlib
import json
import logging
from pathlib import Path

import jax

from ehi.eval.provenance import config_hash
from ehi.files import atomic_write
from ehi.parallel.processes import is_first
from experiments.command import user_path
from experiments.configs.base import INDEX

LOG = logging.getLogger("ehi")

# A change of these fields adds records to a workdir, or moves tables to another memory.
# A change of any other field makes another experiment.
FREE_FIELDS = ("systems", "budgets", "device_table_gib")
INPUTS = "inputs.json"
_CHOSEN = (("tree", "branching"), ("leaves", "num_codewords"))  # set by `fit_to_corpus`
# Fields that the parameters of a finished run need not have been trained with.
_OF_SEARCH = ("adaptive", "spill", "start", "score")
# Fields that a run which trains on may change; all others set the shapes.
_NOT_OF_SHAPES = ("adaptive", "start", "score")
# Field -> fields that mean nothing while it is not set. They are left out then, so that
# a config is described as it was before it had them.
_UNSET = {
    "start_from": ("start_from", "start_from_steps"),
    "fit_sample": ("fit_sample",),
    "half_on_disk": ("half_on_disk",),
}
# Fields of the tower that its files decide where they are None; left out then, too.
OF_TOWER_FILES = ("query_prefix", "document_prefix", "pooling", "normalise")
CONTINUED = "continued"  # the variant of a run that trains on


def own_folder(workdir: Path) -> Path:
    """Return the folder for a process's own files; for process 0 it is the workdir.

    Every process makes the fits and the embeddings of a trained tower itself, so that
    none waits for another and no two write one file. All processes write checkpoints
    together, to the folder of process 0. So the workdir must be a folder that all see.
    """
    return workdir if is_first() else workdir / "processes" / str(jax.process_index())


def claim(config, workdir: Path) -> None:
    """Refuse a workdir that holds another experiment, before any file is changed.

    Raises:
      ValueError: the workdir is a file or of another experiment.
    """
    for folder in (workdir, *workdir.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--workdir={workdir}: {folder} is a file, not a folder")
    path = workdir / "config.json"
    ours = described(config)
    if path.exists():
        theirs = _without_unset(_read_config(path))
        for section, name in _CHOSEN:  # 0 means: choose, which gives the same again
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


def described(config) -> dict:
    """Return the config as JSON values, as config.json has them."""
    return _without_unset(json.loads(config.to_json()))


def _without_unset(values: dict) -> dict:
    unset = {
        name for field in _UNSET if not values.get(field) for name in _UNSET[field]
    }
    if "tower" in values:
        tower = values["tower"]
        free = {name for name in OF_TOWER_FILES if tower.get(name) is None}
        kept = {name: value for name, value in tower.items() if name not in free}
        values = values | {"tower": kept}
    if values.get("index") == json.loads(json.dumps(INDEX)):
        unset.add("index")
    return {name: value for name, value in values.items() if name not in unset}


def write_config(config, workdir: Path) -> None:
    """Write config.json, including the fields chosen to fit the corpus."""
    if not is_first():
        return
    text = json.dumps(described(config), indent=2) + "\n"
    atomic_write(workdir / "config.json", text.encode())


def claim_inputs(
    inputs, workdir: Path, finished: Path | None = None, start_from: str = ""
) -> None:
    """Refuse a workdir that was made of other data, weights or parameters.

    Args:
      inputs: from `load_inputs`.
      workdir: the workdir; its inputs.json names the inputs that it was made of.
      finished: workdir of the run whose parameters are used, or None.
      start_from: workdir of the run whose parameters are trained on, or ''.

    Raises:
      ValueError: the data set or tower differs from before, or from that of `finished`.
    """
    ours = {
        "data": inputs.dataset.source | {"corpus": inputs.dataset.corpus_sha256},
        "tower": inputs.tower_sha256,
        "checkpoint": None if finished is None else _identity(finished),
    }
    if inputs.tower_settings:
        ours["tower_settings"] = inputs.tower_settings
    if start_from:
        ours["start_from"] = identity_of_start(Path(start_from))
        finished = Path(start_from)
    path = workdir / INPUTS
    theirs = _read_json(path) if path.exists() else ours
    names = dict.fromkeys((*ours, "tower_settings"))
    other = [name for name in names if theirs.get(name) != ours.get(name)]
    if other:
        raise ValueError(
            f"{workdir} was made of another {', '.join(other)}: its files have "
            "changed, not its config; choose another --workdir (nothing was changed)"
        )
    if finished is not None:
        check_tower(inputs, finished)
    if is_first() and not path.exists():
        atomic_write(path, (json.dumps(ours, indent=2) + "\n").encode())


def check_tower(inputs, finished: Path) -> None:
    """Refuse a tower other than the one that a finished run was trained with.

    Of other prefixes, another pooling or normalisation it warns.
    """
    path = finished / INPUTS
    if not path.exists():
        return
    theirs = _read_json(path)
    if theirs.get("tower") != inputs.tower_sha256:
        raise ValueError(
            f"{inputs.tower_name} is not the one that {finished} was trained with: "
            "give that one as --config.tower.name"
        )
    ours, theirs = inputs.tower_settings, theirs.get("tower_settings", {})
    if ours != theirs:
        LOG.warning(
            "the settings of %s are %s, but %s was trained with %s: set "
            "--config.tower.query_prefix, document_prefix, pooling and normalise as it "
            "had them", inputs.tower_name, ours, finished, theirs,
        )  # fmt: skip


def with_tree_of(config, finished: Path):
    """Return the config with the number of leaves and codewords of a finished run.

    Raises:
      FileNotFoundError: `finished` holds no run.
      ValueError: the run was trained with another head, tree or kind of leaves.
    """
    named = f"--checkpoint={finished}"
    theirs = _config_of_run(finished, named)
    config = config.copy_and_resolve_references()
    for section, name in _CHOSEN:
        config[section][name] = theirs[section][name]
    _check_same_shapes(config, theirs, named, free=_OF_SEARCH)
    return config


def trained_on(config):
    """Return the config of a run that trains on, with what the finished run decides.

    It has the number of leaves and codewords of the run `config.start_from`, unless the
    config names them, and a variant of its own, so that no table takes its records for
    those of a run from the start.

    Raises:
      FileNotFoundError: `config.start_from` holds no run.
      ValueError: that run was trained with other shapes.
    """
    finished = user_path(config.start_from)
    named = f"--config.start_from={finished}"
    theirs = _config_of_run(finished, named)
    config = config.copy_and_resolve_references()
    config.start_from = str(finished)
    for section, name in _CHOSEN:
        config[section][name] = config[section][name] or theirs[section][name]
    _check_same_shapes(config, theirs, named, free=_NOT_OF_SHAPES)
    ours = config.tower.trainable
    other = theirs.get("tower", {}).get("trainable", ours)
    if "head" in (ours, other) and ours != other:
        raise ValueError(
            f"tower.trainable is {ours!r}, but {named} was trained with {other!r}: "
            "one of them has no tower of its own"
        )
    if not config.variant.endswith(CONTINUED):
        config.variant = "-".join(filter(None, (config.variant, CONTINUED)))
    return config


def _config_of_run(finished: Path, named: str) -> dict:
    path = finished / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{named} holds no finished run")
    return _read_config(path)


def _check_same_shapes(config, theirs: dict, named: str, free: tuple[str, ...]) -> None:
    ours = json.loads(config.to_json())
    for section in ("head", "tree", "leaves"):
        for name, value in ours[section].items():
            other = theirs.get(section, {}).get(name, value)
            if name not in free and other != value:
                raise ValueError(
                    f"{section}.{name} is {value!r}, but {named} was trained with "
                    f"{other!r}"
                )


def identity_of_start(finished: Path, without: tuple[str, ...] = FREE_FIELDS) -> str:
    """Return a hash of what a finished run was made of, wherever it lies.

    Args:
      finished: workdir of the run.
      without: fields of its config that do not count.
    """
    theirs = _read_config(finished / "config.json")
    if theirs.get("start_from"):
        before = Path(theirs["start_from"])
        theirs["start_from"] = identity_of_start(before, without)
    path = finished / INPUTS
    inputs = _read_json(path) if path.exists() else {}
    return config_hash(theirs | {"inputs": inputs}, without=without)


def _identity(finished: Path) -> str:
    """Return the sha256 of a run's config and log."""
    digest = hashlib.sha256()
    for name in ("config.json", "metrics.jsonl"):
        path = finished / name
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def _read_config(path: Path) -> dict:
    """Return what `write_config` wrote."""
    found = _read_json(path)
    if not all(isinstance(found.get(name), dict) for name in ("tree", "leaves")):
        raise ValueError(f"{path} is damaged: it is not the config of an experiment")
    return found


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    return found
