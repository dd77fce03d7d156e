"""The systems: named overrides of one base config.

A system names its parent, its parts, the phases that train it, and the config fields
that it fixes. A new method is one entry here, at most one loss, and a test.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_collections

from ehi.train.phase import Phase
from ehi.train.recipes import RECIPES, default_codewords, default_leaves


@dataclass(frozen=True)
class System:
    """One row of a table.

    Attributes:
      parent: the system whose trained head and embeddings it starts from.
      tree, pq: whether it has a tree, and PQ leaves instead of raw vectors.
      phases: config sections that train it, in order. The separate pipeline has none:
        its tree and codes are fitted to the parent's embeddings.
      overrides: dotted config field -> value.
      counterpart: the separate system that a joint one is tested against.
      library: whether Faiss or ScaNN builds it; see `ehi.eval.baselines.build`.
      score: of its quantised documents, chosen on dev (`experiments.run.scores`); see
        `score_of`. A phase may train by another (`Phase.score`).
      recipe: `config.recipe` when its numbers last changed; older records are made
        again.
    """

    parent: str | None = None
    tree: bool = False
    pq: bool = False
    phases: tuple[str, ...] = ()
    overrides: Mapping[str, object] = field(default_factory=dict)
    counterpart: str | None = None
    library: bool = False
    score: str = "cosine"
    recipe: int = 4


_SEPARATE = {
    "head.query_head": False,
    "tree.query_router": False,
    "tree.hidden": 0,
    "leaves.rotation": "fixed",
}

# With PQ leaves, the quantised ranking is distilled instead of the raw one.
_QUANTISED = {"joint.losses.distill_raw": 0.0}
_FLAT = {"leaves.residual": False}
# Documents keep the codes of the start, and queries train an encoder of their own.
_FROZEN_CODES = _FLAT | {
    "tower.query_tower": True,
    "head.query_head": True,
    "leaves.rotation": "fixed",
    "leaves.frozen_codes": True,
}

# (tree, pq) -> systems built by libraries.
LIBRARY_SYSTEMS = {
    (False, False): ("faiss-flat",),
    (True, False): ("faiss-ivf", "linear-router", "faiss-hnsw", "faiss-hnsw-sq"),
    (False, True): (
        "faiss-pq", "faiss-opq", "faiss-fastscan", "faiss-pca-pq", "faiss-sq",
        "faiss-rq", "faiss-lsq", "faiss-prq", "faiss-rabitq", "lsh", "itq-lsh",
        "binary-int8",
    ),
    (True, True): (
        "faiss-ivfpq", "faiss-opq-ivfpq", "linear-router-opq", "faiss-ivfrabitq",
        "faiss-hnsw-pq", "scann",
    ),
}  # fmt: skip

SYSTEMS = {
    "dense-zero-shot": System(overrides={"head.hidden": 0, "head.query_head": False}),
    "dense": System(phases=("dense",), overrides={"head.query_head": False}),
    # The separate pipeline: fits to the embeddings of `dense`, without training.
    "kmeans-tree": System("dense", tree=True, overrides=_SEPARATE),
    "opq": System("dense", pq=True, overrides=_SEPARATE | _FLAT),
    "kmeans-tree-opq": System("dense", tree=True, pq=True, overrides=_SEPARATE),
    # The same by libraries, and other indexes that they have.
    **{
        name: System("dense", tree=tree, pq=pq, library=True)
        for (tree, pq), names in LIBRARY_SYSTEMS.items()
        for name in names
    },
    # Ours.
    "ehi": System("dense", tree=True, phases=("joint",), counterpart="kmeans-tree"),
    "joint-pq": System(
        "dense",
        pq=True,
        phases=("joint",),
        overrides=_QUANTISED | _FLAT,
        counterpart="opq",
        score="corrected",
    ),
    "ehi-pq": System(
        "dense",
        tree=True,
        pq=True,
        phases=("joint",),
        overrides=_QUANTISED,
        counterpart="kmeans-tree-opq",
        score="corrected",
    ),
    # Published methods.
    "jpq": System(
        "dense",
        pq=True,
        phases=("jpq",),
        overrides=_FROZEN_CODES,
        counterpart="opq",
        score="corrected",
    ),
    "poeem": System(
        "dense",
        tree=True,
        pq=True,
        phases=("poeem_warmup", "poeem"),
        overrides={"tree.kind": "nearest", "leaves.codeword_gradient": False},
        counterpart="kmeans-tree-opq",
        score="l2",  # the authors' tutorial serves by L2
    ),
    "repconc": System(
        "dense",
        pq=True,
        phases=("repconc", "repconc_jpq"),
        overrides=_FROZEN_CODES,
        counterpart="opq",
    ),
    "distill-vq": System(
        "dense",
        tree=True,
        pq=True,
        phases=("distill_vq",),
        overrides={
            "head.query_head": True,
            "tree.hidden": 0,
            "leaves.rotation": "fixed",
        },
        counterpart="kmeans-tree-opq",
    ),
    "jtr": System(
        "dense",
        tree=True,
        phases=("jtr", "jtr_reassigned"),
        overrides={
            "head.query_head": True,
            "tree.height": 2,
            "tree.hidden": 0,
            "tree.spill": 2,
        },
        counterpart="kmeans-tree",
    ),
}


def get_system(name: str) -> System:
    """Return the system of a name."""
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}; allowed: {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def is_trained(system: System) -> bool:
    """Whether the system or an ancestor has a training phase."""
    parent = system.parent
    return bool(system.phases) or (parent is not None and is_trained(SYSTEMS[parent]))


def config_of(config: ml_collections.ConfigDict, name: str):
    """Return the config of one system: the base with the system's overrides.

    A system with another tree height gets at most as many leaves as the base.
    """
    resolved = config.copy_and_resolve_references()
    with resolved.unlocked():
        resolved.update_from_flattened_dict(dict(get_system(name).overrides))
    if config.head.get("kind") == "none":
        _leave_embeddings(resolved)
    if resolved.tree.height != config.tree.height:
        leaves = config.tree.branching**config.tree.height
        resolved.tree.branching = _branching(leaves, resolved.tree.height)
    return resolved


def _leave_embeddings(config) -> None:
    """No system changes an embedding: the heads are the identity, and frozen."""
    config.head.hidden, config.head.query_head = 0, False
    for name in RECIPES:
        config[name].rates.head = config[name].rates.query_head = 0.0


def score_of(config, system: System) -> str:
    """Return the score of a system's documents: that of the config, if it names one.

    The vectors of raw leaves are exact: their score is the inner product.
    """
    return (config.leaves.score or system.score) if system.pq else "ip"


def fit_to_corpus(config, num_documents: int):
    """Return the config with `tree.branching` and `leaves.num_codewords` set, if 0."""
    config = config.copy_and_resolve_references()
    if not config.tree.branching:
        leaves = default_leaves(num_documents)
        config.tree.branching = _branching(leaves, config.tree.height)
    if not config.leaves.num_codewords:
        config.leaves.num_codewords = default_codewords(num_documents)
    return config


# Most steps of a large corpus, relative to one of `corpus_of_steps` documents.
MOST_TIMES = 5


def phase_of(config, name: str, num_documents: int) -> Phase:
    """Return the phase of a config section, with the steps that the corpus needs.

    Above `corpus_of_steps` documents, the steps grow in proportion, up to `MOST_TIMES`
    times, so that each document stays in the pool equally often. A run that trains on
    takes a share of them; its tree, codes and query side are those of the finished run,
    so nothing is fitted or copied before its first step.
    """
    phase = Phase.from_mapping(config[name].to_dict())
    times = num_documents / (config.corpus_of_steps or num_documents)
    steps = round(phase.steps * min(max(times, 1.0), MOST_TIMES))
    if not config.start_from:
        return dataclasses.replace(phase, steps=steps)
    steps = steps and max(1, round(steps * config.start_from_steps))
    # The corpus may be another, so its documents are assigned again.
    start = phase.start if phase.start == "reassign" else ""
    return dataclasses.replace(phase, steps=steps, start=start)


def phases_of(config, system: System) -> tuple[str, ...]:
    """Return the phases that train a system; only the last one if a run trains on."""
    return system.phases[-1:] if config.start_from else system.phases


def freezes_later(config, system: System, name: str) -> bool:
    """Whether a phase after the one of a name freezes the documents."""
    later = system.phases[system.phases.index(name) + 1 :]
    return any(config[phase].start == "freeze" for phase in later)


def _branching(leaves: int, height: int) -> int:
    """Return the largest B >= 2 with B^H <= leaves."""
    branching = 2
    while (branching + 1) ** height <= leaves:
        branching += 1
    return branching


@dataclass(frozen=True)
class Budget:
    """Limits of a search: documents visited, and bytes per document.

    Attributes:
      name: 'flat', 'flat-64x', 'visit-10', 'visit-10-64x', ...
      visit: percentage of the documents that may be scored; None: all (no tree).
      compression: how many times a document is smaller than the tower's float32
        output; None for raw leaves.
    """

    name: str
    visit: float | None
    compression: int | None

    @classmethod
    def parse(cls, name: str) -> "Budget":
        """Read a budget's name."""
        parts = name.split("-")
        try:
            if parts[0] == "flat":
                visit, rest = None, parts[1:]
            elif parts[0] == "visit":
                visit, rest = float(parts[1]), parts[2:]
            else:
                raise ValueError
            compression = int(rest[0].removesuffix("x")) if rest else None
            if len(rest) > 1 or (rest and not rest[0].endswith("x")):
                raise ValueError
        except (ValueError, IndexError):
            raise ValueError(
                f"budget {name!r} is not understood; write it as 'flat', 'flat-64x', "
                "'visit-10' or 'visit-10-64x' (percent visited, times compressed)"
            ) from None
        if visit is not None and not 0 < visit <= 100:
            raise ValueError(f"budget {name!r} visits {visit}%; must be in (0, 100]")
        return cls(name, visit, compression)

    def applies_to(self, system: System) -> bool:
        """Whether a system has exactly the parts that the budget limits.

        Tables also ask for other budgets by name: a tree of which every leaf is visited
        (`flat-64x`), or a library without lists or without codes.
        """
        return (self.visit is not None) == system.tree and (
            self.compression is not None
        ) == system.pq
