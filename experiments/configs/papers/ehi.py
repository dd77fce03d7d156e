"""EHI-style training: encoder and tree by three losses, at the paper's scale.

    python -m experiments.main --config=experiments/configs/papers/ehi.py:scifact \\
        --workdir=runs/paper-ehi-scifact

Arguments: scifact, fiqa, nq320k, msmarco. With `-encoder` after the name it is the
control: the dual encoder alone, trained for as many steps with the same loss, with a
k-means tree on top. Add --dry_run for memory, shapes and time without data or weights.

Method: Kumar et al. 2023, arXiv 2310.08891. No code was released and its tables could
not be read, so this config has the protocol, not the numbers. Public sources name the
checkpoint, AdamW, one level (H = 1), three losses, and negatives mined from the leaves
every few epochs. The fields of `c.from_memory` are from memory: sweep them before you
conclude anything. The rest was not found, and the values are ours: margin, threshold,
lengths, warm-up, decay, weight decay, mined negatives per query, head (none), start of
the tree (random).

Data: scifact, fiqa and msmarco are public BEIR sets, or folders of these names in a
folder of EHI_DATA; nq320k is such a folder. Any layout of experiments/README.md#data
will do, so msmarco may be MS MARCO's own tables. Every example is a labelled pair;
--config.joint.negatives=given draws negatives from its triples instead of the leaves.
Hardware: one accelerator of 40 GB. By the formula of --dry_run, msmarco also takes 3.8
GiB of the host's memory and 231 GiB of disk, nq320k 2.3 and 4.6 GiB. Time: see
--dry_run, plus encoding the corpus 20 times to mine negatives.
Expected: unknown. The abstract claims +1.45% MRR@10 on MS MARCO dev and +8.2% nDCG@10
on DL19 over other indexes at equal cost (version 2; version 1: +0.6%, +4.2%).
"""

import ml_collections

from experiments.configs import base

# Shape of sentence-transformers/msmarco-distilbert-cos-v5, a DistilBERT with mean
# pooling and unit length. With it, a dry run needs no checkpoint.
DISTILBERT = {
    "vocab_size": 30522,
    "width": 768,
    "num_layers": 6,
    "num_heads": 12,
    "mlp_width": 3072,
    "max_positions": 512,
    "type_vocab_size": 0,
}
EPOCHS, REFRESH = 100, 5  # from memory, for all data sets
# Documents and train pairs (public constants); then, from memory, batch size, leaves,
# learning rates of encoder and indexer, and weights of the three losses. The encoder's
# rate on msmarco is as remembered, but looks too small to have an effect.
DATA_SETS = {
    "scifact": (5_183, 919, 64, 40, 4e-4, 0.016, (0.2, 0.8, 0.2)),
    "fiqa": (57_638, 14_166, 64, 5000, 2e-4, 9e-4, (0.03, 0.46, 0.54)),
    "nq320k": (109_739, 307_373, 1024, 1000, 1e-4, 4e-4, (0.2, 0.4, 0.11)),
    "msmarco": (8_841_823, 532_761, 4096, 7000, 2e-8, 9e-4, (0.11, 0.84, 0.60)),
}
FROM_MEMORY = (
    "joint.steps",
    "joint.refresh",
    "joint.batch_size",
    "joint.rates.tower",
    "joint.rates.router",
    "joint.losses.semantic_hinge",
    "joint.losses.path_hinge",
    "joint.losses.intra_leaf",
    "tree.branching",
    "sizes.documents",
    "sizes.train_queries",
)


def get_config(name: str = "scifact") -> ml_collections.ConfigDict:
    """Return EHI on a data set of `DATA_SETS`; with '-encoder', the encoder alone."""
    dataset = name.removesuffix("-encoder")
    if dataset not in DATA_SETS:
        raise ValueError(
            f"unknown argument {name!r} of papers/ehi.py; allowed: "
            f"{', '.join(DATA_SETS)}, each also with '-encoder'"
        )
    documents, pairs, batch_size, leaves, tower, router, losses = DATA_SETS[dataset]
    c = base.get_config()
    c.dataset, c.variant = f"beir/{dataset}", "paper"
    # MS MARCO's test split is TREC DL19; nq320k has only train and test.
    c.split = "dev" if dataset == "msmarco" else "test"
    c.sizes = ml_collections.ConfigDict(
        {"documents": documents, "train_queries": pairs}
    )
    c.from_memory = FROM_MEMORY
    _model(c, leaves)
    epoch = -(-pairs // batch_size)  # steps
    for phase in (c.dense, c.joint):
        _phase(phase, batch_size, EPOCHS * epoch, tower)
    c.joint.rates.router = router
    for loss, weight in zip(
        ("semantic_hinge", "path_hinge", "intra_leaf"), losses, strict=True
    ):
        c.joint.losses[loss] = weight
    c.joint.refresh = REFRESH * epoch
    c.joint.mined_per_query = 1
    c.joint.pool = 2 * batch_size  # a positive and a mined negative per query
    c.joint.mined_beam = max(1, leaves // 100)
    c.dense.chunk = c.joint.chunk = 64  # rows; the gradient is the same
    if dataset == name:
        c.dense.steps = 0  # EHI starts from the checkpoint itself
        c.systems = ("dense", "ehi")
    else:
        c.systems = ("dense", "kmeans-tree")
        c.tree.kind, c.tree.start = "per_node", "kmeans"
    visited = (1, 5, 10, 20, 40, 60, 80, 100)  # counted percentages, not beams
    c.budgets = ("flat", *(f"visit-{percent}" for percent in visited))
    return c


def _model(c, leaves: int) -> None:
    """Set DistilBERT without a head, and one level of EHI's indexer for both sides."""
    c.tower.name = "sentence-transformers/msmarco-distilbert-cos-v5"
    c.tower.shape = ml_collections.ConfigDict(DISTILBERT)
    c.tower.trainable = "all"
    c.tower.dtype = "bfloat16"  # for products; parameters stay float32
    c.tower.query_length = 32 if leaves > 5000 else 64
    c.tower.document_length = 128 if leaves > 5000 else 256
    c.pseudo.per_document = c.pseudo.synthetic = 0
    c.head.hidden = 0
    c.tree.kind = "per_level"
    c.tree.height = 1
    c.tree.branching = leaves
    c.tree.query_router = False
    c.tree.start = "random"


def _phase(phase, batch_size: int, steps: int, tower_rate: float) -> None:
    """Set epochs over the labelled pairs, with in-batch negatives."""
    for fields in (phase.losses, phase.rates, phase.sources):
        for field in fields:
            fields[field] = 0.0
    phase.steps, phase.batch_size, phase.pool = steps, batch_size, batch_size
    phase.losses.semantic_hinge = 1.0
    phase.rates.tower = tower_rate
    phase.sources.labelled = 1.0
    phase.warmup = steps // 20
    phase.decay = "linear"
    phase.revive_every = 0
    phase.log_every, phase.checkpoint_every = 20, 500
