"""An index with every optional part, for the tests of the folder."""

import index_reference as reference
import numpy as np

from ehi.index import build_index

WIDTH = 4
QUERIES = np.random.default_rng(1).standard_normal((5, WIDTH)).astype(np.float32)


def make_index(seed=0, leaf="pq", kind="per_node", strings=True, score="ip"):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((30, WIDTH)).astype(np.float32)
    parts = {"score": score}
    if score in ("cosine", "corrected"):
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    if leaf == "pq":
        parts |= {
            "codebooks": rng.standard_normal((2, 16, 2)).astype(np.float32),
            "rotation": reference.make_rotation(WIDTH, rng),
            "leaf_centroids": rng.standard_normal((4, WIDTH)).astype(np.float32),
        }
    return build_index(
        x,
        [f"d{i}" for i in range(30)] if strings else range(30),
        tree=reference.make_tree(kind, 2, 2, WIDTH, rng, hidden=3),
        query_tree=reference.make_tree(kind, 2, 2, WIDTH, rng),
        spill=2,
        rerank_vectors=True,
        encoder={"tower": "abc"},
        config={"hash": "def"},
        query_head={"projection": rng.standard_normal((3, WIDTH))},
        **parts,
    )


def all_arrays(index):
    parts = [segment.arrays() for segment in index.segments]
    named = {
        f"{i}.{name}": a for i, part in enumerate(parts) for name, a in part.items()
    }
    return {**index.parameter_arrays(), **named}


def assert_same_index(one, other):
    arrays, others = all_arrays(one), all_arrays(other)
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.dtype == others[name].dtype, name
        assert (array == others[name]).all(), name
    assert (one.encoder, one.config) == (other.encoder, other.config)
    a = one.search(QUERIES, 7, beam=3, rerank=9)
    b = other.search(QUERIES, 7, beam=3, rerank=9)
    assert (a.ids == b.ids).all() and (a.scores == b.scores).all()
