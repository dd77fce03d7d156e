"""The default phases of every method: losses, rates, sources and lengths.

A recipe is a plain dictionary with every field of `ehi.train.phase.Phase`; a config
wraps it, a library call passes it on:

    Phase.from_mapping(recipes.joint() | {"steps": 100})

The recipes of `dense` and `joint` are those of our own systems. Those of published
methods keep the losses of their papers, and what is trained and what is frozen. Their
rates, steps and mixture of queries are chosen on the dev split of pydocs, as ours are,
because a head on a frozen tower needs others than a whole tower does. The papers' own
settings are in `experiments/configs/papers/`. nDCG@10 on that dev split, seed 0, recipe
1, at 64x:

    flat; OPQ .560      jpq with half of the queries labelled .562, a tenth .571 (kept),
                        none .568
                        repconc with squared error 0.1 .557, 1 .566 (kept), 3 .563;
                        nearest instead of balanced codes .558 (at 0.1)
    10% visited; k-means tree and OPQ .541
                        distill-vq with query head 1e-4 .549, 3e-4 .554 (kept)
                        poeem with distortion 1 .524, 3 .518; as kept, with a buffer
                        that holds the whole warm-up .534; head frozen .520
    10% visited, raw; k-means tree .573
                        jtr .577 (rate 3e-3), .575 (1e-3, kept: better at 5%)

These are of `repconc`, `poeem` and `jtr` before recipe 4, which restored what they
lacked; of `distill-vq` without its dense loss. What recipe 4 tried is in
`experiments/results/FINDINGS.md`.

Rates of the codebooks, on the same split with recipe 3, seeds 0, 1, at 64x, flat:

    jpq         1e-4 .570 .561    3e-4 .574 .565    1e-3 .576 .564
    distill-vq  3e-4 .579 .574    1e-3 .584 .576    3e-3 .558    (query head 3e-4)
                and query head 1e-3 .590 .577, 3e-3 .576
    poeem       3e-4 .571 .573    1e-3 .574 .569; rotation, router x3 too .562
    repconc     3e-4 (kept) and 1e-3 alike at 10% visited and 64x (.554, .555)

Recipe 4 with the score of each index: the same seven trials for each by
`experiments.sweep`, seed 0, of which the best is kept:

    flat, 64x           jpq: as above .582; query head / 3 .586, x 3 .577; codebooks / 3
                        .586 (kept), x 3 .563; twice the steps .580
    10% visited, 64x    distill-vq: as above .572; query head / 3 .574, x 3 .585 (kept);
                        leaves / 3 .581, x 3 .558; twice the steps .577, the pool .576
                        poeem: as above .560; head / 3 .549, x 3 .558; leaves / 3 .559,
                        x 3 .565 (kept); twice the steps .562, the batch .548
"""

import math
from dataclasses import asdict

from ehi.model.joint import GROUPS
from ehi.train.phase import SOURCES, TERMS, Phase

# Shares and weights of the queries where labelled and pseudo pairs are contrasted.
PAIRS = {
    "sources": {"labelled": 0.25, "pseudo": 0.75},
    "source_weights": {"labelled": 3.0, "pseudo": 1.5},
}


def phase(
    *,
    losses: dict,
    rates: dict,
    sources: dict,
    source_weights: dict | None = None,
    **fields,
) -> dict:
    """Every field of a `Phase`; fields that are not given have its defaults.

    `losses`, `rates`, `sources` and `source_weights` have every name that is allowed,
    so that each can be overridden by itself.

    Raises:
      ValueError: a field or a name that does not exist, or a value that is not allowed.
    """
    sections = {
        "losses": dict.fromkeys(TERMS, 0.0) | losses,
        "rates": dict.fromkeys(GROUPS, 0.0) | rates,
        "sources": dict.fromkeys(SOURCES, 0.0) | sources,
        "source_weights": dict.fromkeys(SOURCES, 1.0) | (source_weights or {}),
    }
    return asdict(Phase.from_mapping(fields | sections))


