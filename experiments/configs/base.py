"""The fields of every experiment, in flow order, with the values that all share.

Chosen on dev splits (`--config.split=dev`): that of pydocs, and of SciFact, where it is
carved out of train by document (`scifact.py` names one exception). nDCG@10, seed 0:

    ehi on pydocs at 2 / 5 / 10% visited                k-means tree .472 / .549 / .573
      200 joint steps, documents do not follow routes                .487 / .552 / .572
      ... documents do (the gradient of route_distill)               .520 / .567 / .587
      400 joint steps                                                .532 / .574 / .595
      ... and path 0.1 (kept)                                        .536 / .575 / .598
    joint-pq on pydocs at 32x / 64x, 200 steps; OPQ .584 / .560      .590 / .570
    ehi-pq on pydocs at 10% and 64x; k-means tree and OPQ .541
      200 joint steps .558, 400 joint steps .568
    residual codes on SciFact at 10% and 64x    without .599 (separate .549), with .629
      (separate .591): kept, for both sides
"""

import ml_collections

from ehi.model.joint import GROUPS
from ehi.train.objective import TERMS
from ehi.train.phase import SOURCES


def get_config() -> ml_collections.ConfigDict:
    """The base config; config files change what is theirs."""
    c = ml_collections.ConfigDict()
    c.dataset = "pydocs"  # 'pydocs', 'beir/<name>', or a BEIR folder or zip
    c.split = "test"  # what is evaluated; choices are made on 'dev'
    c.dev_fraction = 0.2  # of the train documents, where a data set has no dev split
    c.seed = 0
    c.recipe = 1  # raised when the numbers of a system change
    c.variant = ""  # name of an ablation, in the records

    c.tower = ml_collections.ConfigDict()
    c.tower.name = "sentence-transformers/all-MiniLM-L6-v2"
    c.tower.query_length = 64  # tokens
    c.tower.document_length = 256
    c.tower.dtype = "float32"
    c.tower.trainable = "head"  # 'head', 'last_n' or 'all'

    c.pseudo = ml_collections.ConfigDict()
    c.pseudo.kinds = ("title", "sentence", "span")
    c.pseudo.per_document = 2
    c.pseudo.synthetic = 2  # of each document, in the space of the tower's outputs

    c.head = ml_collections.ConfigDict()
    c.head.width = 0  # D; 0 for the tower's
    c.head.hidden = 512
    c.head.query_head = False  # of their own for queries, in the joint phase

    c.tree = ml_collections.ConfigDict()
    c.tree.kind = "per_node"
    c.tree.height = 1
    c.tree.branching = 0  # 0: for at most 2 sqrt(documents) leaves
    c.tree.scale = 20.0
    c.tree.query_router = True
    c.tree.hidden = 256
    c.tree.spill = 1

    c.leaves = ml_collections.ConfigDict()
    c.leaves.num_codewords = 256
    c.leaves.rotation = "learned"
    c.leaves.residual = True

    c.dense, c.joint = _dense(), _joint()
    c.systems = (
        "dense-zero-shot",
        "dense",
        "kmeans-tree",
        "opq",
        "kmeans-tree-opq",
        "ehi",
        "joint-pq",
        "ehi-pq",
    )
    c.budgets = (
        "flat",
        "flat-32x",
        "flat-64x",
        "visit-2",
        "visit-5",
        "visit-10",
        "visit-10-64x",
    )
    return c


def _dense() -> ml_collections.ConfigDict:
    """The head alone, on labelled and pseudo pairs: the teacher of the joint phase."""
    return _phase(
        steps=400,
        batch_size=512,
        losses={"semantic": 1.0, "anchor": 1.0},
        rates={"head": 1e-3},
        sources={"labelled": 0.25, "pseudo": 0.75},
        source_weights={"labelled": 3.0, "pseudo": 1.5},
        temperature=0.05,
    )


def _joint() -> ml_collections.ConfigDict:
    """Head, tree and leaves together, mostly by distilling the dense ranking."""
    p = _phase(
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
            "leaf_centroids": 3e-4,
            "rotation": 2e-4,
            "quantiser": 3e-4,
        },
        sources={"labelled": 0.3, "pseudo": 0.1, "documents": 0.1, "synthetic": 0.5},
        source_weights={},
        temperature=0.05,
    )
    p.pool = 1536
    p.revive_every = 50
    return p


def _phase(
    *, steps, batch_size, losses, rates, sources, source_weights, temperature
) -> ml_collections.ConfigDict:
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
    p.log_every = 20
    p.checkpoint_every = 100
    return p


def _all_of(names, values: dict, rest: float) -> ml_collections.ConfigDict:
    """Every name as a field, so that each can be overridden on the command line."""
    return ml_collections.ConfigDict(dict.fromkeys(names, rest) | values)
