"""Your own data: any BEIR folder or zip (corpus.jsonl; queries and qrels if you have).

    python -m experiments.main --config=experiments/configs/own.py \\
        --config.dataset=PATH --workdir=runs/own

Without train qrels the pairs are pseudo-queries only (titles, sentences, spans).
Without queries nothing is scored: the index is built and shown. Index another corpus or
score another split with what was trained:

    python -m experiments.main --config=experiments/configs/own.py \\
        --config.dataset=OTHER --checkpoint=runs/own --workdir=runs/other

Both sides of `dense` are held near the encoder: a corpus teaches its own questions, and
what it makes a head forget is missed by all others. nDCG@10 on dev, exact search, means
of seeds 0-2, the tower frozen; documents of dev answer no train query, except in the
last column, SciFact's train queries held out by query:

                                    pydocs  squad-dev  scifact   by query
    the encoder itself               .537     .776      .703       .680
    query_anchor 0, rate 1e-3        .608     .765      .671       .805
    query_anchor 6, rate 5e-3        .612     .780      .708       .805
    ... and no labels                .568     .782      .711

The second line is what `pydocs.py` and `scifact.py` still train and what
their records are of (recipe 1); the third is recipe 2.

The tree has at most 2 sqrt(documents) leaves unless --config.tree.branching says
otherwise; from about a million documents on, --config.tree.height=2 routes faster.
"""

import ml_collections

from experiments.configs import base
from experiments.variants import apply_variant


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The experiment; `variant` is '' or of `experiments.variants`."""
    c = base.get_config()
    c.dataset = ""  # required: --config.dataset=PATH
    c.recipe = 2
    # The anchor keeps a head from going far, not from going: a higher rate gets back
    # what it costs where much is to be learned.
    c.dense.losses.query_anchor = 6.0
    c.dense.rates.head = 5e-3
    return apply_variant(c, variant)
