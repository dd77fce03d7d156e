"""SciFact (BEIR): scientific claim -> abstract.

    python -m experiments.main --config=experiments/configs/scifact.py --workdir=runs/s

181 of its 283 relevant test documents are answers in its train split too, so most of
its test asks for documents seen in training. Choices are made with
`--config.split=dev`, which carves a dev split out of train by document; the rows of
`test` train on all of train.

`:finetune` trains the tower, the tree and the leaves together in the one jitted step,
300 steps of 32 queries, 32 and 128 tokens.

Hardware, time: 2 CPU cores; frozen tower about 12 minutes, `:finetune` about 40.
"""

import ml_collections

from experiments.configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The experiment; `variant` is '' (tower frozen) or 'finetune'."""
    c = base.get_config()
    c.dataset = "beir/scifact"
    if variant == "finetune":
        _finetune(c)
    elif variant:
        raise ValueError(f"unknown variant {variant!r} of scifact; allowed: 'finetune'")
    return c


def _finetune(c) -> None:
    c.variant = "finetune"
    c.tower.trainable = "all"
    c.tower.query_length = 32
    c.tower.document_length = 128
    for phase in (c.dense, c.joint):
        phase.steps = 300
        phase.batch_size = 32
        phase.pool = 64  # the batch's positives and as many mined negatives
        phase.rates.tower = 2e-5
        phase.refresh = 150
        phase.mined_per_query = 1
        phase.mined_beam = 16
        phase.warmup = 30
        phase.log_every = 10
        phase.checkpoint_every = 50
    # The other sources are made of cached tower outputs, which a trained tower has not.
    c.joint.sources.documents = c.joint.sources.synthetic = 0.0
    c.systems = ("dense", "kmeans-tree-opq", "ehi-pq")
    c.budgets = ("flat", "visit-10-64x")