def dense() -> dict:
    """The head alone, on labelled and pseudo pairs: the teacher of the joint phase.

    The anchors hold both sides near the encoder: training on one corpus's questions
    otherwise hurts documents that nobody asked about. A higher rate of the head wins
    back what the anchors cost where there is much to learn. nDCG@10 on dev by document,
    exact search, `own.py`, seeds 0-1:

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
    )


def joint() -> dict:
    """Head, tree and leaves together, mostly by distilling the dense ranking.

    A system leaves out the terms of parts that it lacks. Rates of the leaves, nDCG@10
    of ehi-pq on dev splits, 64x, at 10% visited and with every document scored
    (`experiments.reproduce --table T2 T3 --split=dev`):

                               pydocs, seeds 0, 1            squad-dev, seed 1
        a third (recipe 2)     .577 .583, .566 .572          .744 .750
        these                  .585 .591, .572 .579          .742 .750
        three times                       .573 .582

    The losses score quantised documents by inner product, whatever the index does.
    nDCG@10 on the dev split of pydocs, seed 0, 64x, of an index with 'corrected' scores
    after 400 steps by 'ip' / 'cosine' / 'corrected': ehi-pq .599 / .597 / .591 with
    every document scored, .593 / .593 / .584 at 10% visited; joint-pq .589 / .584 /
    .576.
    """
    return phase(
        steps=400,
        batch_size=320,
        pool=1536,
        losses={
            "distill_raw": 1.0,
            "path": 0.1,
            "distill": 1.0,
            "route_distill": 1.0,
            "balance": 1.0,
            "codebook": 1.0,
            "commitment": 0.5,
        },
        score="ip",
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
        revive_every=50,
    )


def jpq() -> dict:
    """JPQ (Zhan et al. 2021): query head and codebooks, LambdaRank on the whole index.

    Documents, rotation and codes stay as OPQ left them. As published, it trains by
    inner product; an index that scores the same codes by 'corrected' or 'cosine' is
    better by .004 or .003 (dev split of pydocs, seed 0, 64x, `experiments.run.scores`).
    """
    return phase(
        steps=400,
        batch_size=64,
        pool=64,  # its negatives come from the code table
        losses={"lambda_rank": 1.0},
        score="ip",
        rates={"query_head": 3e-4, "quantiser": 3e-4},
        sources={"labelled": 0.1, "pseudo": 0.9},
        decay="linear",
    )


def poeem_warmup() -> dict:
    """Poeem (Zhang et al. 2021), first phase: no codes, embeddings are collected."""
    return phase(
        steps=40,
        batch_size=512,
        pool=512,  # in-batch negatives
        losses={"semantic": 1.0},
        rates={"head": 1e-5},
        **PAIRS,
        buffer=20480,  # all embeddings of this phase; the paper keeps 8192
    )


def poeem() -> dict:
    """Poeem, second phase: coarse level, residual PQ and rotation.

    Training scores are cosines of the reconstruction, as in the authors' tutorial.
    """
    return phase(
        steps=400,
        batch_size=512,
        pool=512,
        losses={"quantised": 1.0, "reconstruction": 3.0},
        rates={
            "head": 1e-4,
            "router": 9e-4,
            "rotation": 6e-4,
            "quantiser": 9e-4,
        },
        **PAIRS,
        score="cosine",
        start="buffer",
    )


def repconc() -> dict:
    """RepCONC (Zhan et al. 2022), first phase: balanced codes of both sides' encoder.

    The squared error moves codewords and documents (`codebook` + `commitment` is its
    gradient). The softmax has the 11 hardest candidates of the pool at this step, among
    them up to 11 mined ones of every query. Sinkhorn sees the whole pool, 2,048
    documents; the authors have 4,096 positives and their negatives on 8 GPUs.
    """
    return phase(
        steps=400,
        batch_size=256,
        pool=2048,
        losses={"quantised": 1.0, "codebook": 1.0, "commitment": 1.0},
        rates={"head": 1e-4, "quantiser": 3e-4},
        **PAIRS,
        score="ip",
        negatives="teacher",
        mined_kept=200,
        mined_per_query=11,
        hardest=11,
        sinkhorn=100,  # as published; 20: .550 at 64x, 100: .559 (dev, seed 0)
    )


def repconc_jpq() -> dict:
    """RepCONC, second phase: JPQ from its documents, at a third of the rates of `jpq`.

    The authors' rates fall more, to a tenth and less of those of their first phase.
    """
    return phase(
        steps=200,
        batch_size=64,
        pool=64,
        losses={"lambda_rank": 1.0},
        score="ip",
        rates={"query_head": 1e-4, "quantiser": 3e-4},
        sources={"labelled": 0.1, "pseudo": 0.9},
        decay="linear",
        start="freeze",
    )


def distill_vq() -> dict:
    """Distill-VQ (Xiao et al. 2022): the dense ranking, no labels; documents stay.

    As in the authors' code (LibVQ), the teacher's ranking is distilled into the scores
    of embeddings, of lists and of codes with equal weights. What differs from it:

      lists: theirs scores a document by the centre of its list; ours learns the
        probabilities of leaves (`route_distill`) by a router of the queries, and
        centroids of residual codes beside it, where theirs has one vector for both.
      negatives: 4 of the teacher's 200 nearest documents for each query, and random
        documents up to the pool; theirs has those of the batch and one of the 200.
      encoder: a head on a frozen tower; theirs trains whole towers. The variant
        `both-heads` trains the documents' head too, as their best flat index does.
    """
    return phase(
        steps=400,
        batch_size=256,
        losses={"distill_raw": 1.0, "distill": 1.0, "route_distill": 1.0},
        score="ip",
        rates={
            "query_head": 3e-3,
            "query_router": 3e-3,
            "leaf_centroids": 1e-3,
            "quantiser": 1e-3,
        },
        sources={"labelled": 0.4, "pseudo": 0.3, "documents": 0.3},
        negatives="teacher",
        mined_kept=200,
        mined_per_query=4,
    )


def jtr() -> dict:
    """JTR (Li et al. 2023): queries and nodes by softmax against siblings.

    Documents stay where k-means put them.
    """
    return phase(
        steps=400,
        batch_size=512,
        losses={"leaf_likelihood": 1.0},
        rates={"query_head": 3e-5, "query_router": 1e-3},
        **PAIRS,
    )


def jtr_reassigned() -> dict:
    """JTR, second phase: documents move to the leaves where queries look for them.

    The best 100 documents of every query, by the teacher, and the 5 leaves that it
    reaches are counted, as in the authors' code. A document is in `tree.spill` leaves.
    """
    return jtr() | {"start": "reassign", "mined_kept": 100, "mined_beam": 5}


def vectors() -> dict:
    """Tree and leaves of given vectors, whose exact search is the teacher.

    The heads stay as they are, so embeddings are the given vectors. Training scores
    codes by cosine, as the index does. At 64x with every leaf visited,
    recall@10 of exact search by the k-means tree with OPQ, on dev queries, when codes
    are scored by 'ip' / 'l2' / 'cosine' / 'corrected': 10,000 vectors of a mixture (4
    bytes) .550 / .648 / .654 / .582; 5,660 MiniLM embeddings of pydocs (24 bytes)
    .723 / .677 / .739 / .716.

    Recall@10 / @100 on the same queries and vectors of pydocs after 200 steps of 128
    queries and pools of 768, at 10% and at 5% visited:

        k-means tree and OPQ                    .737 / .693    .701 / .602
        these                                   .751 / .682    .718 / .581
        the head trained too                    .755 / .676    .723 / .579
        routers frozen                          .752 / .694    .706 / .603
        both temperatures 0.03                  .742 / .663    .707 / .570
        that of the teacher, routers at 3e-4    .737 / .682    .705 / .589
    """
    found = joint()
    rates = found["rates"] | {"head": 0.0, "query_head": 0.0}
    return found | {"score": "cosine", "rates": rates}


def default_leaves(num_documents: int) -> int:
    """At most 2 sqrt(N) leaves, rounded down to a power of two.

    Routing then costs no more than scoring the documents of a tenth of the leaves.
    """
    return 2 ** max(1, int(math.log2(2 * num_documents**0.5)))


def default_codewords(num_documents: int) -> int:
    """256 codewords, or 16 if there are fewer than 256 documents."""
    return 256 if num_documents >= 256 else 16


# Every recipe by its name, which is that of its config section.
RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        dense,
        joint,
        jpq,
        poeem_warmup,
        poeem,
        repconc,
        repconc_jpq,
        distill_vq,
        jtr,
        jtr_reassigned,
    )
}
