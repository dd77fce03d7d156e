"""Variants of systems, such as ablations: named overrides of a config."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """One change of systems from their default.

    Attributes:
      systems: the systems that have this variant.
      note: the change, in words.
      overrides: dotted config field -> value.
    """

    systems: tuple[str, ...]
    note: str
    overrides: Mapping[str, object] = field(default_factory=dict)


def _ablation(note: str, **overrides) -> Variant:
    """Return a variant of ehi-pq; keywords write the dot of a field as `__`."""
    fields = {name.replace("__", "."): value for name, value in overrides.items()}
    return Variant(("ehi-pq",), note, fields)


def _mined(refresh: int) -> dict[str, object]:
    return {
        "joint__refresh": refresh,
        "joint__mined_per_query": 2,
        "joint__mined_kept": 16,
    }


# The anchors need a head as wide as the tower. A higher rate than this needs anchors.
_NO_ANCHOR = {
    "dense__losses__anchor": 0.0,
    "dense__losses__query_anchor": 0.0,
    "dense__rates__head": 1e-3,
}


def _both(**fields) -> dict[str, object]:
    """Return the same fields for the phases `dense` and `joint`."""
    return {
        f"{phase}.{name.replace('__', '.')}": value
        for phase in ("dense", "joint")
        for name, value in fields.items()
    }


VARIANTS = {
    "": Variant((), "the default"),
    # Tower, tree and leaves train in the one jitted step, after a `dense` that also
    # trains its tower. The step is that of a frozen tower, except that the tower reads
    # 32 of its queries and their documents. On pydocs dev, seed 0, 150 and 150 steps,
    # bfloat16: dense .634 (frozen .611); at 10% visited and 64x, ehi-pq .603 (.602 with
    # a quarter of the joint tower's rate), kmeans-tree-opq .576. On a GPU add
    # --config.tower.dtype=bfloat16; on an AMD CPU its steps take a tenth longer
    # (`experiments.benchmark train --dtype=bfloat16`).
    "finetune": Variant(
        ("dense", "kmeans-tree-opq", "ehi-pq"),
        "tower trained too, 300 and 150 steps, which read 32 queries each",
        {
            "tower.trainable": "all",
            "tower.query_length": 32,
            "tower.document_length": 128,
            "dense.steps": 300,
            "joint.steps": 150,
        }
        | _both(
            encoded=32,
            rates__tower=2e-5,
            warmup=30,
            log_every=10,
            checkpoint_every=50,
        ),
    ),
    # EHI-style: hinge losses on embeddings and path embeddings, the intra-leaf loss,
    # and per-level classifiers. The weights are from memory of the paper's appendix
    # (SciFact); margin and threshold were not found. The paper mines every 5 epochs:
    # 100 steps are 2 epochs of the labelled queries of pydocs, and 9 of SciFact's.
    "paper": Variant(
        ("ehi",),
        "EHI-style losses, router and negatives",
        {
            "tree.kind": "per_level",
            "tree.query_router": False,
            "joint.losses.semantic_hinge": 0.2,
            "joint.losses.path_hinge": 0.8,
            "joint.losses.intra_leaf": 0.2,
            "joint.losses.distill_raw": 0.0,
            "joint.losses.path": 0.0,
            "joint.losses.route_distill": 0.0,
            "joint.losses.balance": 0.0,
            "joint.losses.quantised": 0.0,
            "joint.sources.labelled": 0.25,
            "joint.sources.pseudo": 0.75,
            "joint.sources.documents": 0.0,
            "joint.sources.synthetic": 0.0,
            "joint.source_weights.labelled": 3.0,
            "joint.source_weights.pseudo": 1.5,
            "joint.refresh": 100,
            "joint.mined_per_query": 2,
        },
    ),
    "on-ehi": Variant(
        ("faiss-ivf", "faiss-hnsw"),
        "on the embeddings of ehi instead of dense",
        {"library_parent": "ehi"},
    ),
    "no-reassignment": Variant(
        ("jtr",),
        "documents stay in the two leaves that k-means gives them",
        {"jtr_reassigned.steps": 0},
    ),
    "no-jpq": Variant(("repconc",), "no JPQ stage", {"repconc_jpq.steps": 0}),
    "both-heads": Variant(
        ("distill-vq",),
        "the documents' head trained too",
        {"distill_vq.rates.head": 3e-4},
    ),
    # One loss off.
    "no-distill": _ablation("loss distill off", joint__losses__distill=0.0),
    "no-path": _ablation("loss path off", joint__losses__path=0.0),
    "no-route-distill": _ablation(
        "loss route_distill off", joint__losses__route_distill=0.0
    ),
    "no-balance": _ablation("loss balance off", joint__losses__balance=0.0),
    "no-codebook": _ablation("loss codebook off", joint__losses__codebook=0.0),
    "no-commitment": _ablation("loss commitment off", joint__losses__commitment=0.0),
    # One loss of a paper added.
    "with-quantised": _ablation(
        "cross-entropy of quantised scores on", joint__losses__quantised=0.1
    ),
    "with-intra-leaf": _ablation(
        "EHI-style intra-leaf loss on", joint__losses__intra_leaf=0.2
    ),
    # The documents that a query is compared with.
    "in-batch": _ablation("pool: only in-batch (320)", joint__pool=320),
    "small-pool": _ablation("pool: half of the random documents", joint__pool=768),
    "whole-index": _ablation("pool: the whole corpus", joint__pool=10**9),
    "mined-50": _ablation("pool: also mined from leaves, every 50 steps", **_mined(50)),
    "mined-100": _ablation("... every 100 steps", **_mined(100)),
    "mined-200": _ablation("... every 200 steps", **_mined(200)),
    "mined-from-teacher": _ablation(
        "pool: also nearest documents of the teacher (Distill-VQ)",
        joint__negatives="teacher",
        joint__refresh=400,
        joint__mined_per_query=2,
        joint__mined_kept=200,
    ),
    # The tree.
    "height-2": _ablation("11^2 leaves", tree__height=2),
    "height-3": _ablation("5^3 leaves", tree__height=3),
    "leaves-64": _ablation("64 leaves", tree__branching=64),
    "leaves-256": _ablation("256 leaves", tree__branching=256),
    "per-level": _ablation(
        "per_level router (EHI)", tree__kind="per_level", tree__query_router=False
    ),
    "one-router": _ablation(
        "one router for both sides", tree__query_router=False, tree__hidden=0
    ),
    "fixed-beam": _ablation(
        "the same number of leaves for every query", tree__adaptive=False
    ),
    "spill-2": _ablation("two leaves per document, codes half as long", tree__spill=2),
    "random-tree": _ablation("tree started at random", tree__start="random"),
    # The leaves.
    "no-rotation": _ablation("rotation: none", leaves__rotation="none"),
    "fixed-rotation": _ablation("rotation: that of OPQ", leaves__rotation="fixed"),
    "givens": _ablation("rotation: learned by Givens", leaves__rotation="givens"),
    "no-residual": Variant(
        ("kmeans-tree-opq", "ehi-pq"), "codes of embeddings", {"leaves.residual": False}
    ),
    "frozen-head": _ablation("head frozen, only the index", joint__rates__head=0.0),
    "query-head": _ablation("a second head for queries", head__query_head=True),
    "head-192": _ablation("head 192 wide", head__width=192, **_NO_ANCHOR),
    "no-anchor": _ablation("anchors of dense off (for head 192)", **_NO_ANCHOR),
    "no-query-anchor": _ablation(
        "loss query_anchor of dense off, its rate 1e-3",
        dense__losses__query_anchor=0.0,
        dense__rates__head=1e-3,
    ),
    # The training queries.
    "no-synthetic": _ablation(
        "no synthetic queries",
        joint__sources__synthetic=0.0,
        joint__sources__pseudo=0.35,
        joint__sources__documents=0.35,
    ),
    "slow-leaves": _ablation(
        "rates of the leaves a third",
        joint__rates__leaf_centroids=3e-4,
        joint__rates__rotation=2e-4,
        joint__rates__quantiser=3e-4,
    ),
    "steps-200": _ablation("200 joint steps", joint__steps=200),
    "steps-800": _ablation("800 joint steps", joint__steps=800),
}


def get_variant(name: str) -> Variant:
    """Return the variant of a name; '' is the default."""
    if name not in VARIANTS:
        raise ValueError(
            f"unknown variant {name!r}; allowed: {', '.join(n for n in VARIANTS if n)}"
        )
    return VARIANTS[name]


def apply_variant(config, name: str):
    """Return the config with a variant's overrides and systems."""
    # Not `copy_and_resolve_references`: a field that is None would lose its type, and
    # no flag could set it.
    variant, config = get_variant(name), copy.deepcopy(config)
    if name:
        config.variant, config.systems = name, variant.systems
        config.update_from_flattened_dict(dict(variant.overrides))
    return config
