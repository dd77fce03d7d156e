"""Semantic search over Python's own standard library: docstring summary -> function.

    python -m experiments.main --config=experiments/configs/pydocs.py \\
        --workdir=runs/pydocs

Needs no data set: the functions are parsed from the Python that runs this. `:smoke`
takes a minute, for CI: few steps and systems, and meaningless numbers.

Hardware, time: 2 CPU cores (AMD EPYC), 4 minutes after the download of the weights.
Expected nDCG@10 on test, seeds 0-2, by recipe 3 (recipe 4 has no test records yet):
dense .625. At 2 / 5 / 10% visited, ehi .573 / .607
/ .618 and the k-means tree .522 / .582 / .601. At 32x and 64x, joint-pq .613 and .593,
OPQ .603 and .574. At 10% and 64x, ehi-pq .596 and its separate row .566. `:finetune`
also trains the tower (25 minutes on one core): dense .643, ehi-pq .603, its separate
row .573.
"""

import ml_collections

from experiments.ablations import apply_variant
from experiments.configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the experiment; `variant` is '', 'smoke' or one of `ablations`."""
    c = base.get_config()
    c.dataset = "pydocs"
    c.tower.document_length = 128  # zero-shot on dev: .537, with 192 tokens .524
    c.pseudo.kinds = ("title", "span")
    if variant == "smoke":
        c.tower.document_length = 32
        c.pseudo.per_document = 1
        c.dense.steps = c.joint.steps = 20
        c.systems = ("dense-zero-shot", "dense", "kmeans-tree-opq", "ehi-pq")
        c.budgets = ("flat", "visit-10-64x")
        return c
    return apply_variant(c, variant)
