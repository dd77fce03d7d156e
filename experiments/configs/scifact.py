"""SciFact (BEIR): scientific claim -> abstract.

    python -m experiments.main --config=experiments/configs/scifact.py --workdir=runs/s

181 of its 283 relevant test documents are also answers in its train split, so most test
queries ask for documents seen in training. Choose with `--config.split=dev`, which
carves a dev split out of train by document; rows of `test` train on all of train.

`:finetune` (see `experiments.ablations`) trains tower, tree and leaves together in the
one jitted step, for 300 and 150 steps. In each step the tower reads 32 queries of 32
tokens, and their documents of 128 tokens.

Hardware, time: 2 CPU cores; with a frozen tower 8 minutes, 4 of them for encoding;
`:finetune` 30 minutes on one core. Expected nDCG@10 on test, seeds 0-2: zero-shot .645,
dense .798; ehi .789 at 10% visited and .781 at 5%; joint-pq .791 at 64x; ehi-pq .789 at
10% and 64x. `:finetune`, seed 0: dense .794, ehi-pq .760, its separate row .749.
"""

import ml_collections

from experiments.ablations import apply_variant
from experiments.configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the experiment; `variant` is '' or one of `experiments.ablations`."""
    c = base.get_config()
    c.dataset = "beir/scifact"
    # The labelled positives, beside the distilled ranking: most test queries ask for
    # documents that are answers in train, and this loss ranks those higher. A dev split
    # by document cannot show that, so 0.1 and 0 were compared on train queries held out
    # by query (joint-pq at 64x: .787, .772), never on test.
    c.joint.losses.quantised = 0.1
    # Published methods on the same held-out queries at 64x, where OPQ has .768. jpq:
    # .775 with a tenth of the queries labelled, .801 with half. repconc: .775 with
    # squared error 1, .784 with 0.1, .787 with a head rate of 3e-4 too. poeem at 10%
    # visited: .718 as in `recipes.poeem`, .703 with less distortion or a faster head.
    for phase in (c.jpq, c.repconc_jpq):
        phase.sources.labelled = phase.sources.pseudo = 0.5
    c.repconc.losses.codebook = c.repconc.losses.commitment = 0.1
    c.repconc.rates.head = 3e-4
    return apply_variant(c, variant)
