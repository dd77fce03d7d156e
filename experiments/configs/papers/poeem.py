"""Poeem as published: an index that an item tower learns, for recommendation.

    python -m experiments.main --workdir=runs/paper-poeem-movielens \\
        --config=experiments/configs/papers/poeem.py:movielens-1m

Arguments: movielens-1m, amazon-books. A query is the titles of the items that a user
liked last; a document is the title and genres of an item (`ehi/data/ratings.py`). Add
--dry_run for memory, shapes and time without data or weights.

Method: Zhang et al. 2021, arXiv 2105.03933. The paper's tables, towers and data
preparation were not found. Coarse centroids, codewords, subspaces, warm-up and buffer
are the defaults of the authors' code (github.com/jdcomsearch/poeem). Batch size,
temperature, epochs and the weight 1 of the distortion are those of its tutorial, which
uses synthetic data and Adagrad at 0.1. A text tower with Adam needs other learning
rates, so these are ours, as are the tower and the lengths. The rotation learns by
Givens descent, as in the paper but not in its code; --config.leaves.rotation=learned is
the Cayley map.

Data: movielens-1m is found in EHI_DATA (folder or zip `ml-1m`) or downloaded;
amazon-books is a folder of that name in EHI_DATA with ratings.csv and metadata.jsonl.
Its sizes are for planning; see `c.from_memory`.
Hardware: one accelerator. By the formula of --dry_run, amazon-books also takes 6.3 GiB
of the host's memory and 46 GiB of disk. Time: see --dry_run.
Expected: unknown. On synthetic data the authors report precision@100 of .9805; Faiss
built after training has .9610 and exact search .9989.
"""

import ml_collections

from experiments.configs import base

# Documents, and the approximate number of train queries, from memory. Every liked item
# of a user except the first and the last two is an example.
DATA_SETS = {"movielens-1m": (3_883, 557_000), "amazon-books": (2_330_000, 8_000_000)}
MINILM = {
    "vocab_size": 30522,
    "width": 384,
    "num_layers": 6,
    "num_heads": 12,
    "mlp_width": 1536,
    "max_positions": 512,
    "type_vocab_size": 2,
}
COARSE, CODEWORDS, SUBSPACES = 128, 16, 32  # their coarse_K, K, D
BATCH, EPOCHS = 128, 3
WARMUP_STEPS, BUFFER = 1024, 8192


def get_config(name: str = "movielens-1m") -> ml_collections.ConfigDict:
    """Return Poeem on a data set of `DATA_SETS`."""
    if name not in DATA_SETS:
        raise ValueError(
            f"unknown argument {name!r} of papers/poeem.py; allowed: "
            f"{', '.join(DATA_SETS)}"
        )
    documents, queries = DATA_SETS[name]
    c = base.get_config()
    c.dataset, c.variant = name, "paper"
    c.sizes = ml_collections.ConfigDict(
        {"documents": documents, "train_queries": queries}
    )
    c.from_memory = ("sizes.documents", "sizes.train_queries")
    c.tower.shape = ml_collections.ConfigDict(MINILM)
    c.tower.trainable = "all"
    c.tower.dtype = "bfloat16"  # for products; parameters stay float32
    c.tower.query_length, c.tower.document_length = 128, 32  # ten titles; one title
    c.pseudo.per_document = c.pseudo.synthetic = 0
    c.head.hidden = 0
    c.tree.height, c.tree.branching = 1, COARSE
    c.leaves.num_codewords = CODEWORDS
    c.leaves.rotation = "givens"
    for name in c.joint.sources:  # `joint` is checked, though it does not train here
        c.joint.sources[name] = float(name == "labelled")
    c.dense.steps = 0  # Poeem has a warm-up of its own
    buffered = -(-BUFFER // BATCH)  # steps
    _train(c.poeem_warmup, WARMUP_STEPS + buffered, {"tower": 2e-5})
    rates = {"tower": 2e-5, "router": 3e-4, "rotation": 2e-4, "quantiser": 3e-4}
    _train(c.poeem, EPOCHS * (queries // BATCH), rates)
    c.poeem_warmup.losses.semantic = 1.0
    c.poeem_warmup.buffer = BUFFER
    c.poeem.losses.quantised = c.poeem.losses.reconstruction = 1.0
    c.poeem.start = "buffer"
    c.systems = ("dense-zero-shot", "poeem")
    compression = 8 * 4 * MINILM["width"] // (4 * SUBSPACES)  # codes of 4 bits
    c.budgets = ("flat", f"visit-10-{compression}x")
    return c


def _train(p, steps: int, rates: dict) -> None:
    """A section: in-batch softmax on labelled pairs, at cosine times 30."""
    p.steps, p.batch_size, p.pool = steps, BATCH, BATCH
    for fields, kept in (
        (p.losses, {}),
        (p.rates, rates),
        (p.sources, {"labelled": 1.0}),
        (p.source_weights, {"labelled": 1.0}),
    ):
        for field in fields:
            fields[field] = kept.get(field, 0.0)
    p.temperature = 1 / 30
    p.warmup = 100
    p.log_every, p.checkpoint_every = 50, 1000
