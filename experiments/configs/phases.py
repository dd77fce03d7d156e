"""Phases of training: what a phase may say, and those of our own systems."""

import ml_collections

from ehi.model.joint import GROUPS
from ehi.train.objective import TERMS
from ehi.train.phase import SOURCES

# Queries and what their rows weigh, wherever labelled and pseudo pairs are contrasted.
PAIRS = {
    "sources": {"labelled": 0.25, "pseudo": 0.75},
    "source_weights": {"labelled": 3.0, "pseudo": 1.5},
}


def dense() -> ml_collections.ConfigDict:
    """The head alone, on labelled and pseudo pairs: the teacher of the joint phase.

    Both sides are held near the encoder: a corpus teaches its own questions, and what
    it makes a head forget is missed by all others. The anchors keep a head from going
    far, not from going: a higher rate gets back what they cost where much is to be
    learned. nDCG@10 on dev by document, exact search, `own.py`, seeds 0-1:

                                        pydocs  squad-dev  scifact
        the encoder itself               .523     .776      .703
        query_anchor 0, rate 1e-3        .594     .765      .670
        query_anchor 6, rate 5e-3        .593     .779      .708
    """
    return phase(
        steps=400,
        batch_size=512,
        losses={"semantic": 1.0, "anchor": 1.0, "query_anchor": 6.0},
        rates={"head": 5e-3},
        **PAIRS,
        temperature=0.05,
    )


def joint() -> ml_collections.ConfigDict:
    """Head, tree and leaves together, mostly by distilling the dense ranking.

    Rates of the leaves, nDCG@10 of ehi-pq on dev splits, 64x, at 10% visited and with
    every document scored (`experiments.reproduce --table T2 T3 --split=dev`):

                               pydocs, seeds 0, 1            squad-dev, seed 1
        a third (recipe 2)     .577 .583, .566 .572          .744 .750
        these                  .585 .591, .572 .579          .742 .750
        three times                       .573 .582
    """
    p = phase(
        steps=400,
        batch_size=320,
        # Terms of parts that a system lacks are off by themselves.
        losses={
            "distill_raw": 1.0,
            "path": 0.1,
            "distill": 1.0,
            "route_distill": 1.0,
            "balance": 1.0,
            "codebook": 1.0,
            "commitment": 0.5,
        },
        rates={
            "head": 3e-4,
            "query_head": 3e-4,
            "router": 3e-3,
            "query_router": 3e-3,
            "leaf_centroids": 1e-3,
            "rotation": 6e-4,
            "quantiser": 1e-3,
        },
        sources={"labelled": 0.3, "pseudo": 0.1, "documents": 0.1, "synthetic": 0.5},
        source_weights={},
        temperature=0.05,
    )
    p.pool = 1536
    p.revive_every = 50
    return p


def phase(
    *, steps, batch_size, losses, rates, sources, source_weights, temperature
) -> ml_collections.ConfigDict:
    """A phase with every field of `ehi.train.phase.Phase`, so that each can be set."""
    p = ml_collections.ConfigDict()
    p.steps = steps
    p.batch_size = batch_size
    p.pool = 1024  # documents scored a step; as good on dev as the whole corpus
    p.losses = _all_of(TERMS, losses, 0.0)
    p.rates = _all_of(GROUPS, rates, 0.0)
    p.sources = _all_of(SOURCES, sources, 0.0)
    p.source_weights = _all_of(SOURCES, source_weights, 1.0)
    p.temperature = temperature
    p.teacher_temperature = temperature
    p.margin = 0.3
    p.intra_leaf_threshold = 0.9
    p.warmup = 20
    p.decay = "cosine"
    p.weight_decay = 0.01
    p.clip = 1.0
    p.refresh = 0  # steps between minings of negatives from the leaves
    p.mined_per_query = 0
    p.mined_kept = 32
    p.mined_beam = 4
    p.revive_every = 0
    p.chunk = 0
    p.last_n = 0
    p.negatives = "leaves"
    p.lambda_cut = 200
    p.top_k = 200
    p.sinkhorn = 0
    p.sinkhorn_epsilon = 0.003
    p.buffer = 0
    p.encoded = 0  # rows that a trained tower reads a step, the others cached; 0: all
    p.start = ""
    p.log_every = 20
    p.checkpoint_every = 100
    return p


def _all_of(names, values: dict, rest: float) -> ml_collections.ConfigDict:
    """Every name as a field, so that each can be overridden on the command line."""
    return ml_collections.ConfigDict(dict.fromkeys(names, rest) | values)
