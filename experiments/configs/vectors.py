"""Your own vectors: a folder of .npy files, an ann-benchmarks HDF5 file, or parquet.

    python -m experiments.main --config=experiments/configs/vectors.py \\
        --config.dataset=PATH --workdir=runs/v

`PATH` is described in `ehi.data.vectors.dataset`. No tower, tokeniser or text is
loaded. The teacher of every system is exact search of the given vectors, and the
records have recall against it (`exact_recall@10`) beside nDCG.

Our joint phases leave the embeddings as they are; `--config.joint.rates.head=3e-4`
trains them too. Expected recall@10 at 10% visited and 64x, seed 0, held-out queries of
dev, after 200 short steps: 10,000 x 64 vectors of a mixture, ehi-pq .661, the k-means
tree with OPQ .654; 5,660 MiniLM embeddings of pydocs, .751 and .737, but recall@100
.682 and .693.

`--config.vectors.metric` is 'cosine', 'ip' or 'l2'; it may be left out for unit vectors
and for files that state it. `--config.head.kind=none` leaves the embeddings of every
system as they are, those of jpq and distill-vq included.
"""

import ml_collections

from ehi.train import recipes
from experiments.ablations import apply_variant
from experiments.configs import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the experiment; `variant` is '' or one of `experiments.ablations`."""
    c = base.get_config()
    c.corpus_of_steps = 6144
    c.leaves.num_codewords = 0  # 256, or 16 for fewer documents
    c.dataset = ""  # required: --config.dataset=PATH
    c.sizes.width = 0  # with --dry_run and sizes.documents
    c.vectors = ml_collections.ConfigDict()
    c.vectors.metric = ""  # 'cosine', 'ip' or 'l2'; '': unit vectors, or as stated
    c.head.kind = "residual"  # or 'none'
    c.pseudo.per_document = 0  # there is no text to make them of
    # `dense` is the given vectors: nothing is a better teacher of their neighbours.
    # With judgements, 400 steps train a head on them first.
    c.dense.steps = 0
    c.joint = ml_collections.ConfigDict(recipes.vectors())
    c.leaves.score = "cosine"  # of every system, see `recipes.vectors`
    # `dense-zero-shot` would be the given vectors too.
    c.systems = tuple(name for name in c.systems if name != "dense-zero-shot")
    return apply_variant(c, variant)
