"""Your own data: a BEIR folder or zip, or another layout of experiments/README.md#data.

    python -m experiments.main --config=experiments/configs/own.py \\
        --config.dataset=PATH --workdir=runs/own

Without train qrels, the training pairs are pseudo-queries only (titles, sentences,
spans). Without queries, the index is built and shown but not scored. To index another
corpus, or to score another split, with the trained parameters:

    python -m experiments.main --config=experiments/configs/own.py \\
        --config.dataset=OTHER --checkpoint=runs/own --workdir=runs/other

Phases get longer in proportion to the corpus above 6,144 documents, up to 5 times;
--config.corpus_of_steps=0 turns this off. The tree has at most 2 sqrt(documents) leaves
unless --config.tree.branching is set. From about a million documents on,
--config.tree.height=2 routes faster.

Hardware, time: 2 CPU cores; `pydocs.py` takes 4 minutes for 5,212 short documents.
Expected nDCG@10 on 20,000 functions of Python packages (a folder that is not in the
repository; 3,176 dev queries, seed 0): dense .600 with 400 steps, .608 with 1,600. On
the former, at 10% visited and 64x: ehi-pq .521 with 400 steps and .535 with 1,200, the
k-means tree with OPQ .493.
"""

import ml_collections

from experiments.ablations import apply_variant
from experiments.configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the experiment; `variant` is '' or one of `experiments.ablations`."""
    c = base.get_config()
    c.corpus_of_steps = 6144
    c.leaves.num_codewords = 0  # 256, or 16 for fewer documents
    c.dataset = ""  # required: --config.dataset=PATH
    return apply_variant(c, variant)
