"""What each system is: named overrides of one base config.

A system says which system it starts from, which parts it has, which phases train and
which config fields it fixes. Adding a method is one entry here, at most one loss, and a
test.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_collections

from ehi.train.phase import Phase


@dataclass(frozen=True)
class System:
    """One row of a table.

    Attributes:
      parent: the system whose trained head and embeddings it starts from.
      tree, pq: whether it has a tree, and PQ leaves (else raw vectors).
      phases: config sections that train it, in order; none for the separate pipeline,
        whose tree and codes are fitted to the parent's embeddings and left alone.
      overrides: dotted config field -> value.
      counterpart: the separate system that a joint one is tested against.
      library: built and searched by Faiss or ScaNN; see `ehi.eval.baselines.build`.
      recipe: `recipe` of the config when its numbers last changed: its records of
        older ones are made again.
    """

    parent: str | None = None
    tree: bool = False
    pq: bool = False
    phases: tuple[str, ...] = ()
    overrides: Mapping[str, object] = field(default_factory=dict)
    counterpart: str | None = None
    library: bool = False
    recipe: int = 2


_SEPARATE = {
    "head.query_head": False,
    "tree.query_router": False,
    "tree.hidden": 0,
    "leaves.rotation": "fixed",
}

# With PQ leaves the quantised ranking is distilled, and the raw one not beside it.
_QUANTISED = {"joint.losses.distill_raw": 0.0}
_FLAT = {"leaves.residual": False}

SYSTEMS = {
    "dense-zero-shot": System(overrides={"head.hidden": 0, "head.query_head": False}),
    "dense": System(phases=("dense",), overrides={"head.query_head": False}),
    # The separate pipeline: fits to the embeddings of `dense`, and no training.
    "kmeans-tree": System("dense", tree=True, overrides=_SEPARATE),
    "opq": System("dense", pq=True, overrides=_SEPARATE | _FLAT),
    "kmeans-tree-opq": System("dense", tree=True, pq=True, overrides=_SEPARATE),
    # The same by the libraries that people use.
    "faiss-flat": System("dense", library=True),
    "faiss-ivf": System("dense", tree=True, library=True),
    "faiss-hnsw": System("dense", tree=True, library=True),
    "faiss-pq": System("dense", pq=True, library=True),
    "faiss-opq": System("dense", pq=True, library=True),
    "faiss-fastscan": System("dense", pq=True, library=True),
    "faiss-ivfpq": System("dense", tree=True, pq=True, library=True),
    "faiss-opq-ivfpq": System("dense", tree=True, pq=True, library=True),
    "lsh": System("dense", pq=True, library=True),
    "itq-lsh": System("dense", pq=True, library=True),
    "scann": System("dense", tree=True, pq=True, library=True),
    # Ours.
    "ehi": System("dense", tree=True, phases=("joint",), counterpart="kmeans-tree"),
    "joint-pq": System(
        "dense",
        pq=True,
        phases=("joint",),
        overrides=_QUANTISED | _FLAT,
        counterpart="opq",
        recipe=3,
    ),
    "ehi-pq": System(
        "dense",
        tree=True,
        pq=True,
        phases=("joint",),
        overrides=_QUANTISED,
        counterpart="kmeans-tree-opq",
        recipe=3,
    ),
    # Published methods.
    "jpq": System(
        "dense",
        pq=True,
        phases=("jpq",),
        overrides=_FLAT
        | {
            "tower.query_tower": True,
            "head.query_head": True,
            "leaves.rotation": "fixed",
            "leaves.frozen_codes": True,
        },
        counterpart="opq",
        recipe=3,
    ),
    "poeem": System(
        "dense",
        tree=True,
        pq=True,
        phases=("poeem_warmup", "poeem"),
        overrides={"tree.kind": "nearest", "leaves.codeword_gradient": False},
        counterpart="kmeans-tree-opq",
    ),
    "repconc": System(
        "dense", pq=True, phases=("repconc",), overrides=_FLAT, counterpart="opq"
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
        recipe=3,
    ),
    "jtr": System(
        "dense",
        tree=True,
        phases=("jtr",),
        overrides={"head.query_head": True, "tree.height": 2, "tree.hidden": 0},
        counterpart="kmeans-tree",
    ),
}


def get_system(name: str) -> System:
    """The system of a name."""
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}; allowed: {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def is_trained(system: System) -> bool:
    """Whether the system or one that it starts from has a phase of training."""
    parent = system.parent
    return bool(system.phases) or (parent is not None and is_trained(SYSTEMS[parent]))


def config_of(config: ml_collections.ConfigDict, name: str):
    """The config of one system: the base with the system's overrides.

    A system of another height gets as many leaves as fit into those of the base.
    """
    resolved = config.copy_and_resolve_references()
    with resolved.unlocked():
        resolved.update_from_flattened_dict(dict(get_system(name).overrides))
    if resolved.tree.height != config.tree.height:
        leaves = config.tree.branching**config.tree.height
        resolved.tree.branching = _branching(leaves, resolved.tree.height)
    return resolved


def fit_to_corpus(config, num_documents: int):
    """The config with `tree.branching` and `leaves.num_codewords` chosen, if 0.

    At most 2 sqrt(documents) leaves, so that routing costs no more than searching a
    leaf of a tenth of the leaves; rounded down to a power of two. 256 codewords, or 16
    where there are fewer documents to fit them to.
    """
    config = config.copy_and_resolve_references()
    if not config.tree.branching:
        leaves = 2 ** max(1, int(math.log2(2 * num_documents**0.5)))
        config.tree.branching = _branching(leaves, config.tree.height)
    if not config.leaves.num_codewords:
        config.leaves.num_codewords = 256 if num_documents >= 256 else 16
    return config


# The steps of a large corpus over those of one of `corpus_of_steps` documents.
MOST_TIMES = 5


def phase_of(config, name: str, num_documents: int) -> Phase:
    """The phase that a config section says, as long as the corpus needs.

    With `corpus_of_steps` its steps grow with the documents beyond these, so that each
    is in the pool as often, up to `MOST_TIMES`.
    """
    phase = Phase.from_mapping(config[name].to_dict())
    times = num_documents / (config.corpus_of_steps or num_documents)
    steps = round(phase.steps * min(max(times, 1.0), MOST_TIMES))
    return dataclasses.replace(phase, steps=steps)


def _branching(leaves: int, height: int) -> int:
    """The largest B >= 2 with B^H <= leaves."""
    branching = 2
    while (branching + 1) ** height <= leaves:
        branching += 1
    return branching


@dataclass(frozen=True)
class Budget:
    """What a query may cost: documents visited, and bytes of a document.

    Attributes:
      name: 'flat', 'flat-64x', 'visit-10', 'visit-10-64x', ...
      visit: percent of the documents that may be scored; None for all (no tree).
      compression: times smaller than the tower's float32 output; None for raw leaves.
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
                f"budget {name!r} is not understood; write 'flat', 'flat-64x', "
                "'visit-10' or 'visit-10-64x' (percent visited, times compressed)"
            ) from None
        if visit is not None and not 0 < visit <= 100:
            raise ValueError(f"budget {name!r} visits {visit}%; must be in (0, 100]")
        return cls(name, visit, compression)

    def applies_to(self, system: System) -> bool:
        """Whether a system has what the budget limits, all of it and no more.

        A budget can also be asked for by name where this does not hold: a tree of which
        every leaf is visited (`flat-64x`), or a library without lists or without codes.
        """
        return (self.visit is not None) == system.tree and (
            self.compression is not None
        ) == system.pq


def num_subspaces(compression: int, *, tower_width: int, num_codewords: int) -> int:
    """M so that codes are ``4 T / compression`` bytes a document."""
    code_bits = {16: 4, 256: 8}[num_codewords]
    bits = 8 * 4 * tower_width
    if bits % (compression * code_bits):
        raise ValueError(
            f"compression {compression}x of {4 * tower_width} bytes is not a whole "
            f"number of {code_bits}-bit codes"
        )
    return bits // (compression * code_bits)
