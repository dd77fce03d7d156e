"""Documents in clusters, and the baseline of each library, built once for all tests."""

import numpy as np
import pytest

from ehi.eval.baselines.build import build_baseline

NUM_DOCS, WIDTH, LISTS = 1000, 64, 16
SIZES = {
    "faiss-flat": {},
    "faiss-ivf": {"num_leaves": LISTS},
    "faiss-pq": {"code_bytes": 8},
    "faiss-opq": {"code_bytes": 8},
    "faiss-ivfpq": {"num_leaves": LISTS, "code_bytes": 8},
    "faiss-opq-ivfpq": {"num_leaves": LISTS, "code_bytes": 8},
    "lsh": {"code_bytes": 16},
    "itq-lsh": {"code_bytes": 8},
    "faiss-hnsw": {},
    "faiss-hnsw-sq": {},
    "faiss-hnsw-pq": {"code_bytes": 8},
    "faiss-fastscan": {"code_bytes": 8},
    "linear-router": {"num_leaves": LISTS},
    "linear-router-opq": {"num_leaves": LISTS, "code_bytes": 8},
    "binary-int8": {"code_bytes": 8},
    "faiss-rabitq": {"code_bytes": 14},
    "faiss-ivfrabitq": {"num_leaves": LISTS, "code_bytes": 14},
    "faiss-rq": {"code_bytes": 4},
    "faiss-lsq": {"code_bytes": 8},
    "faiss-prq": {"code_bytes": 8},
    "faiss-pca-pq": {"code_bytes": 8},
    "faiss-sq": {"code_bytes": 16},
    "scann": {"num_leaves": LISTS, "code_bytes": 8},
}
WITH_LISTS = [name for name, sizes in SIZES.items() if "num_leaves" in sizes]


def clustered(rows, seed):
    """Unit rows in clusters whose spectrum falls, like text embeddings."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, WIDTH + 1) ** -0.6
    centres = rng.normal(size=(20, WIDTH)) * spectrum
    turn = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    rng = np.random.default_rng(seed)
    x = centres[rng.integers(0, 20, rows)]
    x = (x + 0.8 * rng.normal(size=(rows, WIDTH)) * spectrum) @ turn
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


DOCUMENTS, QUERIES = clustered(NUM_DOCS, 1), clustered(50, 2)
EXACT = np.argsort(-(QUERIES @ DOCUMENTS.T), axis=1, kind="stable")
BUILT = {}


def skip_without_library(name):
    pytest.importorskip("scann" if name == "scann" else "faiss")


def built(name, **changes):
    """A baseline of the documents above, built once for all tests."""
    skip_without_library(name)
    key = (name, *((n, id(v) if n == "queries" else v) for n, v in changes.items()))
    if "options" in changes:  # pairs, so that they can be a part of the key
        changes["options"] = dict(changes["options"])
    if key not in BUILT:
        BUILT[key] = build_baseline(name, DOCUMENTS, **{**SIZES[name], **changes})
    return BUILT[key]


def recall(hits, k=10):
    pairs = zip(hits.rows[:, :k], EXACT[:, :k], strict=True)
    return np.mean([len(np.intersect1d(found, wanted)) / k for found, wanted in pairs])
