"""Refuse a config that cannot run, before data is loaded or a file is written."""

import math
import re

import ml_collections

from ehi.data.pseudo_queries import KINDS as PSEUDO_KINDS
from ehi.data.vectors.metric import METRICS
from ehi.eval.baselines.options import WITHOUT_CODEBOOKS
from ehi.index.search.codes import SCORES
from ehi.index.text.settings import POOLINGS, check_prefix
from ehi.model.pq import num_subspaces
from ehi.model.pretrained import check_length
from ehi.model.rotation import ROTATIONS
from ehi.model.tree import KINDS
from ehi.train.phase import Phase
from experiments.configs import base
from experiments.systems import (
    Budget,
    config_of,
    get_system,
    score_of,
)

# Smallest allowed value of each number.
LEAST = {
    "tree.height": 1,
    "tree.hidden": 0,
    "tree.spill": 1,
    "head.width": 0,
    "head.hidden": 0,
    "tower.query_length": 3,
    "tower.document_length": 3,
    "pseudo.per_document": 0,
    "pseudo.synthetic": 0,
    "sizes.documents": 0,
    "sizes.train_queries": 0,
}
LARGEST_SEED = 2**32 - 1  # jax keeps 32 bits of a seed


def check_config(config) -> None:
    """Check every field that can be checked without data.

    Raises:
      ValueError: names the field, its value and the allowed values.
    """
    _check_sections(config)
    for name in ("systems", "budgets"):
        _strings(name, config[name])
    _strings("pseudo.kinds", config.pseudo.kinds)
    _strings("index.metadata", config.index.metadata)
    _check_systems(config)
    if not config.dataset:
        raise ValueError(
            "dataset is empty; give --config.dataset='pydocs', 'beir/<name>' or the "
            "path of a folder: see experiments/README.md#data"
        )
    if config.tree.branching and config.tree.branching < 2:
        raise ValueError(
            f"tree.branching is {config.tree.branching}; must be at least 2, or 0 to "
            "choose it by the number of documents"
        )
    _check_choices(config)
    _check_numbers(config)
    if "vectors" in config:
        _check_vectors(config)
    if config.tower.trainable != "head":
        _check_trained_tower(config)
        return
    for name in ("dense", "joint"):
        if config[name].encoded:
            raise ValueError(
                f"{name}.encoded is {config[name].encoded}, but the tower is frozen "
                "(tower.trainable='head'): all rows are cached; set it to 0"
            )


def check_candidates(config, dataset) -> None:
    """Refuse negatives that should come with a data set, if it has none.

    Raises:
      ValueError: names the phase and the files.
    """
    if dataset.candidates is not None:
        return
    for system in config.systems:
        for name in get_system(system).phases:
            phase = config_of(config, system)[name]
            if phase.negatives == "given" and phase.steps and phase.mined_per_query:
                raise ValueError(
                    f"{name}.negatives is 'given', but {dataset.name} brings none: put "
                    "qidpidtriples.*.tsv or *scores_ids*.tsv beside its corpus, or use "
                    "'leaves' or 'teacher'"
                )


def _check_sections(config) -> None:
    for name, fields in base.get_config().items():
        if isinstance(fields, ml_collections.ConfigDict):
            missing = set(fields) - set(config[name])
            if missing:
                raise ValueError(
                    f"{name} has no field {min(missing)!r}: set the fields of a "
                    f"section one by one, as --config.{name}.{min(missing)}=VALUE"
                )


def _check_vectors(config) -> None:
    _choice("vectors.metric", config.vectors.metric, ("", *METRICS))
    if config.tower.trainable != "head":
        raise ValueError(
            f"tower.trainable is {config.tower.trainable!r}, but a config of vectors "
            "has no tower: it must be 'head'"
        )
    if config.index.metadata:
        raise ValueError(
            f"index.metadata is {config.index.metadata!r}, but vectors come without "
            "fields: leave it empty, and give save_index(metadata=) them"
        )


