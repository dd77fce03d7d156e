import tracemalloc

import index_reference as reference
import numpy as np
import pytest

from ehi.index.route import assign_leaves, leaf_log_probs, route, rows_at_once

WIDTH = 6
TREES = [
    (kind, height, hidden)
    for kind in ("per_node", "per_level")
    for height in (1, 2, 3)
    for hidden in ((0, 4) if kind == "per_node" else (0,))
]


@pytest.fixture(params=TREES, ids=str)
def tree(request):
    kind, height, hidden = request.param
    rng = np.random.default_rng(height)
    return reference.make_tree(kind, height, 3, WIDTH, rng, hidden)


@pytest.fixture
def x():
    return np.random.default_rng(9).standard_normal((7, WIDTH)).astype(np.float32)


def test_leaf_log_probs_are_the_reference_and_sum_to_one(tree, x):
    found = leaf_log_probs(x, tree)
    expected = [reference.leaf_log_probs(row, tree) for row in x]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("beam", [1, 2, 4, 1000])
def test_beam_search_is_the_reference(tree, x, beam):
    found = route(x, tree, beam)
    exact = leaf_log_probs(x, tree)
    for query, row in enumerate(x):
        leaves, scored = reference.beam_search(row, tree, beam)
        assert found.leaves[query].tolist() == leaves
        assert found.nodes_scored[query] == scored
    chosen = np.take_along_axis(exact, found.leaves, axis=1)
    np.testing.assert_allclose(found.log_probs, chosen, atol=2e-5)


def test_assignment_is_the_exact_top_leaves_in_chunks(tree, x, monkeypatch):
    many = np.tile(x, (400, 1))
    monkeypatch.setattr("ehi.index.route.rows_at_once", lambda *_: 100)
    order = np.argsort(-leaf_log_probs(x, tree), axis=1, kind="stable")
    assert (assign_leaves(many, tree, 2) == np.tile(order[:, :2], (400, 1))).all()


def test_equal_probabilities_go_to_the_smaller_leaf():
    tree = {
        "kind": "per_node",
        "nodes": [np.zeros((1, 3, 2), np.float32), np.zeros((3, 3, 2), np.float32)],
        "scale": 1.0,
    }
    x = np.ones((2, 2), np.float32)
    assert route(x, tree, 4).leaves.tolist() == [[0, 1, 2, 3]] * 2
    assert assign_leaves(x, tree, 2).tolist() == [[0, 1]] * 2


def test_a_million_leaves_are_never_materialised():
    rng = np.random.default_rng(0)
    tree = reference.make_tree("per_node", 3, 100, 4, rng)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    tracemalloc.start()
    found = route(x, tree, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.nodes_scored == 100 + 4 * 100 + 4 * 100).all()
    assert peak < 2**20  # all leaves of 8 queries take 32 MB
    assert rows_at_once(tree, 4) > 1000


def test_no_queries_have_no_routes(tree):
    assert route(np.zeros((0, WIDTH), np.float32), tree, 2).leaves.shape[0] == 0
