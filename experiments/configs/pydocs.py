"""Semantic search over Python's own standard library: docstring summary -> function.

    python -m experiments.main --config=experiments/configs/pydocs.py \\
        --workdir=runs/pydocs

Needs no data set: the functions are parsed from the Python that runs this. `:smoke` is
the same in a minute, for CI: a few steps and systems, numbers of no meaning.

Hardware, time: 2 CPU cores, under 10 minutes after the weights' download.
"""

import ml_collections

from experiments.configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The main experiment; `variant` is '' or 'smoke'."""
    c = base.get_config()
    c.dataset = "pydocs"
    c.tower.document_length = 128
    c.pseudo.kinds = ("title", "span")
    if variant == "smoke":
        c.tower.document_length = 32
        c.pseudo.per_document = 1
        c.dense.steps = c.joint.steps = 20
        c.systems = ("dense-zero-shot", "dense", "kmeans-tree-opq", "ehi-pq")
        c.budgets = ("flat", "visit-10-64x")
    elif variant:
        raise ValueError(f"unknown variant {variant!r} of pydocs; allowed: 'smoke'")
    return c
