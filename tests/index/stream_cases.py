"""Shards of one corpus, and the kinds of index that they are built into."""

import itertools
from pathlib import Path

import index_reference as reference
import numpy as np

from ehi.index import build_index, save_index
from ehi.index.stream import Shard

WIDTH, NUM = 4, 500
RNG = np.random.default_rng(3)
X = RNG.standard_normal((NUM, WIDTH)).astype(np.float32)
X /= np.linalg.norm(X, axis=1, keepdims=True)
IDS = [f"dök/{i}" for i in range(NUM)]
TREE = reference.make_tree("per_node", 2, 3, WIDTH, RNG, hidden=3)
CUTS = [0, 120, 120, 121, 400, NUM]  # one shard is empty, one holds one document
PQ = {
    "codebooks": RNG.standard_normal((2, 16, 2)).astype(np.float32),
    "assign_codebooks": RNG.standard_normal((2, 16, 2)).astype(np.float32),
    "rotation": reference.make_rotation(WIDTH, RNG),
    "leaf_centroids": RNG.standard_normal((9, WIDTH)).astype(np.float32),
}
KINDS = {
    "raw": {"tree": TREE},
    "half": {"tree": TREE, "leaf_dtype": "float16", "spill": 2},
    "flat": {"tree": None, "rerank_vectors": True},
    "level": {"tree": reference.make_tree("per_level", 2, 3, WIDTH, RNG), "spill": 3},
    "pq": {
        "tree": TREE,
        "query_tree": reference.make_tree("per_node", 2, 3, WIDTH, RNG),
        "spill": 2,
        "rerank_vectors": True,
        "encoder": {"tower": "abc"},
        "config": {"hash": "def"},
        "query_head": {"projection": RNG.standard_normal((3, WIDTH))},
        **PQ,
    },
    "l2": {"tree": TREE, "score": "l2", **PQ},
    "cosine": {"tree": TREE, "spill": 2, "score": "cosine", **PQ},
    "corrected": {
        "tree": TREE,
        "score": "corrected",
        "rerank_vectors": True,
        "codebooks": RNG.standard_normal((2, 256, 2)).astype(np.float32) / 2,
    },
}


def make_blocks_small(monkeypatch):
    """Lowers every limit so far that it is reached."""
    limits = {
        "shards._BLOCK_ROWS": 37,
        "sorting._BAND_BYTES": 256,
        "sorting._SOME_IDS": 50,
        "sorting._REGION_IDS": 64,
    }
    for name, value in limits.items():
        monkeypatch.setattr(f"ehi.index.stream.{name}", value)


def make_shards(x=X, all_ids=IDS, **changes):
    """Shards of all rows; `changes` are of shard 3, rows 121 to 399."""
    shards = [
        {"embeddings": x[start:stop], "ids": all_ids[start:stop]}
        for start, stop in itertools.pairwise(CUTS)
    ]
    shards[3] |= changes
    return [Shard(**shard) for shard in shards]


def bytes_of(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def saved(path, documents=None, x=X, ids=IDS, **parameters):
    save_index(build_index(x, ids, **parameters), path, documents)
    return bytes_of(path)
