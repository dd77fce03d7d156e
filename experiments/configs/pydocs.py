"""Semantic search over Python's own standard library: docstring summary -> function.

    python -m experiments.main --config=experiments/configs/pydocs.py \\
        --workdir=runs/pydocs

Needs no data set: the functions are parsed from the Python that runs this. `:smoke` is
the same in a minute, for CI: a few steps and systems, numbers of no meaning.

Hardware, time: 2 CPU cores (AMD EPYC), 4 minutes after the weights' download.
Expected nDCG@10 on test (seeds 0-2): dense .625; at 2 / 5 / 10% visited ehi .573 / .607
/ .618 against .522 / .582 / .601 of the k-means tree; joint-pq .613 at 32x and .593 at
64x against .603 and .574 of OPQ; ehi-pq .596 at 10% and 64x against .566. `:finetune`
(the tower trained too; 25 minutes on a core): dense .643, ehi-pq .603 against .573.
"""

import ml_collections

from experiments.ablations import apply_variant
from experiments.configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The main experiment; `variant` is '', 'smoke' or of `experiments.ablations`."""
    c = base.get_config()
    c.dataset = "pydocs"
    c.tower.document_length = 128  # better on dev, zero-shot, than 192: .537, .524
    c.pseudo.kinds = ("title", "span")
    if variant == "smoke":
        c.tower.document_length = 32
        c.pseudo.per_document = 1
        c.dense.steps = c.joint.steps = 20
        c.systems = ("dense-zero-shot", "dense", "kmeans-tree-opq", "ehi-pq")
        c.budgets = ("flat", "visit-10-64x")
        return c
    return apply_variant(c, variant)
