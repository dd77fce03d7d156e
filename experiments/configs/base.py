"""The fields of every experiment, in flow order, with the values that all share.

The values were chosen on dev splits (`--config.split=dev`): that of pydocs, and one of
SciFact that is carved out of train by document (`scifact.py` names an exception). The
numbers are nDCG@10, seed 0, recipe 1 (`recipes.dense` without `query_anchor`, and the
same number of leaves for every query):

    ehi on pydocs at 2 / 5 / 10% visited                k-means tree .472 / .549 / .573
      200 joint steps, documents do not follow routes                .487 / .552 / .572
      ... documents do (the gradient of route_distill)               .520 / .567 / .587
      400 joint steps                                                .532 / .574 / .595
      ... and path 0.1 (kept)                                        .536 / .575 / .598
    joint-pq on pydocs at 32x / 64x, 200 steps; OPQ .584 / .560      .590 / .570
    ehi-pq on pydocs at 10% and 64x; k-means tree and OPQ .541
      200 joint steps .558, 400 joint steps .568
    residual codes on SciFact at 10% and 64x    without .599 (separate .549), with .629
      (separate .591): kept, for both sides
"""

import ml_collections

from ehi.train.recipes import RECIPES

INDEX = {
    # What a search shows: 'none', 'title' (title and first line), or 'full', the text.
    "documents": "title",
    # Fields of the documents that a search can filter by; ('*',) for all.
    "metadata": (),
    # Whether `index` carries a frozen tower; other indexes of a run name its hub id.
    "tower": True,
}


def get_config() -> ml_collections.ConfigDict:
    """Return the base config; config files change its fields."""
    c = ml_collections.ConfigDict()
    c.dataset = "pydocs"  # or 'beir/<name>', 'ir_datasets:<ids>', a path; see README
    c.split = "test"  # the evaluated split; use 'dev' to choose
    # Never rank the document with the id of the query, as BEIR does. None: in ArguAna
    # and Quora, and if both have the same text.
    c.ignore_identical_ids = ml_collections.config_dict.placeholder(bool)
    # Sizes of the data set for --dry_run; 0: open the data set and count.
    c.sizes = ml_collections.ConfigDict({"documents": 0, "train_queries": 0})
    c.dev_fraction = 0.2  # part of the train documents, if there is no dev split
    c.seed = 0
    # Larger corpora get more steps per phase than this many documents; 0: never.
    c.corpus_of_steps = 0
    # The most vectors that k-means, OPQ and the start of the router read; 0: 256 for
    # each codeword of a subspace, 128 for each leaf (`ehi.train.starts.sample_sizes`).
    c.fit_sample = 0
    # Workdir of a finished run: train on from its parameters, for this share of the
    # steps of each system's last phase. '': train from the start.
    c.start_from = ""
    c.start_from_steps = 0.1
    # If the tables that steps gather rows from are larger, they stay in files, and rows
    # travel with the batch. Codes that a step searches (jpq) are always on the device.
    c.device_table_gib = 1.0
    c.half_on_disk = False  # tower outputs and embeddings in files are float16
    c.shard_state = False  # each device holds a part of parameters and moments
    c.recipe = 4  # increased when the numbers of a system change
    c.variant = ""  # name of the ablation in the records

    _model(c)
    for name, recipe in RECIPES.items():  # the phases
        c[name] = ml_collections.ConfigDict(recipe())
    c.library_parent = "dense"  # Faiss and ScaNN index the embeddings of this system
    c.systems = (
        "dense-zero-shot",
        "dense",
        "kmeans-tree",
        "opq",
        "kmeans-tree-opq",
        "ehi",
        "joint-pq",
        "ehi-pq",
    )
    c.budgets = (
        "flat",
        "flat-32x",
        "flat-64x",
        "visit-2",
        "visit-5",
        "visit-10",
        "visit-10-64x",
    )
    return c


def _model(c) -> None:
    """Set the fields of tower, pseudo-queries, head, tree and leaves."""
    c.tower = ml_collections.ConfigDict()
    c.tower.name = "sentence-transformers/all-MiniLM-L6-v2"
    # None, for these four: what the files of the model say.
    c.tower.query_prefix = ml_collections.config_dict.placeholder(str)
    c.tower.document_prefix = ml_collections.config_dict.placeholder(str)
    c.tower.pooling = ml_collections.config_dict.placeholder(str)
    c.tower.normalise = ml_collections.config_dict.placeholder(bool)
    c.tower.query_length = 64  # tokens, those of the prefix included
    c.tower.document_length = 256
    c.tower.dtype = "float32"
    c.tower.remat = False  # less memory for a third more work, if the tower trains
    c.tower.trainable = "head"  # 'head', 'last_n' or 'all'
    c.tower.query_tower = False  # a second tower for queries, if it trains
    c.tower.shape = ml_collections.ConfigDict()  # --dry_run needs it without weights

    c.pseudo = ml_collections.ConfigDict()
    c.pseudo.kinds = ("title", "sentence", "span")
    c.pseudo.per_document = 2
    c.pseudo.synthetic = 2  # per document, made in the space of the tower's outputs

    c.head = ml_collections.ConfigDict()
    c.head.width = 0  # D; 0: that of the tower
    c.head.hidden = 512
    c.head.query_head = False  # a second head for queries, in the joint phase

    c.tree = ml_collections.ConfigDict()
    c.tree.kind = "per_node"
    c.tree.height = 1
    c.tree.branching = 0  # 0: for at most 2 sqrt(documents) leaves
    c.tree.scale = 20.0
    c.tree.query_router = True
    c.tree.hidden = 256
    c.tree.spill = 1
    c.tree.start = "kmeans"  # or 'random'
    c.tree.adaptive = True  # visit probable leaves; False: the same number always

    c.leaves = ml_collections.ConfigDict()
    c.leaves.num_codewords = 256
    c.leaves.rotation = "learned"
    c.leaves.residual = True
    c.leaves.frozen_codes = False  # documents keep their first codes (JPQ)
    c.leaves.codeword_gradient = True  # ranking losses change the codewords
    # Score of quantised documents: 'ip', 'l2', 'cosine' or 'corrected' (see
    # `ehi.model.score`). '': the choice of each system, in `experiments/systems.py`.
    c.leaves.score = ""

    c.index = ml_collections.ConfigDict(INDEX)