def _check_choices(config) -> None:
    _choice("tower.trainable", config.tower.trainable, ("head", "last_n", "all"))
    for name in ("query_prefix", "document_prefix"):
        if config.tower[name] is not None:
            check_prefix(f"tower.{name}", config.tower[name])
    if config.tower.pooling is not None:
        _choice("tower.pooling", config.tower.pooling, POOLINGS)
    if not isinstance(config.tower.normalise, bool | None):
        raise ValueError(
            f"tower.normalise is {config.tower.normalise!r}; must be True, False or "
            "None, for what the model's files say"
        )
    _choice("head.kind", config.head.get("kind", "residual"), ("residual", "none"))
    _choice("tower.dtype", config.tower.dtype, ("float32", "bfloat16"))
    _choice("tree.kind", config.tree.kind, tuple(KINDS))
    _choice("tree.start", config.tree.start, ("kmeans", "random"))
    _choice("leaves.num_codewords", config.leaves.num_codewords, (0, 16, 256))
    _choice("leaves.rotation", config.leaves.rotation, ROTATIONS)
    _choice("leaves.score", config.leaves.score, ("", *SCORES))
    _choice("index.documents", config.index.documents, ("none", "title", "full"))
    for kind in config.pseudo.kinds:
        _choice("pseudo.kinds", kind, PSEUDO_KINDS)
    parent = get_system(config.library_parent)
    if parent.pq or parent.library:
        raise ValueError(
            f"library_parent is {config.library_parent!r}; must be a system with raw "
            "embeddings, such as 'dense' or 'ehi'"
        )
    if not re.fullmatch(r"[\w.-]*", config.variant) or config.variant[:1] == ".":
        raise ValueError(
            f"variant is {config.variant!r}; it names files, so only letters, digits, "
            "'-', '_' and '.' are allowed, and no '.' in front"
        )


def _check_numbers(config) -> None:
    for name, least in LEAST.items():
        section, field = name.split(".")
        value = config[section][field]
        if value < least:
            raise ValueError(f"{name} is {value}; must be at least {least}")
    for name in ("seed", "corpus_of_steps", "fit_sample"):
        if config[name] < 0:
            raise ValueError(f"{name} is {config[name]}; must be at least 0")
    if config.seed > LARGEST_SEED:
        raise ValueError(f"seed is {config.seed}; must be at most {LARGEST_SEED}")
    if not 0 < config.tree.scale < math.inf:
        raise ValueError(
            f"tree.scale is {config.tree.scale}; must be above 0 and finite"
        )
    if not 0 < config.start_from_steps < math.inf:
        raise ValueError(
            f"start_from_steps is {config.start_from_steps}; must be above 0 and finite"
        )
    if not config.device_table_gib >= 0:
        raise ValueError(
            f"device_table_gib is {config.device_table_gib}; must be at least 0"
        )
    if not 0 < config.dev_fraction < 1:
        raise ValueError(
            f"dev_fraction is {config.dev_fraction}; must be between 0 and 1"
        )


def check_lengths(config, pretrained) -> None:
    """Check that the tower has a position for every token, before anything is encoded.

    Args:
      config: the experiment.
      pretrained: checkpoint of the tower, from `resolve`.

    Raises:
      ValueError: `tower.query_length` or `tower.document_length` exceeds the positions.
    """
    for field in ("query_length", "document_length"):
        check_length(pretrained, f"tower.{field}", config.tower[field])


def check_corpus(
    config, num_documents: int, tower_width: int, code_width: int = 0
) -> None:
    """Check what depends on the corpus and on the tower, before training.

    Args:
      config: from `fit_to_corpus`.
      num_documents: number of documents.
      tower_width: T.
      code_width: width that compressions are relative to; 0: T.

    Raises:
      ValueError: there are too few documents for the leaves or codewords, or the widths
        do not match.
    """
    width = config.head.width or tower_width
    if width > tower_width:
        raise ValueError(
            f"head.width is {width}; must be at most the tower's {tower_width}"
        )
    anchored = [
        f"{phase}.losses.{name}"
        for phase in ("dense", "joint")
        for name in ("anchor", "query_anchor")
        if config[phase].losses.get(name)
    ]
    if width != tower_width and anchored:
        raise ValueError(
            f"head.width is {width}, but {anchored[0]} compares with the tower's "
            f"{tower_width}: set it to 0"
        )
    for name in config.systems:
        own, system = config_of(config, name), get_system(name)
        if system.tree:
            _check_leaves(own, name, num_documents)
        if system.pq:
            widths = tower_width, code_width or tower_width
            _check_codes(own, name, system, num_documents, *widths)


