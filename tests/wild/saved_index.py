"""A small index, what it finds, and the files of its folder."""

import numpy as np

from ehi.index import (
    build_index,
    open_index,
    save_index,
)

WIDTH, NUM = 8, 60
RNG = np.random.default_rng(5)
X = RNG.standard_normal((NUM, WIDTH)).astype(np.float32)
X /= np.linalg.norm(X, axis=1, keepdims=True)
QUERIES = X[:7] + np.float32(0.01)
NODES = RNG.standard_normal((1, 4, WIDTH)).astype(np.float32)
TREE = {"kind": "per_node", "nodes": [NODES], "scale": 1.0}
CODES = {"codebooks": 0.3 * RNG.standard_normal((4, 16, 2)).astype(np.float32)}


def saved(path, **options):
    save_index(build_index(X, range(NUM), tree=TREE, **options), path)
    return open_index(path)


def found(index):
    return index.search(QUERIES, 5, beam=4).ids.tolist()


EXPECTED = found(build_index(X, range(NUM), tree=TREE))


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")}
