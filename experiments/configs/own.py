"""Your own data: any BEIR folder or zip (corpus.jsonl; queries and qrels if you have).

    python -m experiments.main --config=experiments/configs/own.py \\
        --config.dataset=PATH --workdir=runs/own

Without train qrels the pairs are pseudo-queries only (titles, sentences, spans).
Without queries nothing is scored: the index is built and shown. Index another corpus or
score another split with what was trained:

    python -m experiments.main --config=experiments/configs/own.py \\
        --config.dataset=OTHER --checkpoint=runs/own --workdir=runs/other

All phases are as much longer as the corpus is larger than 6,144 documents, up to 5
times (--config.corpus_of_steps=0: as they are, whatever its size).

The tree has at most 2 sqrt(documents) leaves unless --config.tree.branching says
otherwise; from about a million documents on, --config.tree.height=2 routes faster.
"""

import ml_collections

from experiments.ablations import apply_variant
from experiments.configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The experiment; `variant` is '' or of `experiments.ablations`."""
    c = base.get_config()
    # nDCG@10 on 20,000 functions of Python packages (a folder that is not in the
    # repository; 3,176 dev queries, seed 0): dense 400 steps .600, 1,600 steps .608;
    # of the shorter one ehi-pq at 10% visited and 64x 400 steps .521, 1,200 steps .535,
    # k-means tree with OPQ .493.
    c.corpus_of_steps = 6144
    c.leaves.num_codewords = 0  # 256, or 16 for fewer documents
    c.dataset = ""  # required: --config.dataset=PATH
    return apply_variant(c, variant)
