"""Kinds of index to update, and a comparison of what two of them answer."""

import index_reference as reference
import numpy as np

from ehi.index import build_index

WIDTH, NUM, BRANCHING = 8, 40, 3
RNG = np.random.default_rng(3)
X = RNG.standard_normal((400, WIDTH)).astype(np.float32)
QUERIES = RNG.standard_normal((6, WIDTH)).astype(np.float32)
TREE = reference.make_tree("per_node", 2, BRANCHING, WIDTH, RNG)
# With 256 codewords no two documents have the same code. Scores of equal codes may
# differ in the last bit if products have other shapes, and so may their order.
QUANTISED = {
    "codebooks": RNG.standard_normal((4, 256, 2)).astype(np.float32) / 2,
    "rotation": reference.make_rotation(WIDTH, RNG),
    "leaf_centroids": RNG.standard_normal((9, WIDTH)).astype(np.float32),
}
KINDS = {
    "raw": {},
    "half": {"leaf_dtype": "float16"},
    "pq": QUANTISED,
    "spilled": {**QUANTISED, "spill": 2, "rerank_vectors": True},
}


def built(rows, names, kind="raw", **more):
    return build_index(X[rows], names, tree=TREE, **KINDS[kind], **more)


def name_of(row, strings):
    return f"d{row}" if strings else int(row)


def assert_same_hits(one, other, k=7, **options):
    for beam in (1, 4, 9):
        for queries in (QUERIES, QUERIES[:1]):
            a = one.search(queries, k, beam=beam, **options)
            b = other.search(queries, k, beam=beam, **options)
            assert (a.ids == b.ids).all()
            assert (a.visited == b.visited).all()
            finite = np.isfinite(b.scores)
            np.testing.assert_allclose(
                a.scores[finite], b.scores[finite], rtol=1e-5, atol=1e-5
            )
            assert (np.isfinite(a.scores) == finite).all()