def _check_leaves(config, name: str, num_documents: int) -> None:
    leaves = config.tree.branching**config.tree.height
    if leaves > num_documents:
        raise ValueError(
            f"tree.branching^tree.height = {leaves} leaves of {name} for "
            f"{num_documents} documents; use at most as many"
        )
    if config.fit_sample and config.fit_sample < leaves:
        raise ValueError(
            f"fit_sample is {config.fit_sample}, but {name} has {leaves} leaves; use "
            "at least as many, or 0 to choose it"
        )
    if config.tree.spill > leaves:
        raise ValueError(
            f"tree.spill is {config.tree.spill}; must be at most the {leaves} leaves"
        )


def _check_codes(config, name, system, num_documents, tower_width, code_width):
    codewords = config.leaves.num_codewords
    if system.library:
        codewords = {"faiss-fastscan": 16, "scann": 16}.get(name, 256)
        codewords = 0 if name in WITHOUT_CODEBOOKS else codewords
    if config.fit_sample and config.fit_sample < codewords:
        raise ValueError(
            f"fit_sample is {config.fit_sample}, but {name} fits {codewords} "
            "codewords; use at least as many, or 0 to choose it"
        )
    if num_documents < codewords:
        raise ValueError(
            f"{name} fits {codewords} codewords (leaves.num_codewords: 0, 16 or 256) "
            f"to {num_documents} documents; remove it from --config.systems"
        )
    if system.library:
        return
    for budget in map(Budget.parse, config.budgets):
        if budget.applies_to(system):
            subspaces = num_subspaces(
                budget.compression * config.tree.spill, tower_width=code_width,
                num_codewords=codewords,
            )  # fmt: skip
            width = config.head.width or tower_width
            if width % subspaces:
                raise ValueError(
                    f"budget {budget.name!r} gives {subspaces} codes per document, "
                    f"which do not divide the width {width} of an embedding"
                )


def _check_systems(config) -> None:
    """Check the phases of all systems, and that each system has a budget."""
    if not config.systems:
        raise ValueError("systems is empty; name at least one")
    phases = set()
    for name in config.systems:
        phases.update(get_system(name).phases)
    for name in ("dense", "joint", *sorted(phases)):
        try:
            Phase.from_mapping(config[name].to_dict())
        except (ValueError, TypeError) as error:
            raise ValueError(f"config.{name}: {error}") from None
    _check_scores(config)
    budgets = [Budget.parse(budget) for budget in config.budgets]
    for name in config.systems:
        if not any(budget.applies_to(get_system(name)) for budget in budgets):
            raise ValueError(
                f"no budget of {', '.join(config.budgets)} applies to {name!r}: a tree "
                "needs 'visit-...', PQ leaves need '...-64x'"
            )


def _check_scores(config) -> None:
    """Refuse scores that a phase of a system cannot train with."""
    for name in config.systems:
        own, system = config_of(config, name), get_system(name)
        for phase in system.phases:
            score = own[phase].score or score_of(own, system)
            if own[phase].losses.get("lambda_rank") and score == "corrected":
                raise ValueError(
                    f"{name} trains by the score 'corrected', but the loss lambda_rank "
                    f"of its phase {phase} ranks by codes alone: set {phase}.score, or "
                    "leaves.score, to 'ip', 'l2' or 'cosine'"
                )


def _check_trained_tower(config) -> None:
    for name in ("dense", "joint"):
        if config.tower.trainable == "last_n" and not config[name].last_n:
            raise ValueError(f"tower.trainable='last_n' needs {name}.last_n above 0")
        for source in ("documents", "synthetic"):
            if config[name].sources[source] and not config[name].encoded:
                raise ValueError(
                    f"{name}.sources.{source} is {config[name].sources[source]}: these "
                    "queries are cached tower outputs, so a trained tower needs 0 here "
                    f"or {name}.encoded above 0"
                )


def _strings(field: str, value) -> None:
    if not isinstance(value, list | tuple) or not all(
        isinstance(item, str) for item in value
    ):
        raise ValueError(f"{field} is {value!r}; must be a tuple of names")


def _choice(field: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(
            f"{field} is {value!r}; allowed: {', '.join(map(repr, allowed))}"
        )
