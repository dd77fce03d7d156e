"""JPQ as published: query tower and codebooks by LambdaRank on the whole index.

    python -m experiments.main --config=experiments/configs/papers/jpq.py:passage-48 \\
        --workdir=runs/paper-jpq-passage-48

Arguments: passage-M or document-M for M = 16, 24, 32, 48, 64, 96 bytes per document.
With `-star` after it, the encoder is the paper's own instead of TAS-B. Add --dry_run
for memory, shapes and time without data or weights.

Method: Zhan et al. 2021, arXiv 2108.00644. Rates, schedule, batch, epochs, cut and
depth are those of the authors' code (github.com/jingtaozhan/JPQ: README and
jpq/run_train.py); the fields of `c.from_memory` are from memory. One deviation:
embeddings have unit length here; the paper ranks by plain inner products.

Encoder: TAS-B, a DistilBERT with CLS pooling, by hub id. The paper's STAR is a
RoBERTa-base with a linear layer and a layer norm on top; we know no hub id of it.
`-star` has its shape, so that it dry-runs. To train, give --config.tower.name=FOLDER
with
    config.json and model.safetensors of STAR, as the authors' download has it (given
        its pytorch_model.bin, the error says how to convert that);
    vocab.json and merges.txt of roberta-base;
    tokenizer_config.json, {"add_prefix_space": true}: STAR was trained on the tokens
        of transformers 2, which puts a space before a text (star_tokenizer.py in
        github.com/jingtaozhan/DRhard).
Data: MS MARCO passage is the public BEIR set `msmarco`, or a folder of that name in a
folder of EHI_DATA with MS MARCO's own tables (collection.tsv, ...); documents are such
a folder `msmarco-document` (msmarco-docs.tsv, msmarco-doctrain-queries.tsv, ...).
Hardware: one accelerator. By the formula of --dry_run, passage-48 also takes 3.5 GiB of
the host's memory and 79 GiB of disk, document-48 2.3 and 29 GiB; the search of a step
keeps all codes on the device. Time: the paper reports under 2 hours per epoch on one
GPU of 2021.
Expected with STAR for M = 16, 24, 32, 48, 64, 96, read off the authors' figures: MRR@10
on passage dev .273 .305 .317 .332 .338 .341, MRR@100 on document dev .336 .356 .374
.384 .395 .401. With TAS-B on passages: .320 at 48 and .331 at 64 (README of RepCONC,
whose JPQ has a softmax loss).
"""

import ml_collections

from experiments.configs import base
from experiments.configs.papers.ehi import DISTILBERT

# Bytes per document -> learning rate of the codebooks (README of the authors' code).
RATES = {16: 5e-6, 24: 5e-6, 32: 2e-5, 48: 1e-4, 64: 1e-4, 96: 1e-4}
# Data set, documents and train pairs (from memory), tokens per document, lambda_cut.
TASKS = {
    "passage": ("beir/msmarco", 8_841_823, 532_761, 256, 200),
    "document": ("beir/msmarco-document", 3_213_835, 367_013, 512, 10),
}
# Suffix -> name and shape of the tower. Both pool the first token.
TOWERS = {
    "": (
        "sentence-transformers/msmarco-distilbert-base-tas-b",
        DISTILBERT | {"pooling": "cls", "normalise": False},
    ),
    "-star": (
        "star",
        {
            "vocab_size": 50265,
            "width": 768,
            "num_layers": 12,
            "num_heads": 12,
            "mlp_width": 3072,
            "max_positions": 512,  # the checkpoint has 514; two are reserved
            "type_vocab_size": 1,
            "norm_eps": 1e-5,
            "pooling": "cls",
            "normalise": False,
            "projection": True,
        },
    ),
}
EPOCHS, BATCH = 6, 32
FROM_MEMORY = ("sizes.documents", "sizes.train_queries")
ARGUMENTS = tuple(
    f"{task}-{m}{tower}" for task in TASKS for m in RATES for tower in TOWERS
)


def get_config(name: str = "passage-96") -> ml_collections.ConfigDict:
    """Return JPQ on a task with M bytes per document; `name` is one of `ARGUMENTS`."""
    if name not in ARGUMENTS:
        raise ValueError(
            f"unknown argument {name!r} of papers/jpq.py; allowed: "
            f"{', '.join(ARGUMENTS)}"
        )
    task, m, *star = name.split("-")
    m = int(m)
    dataset, documents, pairs, length, cut = TASKS[task]
    c = base.get_config()
    c.dataset, c.split, c.variant = dataset, "dev", "paper"
    c.sizes = ml_collections.ConfigDict(
        {"documents": documents, "train_queries": pairs}
    )
    c.from_memory = FROM_MEMORY
    c.tower.name, shape = TOWERS["-star" if star else ""]
    c.tower.shape = ml_collections.ConfigDict(shape)
    c.tower.trainable = "all"
    c.tower.dtype = "bfloat16"  # for products; parameters stay float32
    c.tower.query_length, c.tower.document_length = 32, length
    c.pseudo.per_document = c.pseudo.synthetic = 0
    c.head.hidden = 0
    for name in c.joint.sources:  # `joint` is checked, though it does not train here
        c.joint.sources[name] = float(name == "labelled")
    c.leaves.score = "ip"  # as the paper's index
    c.dense.steps = 0  # documents are encoded by the checkpoint itself
    _train(c.jpq, EPOCHS * (pairs // BATCH), RATES[m], cut)
    c.systems = ("dense", "opq", "jpq")
    c.budgets = ("flat", f"flat-{4 * shape['width'] // m}x")
    return c


def _train(p, steps: int, codebook_rate: float, cut: int) -> None:
    """Set the section `jpq` to what `run_train.py` has, on labelled queries only."""
    p.steps, p.batch_size, p.pool = steps, BATCH, BATCH
    for fields, kept in (
        (p.losses, {"lambda_rank": 1.0}),
        (p.rates, {"query_tower": 5e-6, "quantiser": codebook_rate}),
        (p.sources, {"labelled": 1.0}),
    ):
        for field in fields:
            fields[field] = kept.get(field, 0.0)
    p.warmup, p.decay = 2000, "linear"
    p.weight_decay, p.clip = 0.01, 1.0
    p.lambda_cut, p.top_k = cut, 200
    p.temperature = 1.0  # plain scores
    p.log_every, p.checkpoint_every = 50, 1000
