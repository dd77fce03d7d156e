"""Indexes of both kinds and how to compare them, for the tests with Faiss.

A test file that imports this one is skipped where Faiss is not installed.
"""

import index_reference as reference
import numpy as np
import pytest

from ehi.index import build_index
from ehi.index.search.codes import SCORES

faiss = pytest.importorskip("faiss")

WIDTH, BRANCHING = 16, 3
LEAVES = ["raw", "half"] + [
    f"{bits}-bit{parts}"
    for bits in (8, 4)
    for parts in ("", " rotated", " residual", " rotated residual")
]
L2 = [f"{leaf} l2" for leaf in LEAVES if "bit" in leaf]
FACTORED = ["8-bit cosine", "4-bit rotated residual corrected"]

NUM = 700
RNG = np.random.default_rng(11)
X = RNG.standard_normal((NUM, WIDTH)).astype(np.float32)
X += 2 * X[RNG.integers(12, size=NUM)]
QUERIES = X[:50] + RNG.standard_normal((50, WIDTH)).astype(np.float32)
PRODUCT = faiss.METRIC_INNER_PRODUCT


def make(leaf, kind="per_node", height=2, spill=1, strings=False, own=True, seed=0):
    """(Index of a first segment, 60 more embeddings, a name for each row, queries)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32) / 2

    num_leaves = BRANCHING**height
    tree = query_tree = None
    if height:
        tree = reference.make_tree(kind, height, BRANCHING, WIDTH, rng, hidden=3)
        query_tree = reference.make_tree(kind, height, BRANCHING, WIDTH, rng)
    parts = {"leaf_dtype": "float16" if leaf == "half" else "float32"}
    if "bit" in leaf:
        parts["codebooks"] = normal(8, 16 if leaf[0] == "4" else 256, 2)
    if "rotated" in leaf:
        parts["rotation"] = reference.make_rotation(WIDTH, rng)
    if "residual" in leaf:
        parts["leaf_centroids"] = normal(num_leaves, WIDTH)
    scores = [score for score in SCORES if leaf.endswith(score)]
    parts["score"] = scores[0] if scores else "ip"
    names = [f"d{row}" if strings else 7 * row + 1 for row in range(100)]
    x = normal(100, WIDTH) * 2
    if parts["score"] in ("cosine", "corrected"):
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    index = build_index(
        x[:40], names[:40], tree=tree, query_tree=query_tree if own else None,
        spill=min(spill, num_leaves), **parts,
    )  # fmt: skip
    return index, x[40:], names, normal(9, WIDTH)


def update(index, more, names):
    """Adds two segments and deletes some documents of each."""
    index.add(more[:35], names[40:75])
    index.add(more[35:], names[75:])
    index.delete([names[row] for row in (0, 3, 39, 40, 70, 99)])


def assert_same(hits, ids, scores, tolerance=1e-4):
    assert ids.shape == hits.ids.shape and ids.dtype == hits.ids.dtype
    assert (ids == hits.ids).all()
    finite = np.isfinite(hits.scores)
    assert (np.isfinite(scores) == finite).all()
    assert np.isneginf(scores[~finite]).all()
    np.testing.assert_allclose(scores[finite], hits.scores[finite], atol=tolerance)


def one_level(leaf, x, rng):
    """An Index of 8 leaves; if it has centroids, they are the nodes."""
    nodes = x[:8]
    parts = {}
    if "bit" in leaf:
        parts["codebooks"] = rng.standard_normal((8, 256, 2)).astype(np.float32) / 2
        parts["rotation"] = reference.make_rotation(WIDTH, rng)
        parts["leaf_centroids"] = nodes
    tree = {"kind": "per_node", "nodes": [nodes[None]], "scale": 2.0}
    return build_index(x, range(len(x)), tree=tree, **parts)


def searched(index, queries, k, nprobe):
    """Faiss's own search: scores, padded with -inf, and ids."""
    options = faiss.SearchParametersIVF(nprobe=nprobe)
    if isinstance(index, faiss.IndexPreTransform):
        options = faiss.SearchParametersPreTransform(index_params=options)
    if isinstance(index, faiss.IndexFlat):
        options = None
    scores, ids = index.search(queries, k, params=options)
    return np.where(ids < 0, -np.inf, scores), ids


def trained(recipe, ids=None, add=True):
    index = faiss.index_factory(WIDTH, recipe, PRODUCT)
    index.train(X)
    if add and ids is None:
        index.add(X)
    elif add:
        index.add_with_ids(X, ids)
    return index
