import tracemalloc

import index_reference as reference
import numpy as np
import pytest

from ehi.index.search.routing import assign_leaves, leaf_log_probs, route, rows_at_once

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
    monkeypatch.setattr("ehi.index.search.routing.rows_at_once", lambda *_, **__: 100)
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


@pytest.mark.parametrize("spill", [1, 2, 3])
def test_assignment_by_beam_is_exact_where_the_beam_covers_the_tree(tree, x, spill):
    exact = assign_leaves(x, tree, spill)
    for beam in (9, 1000):
        assert (assign_leaves(x, tree, spill, beam=beam) == exact).all()
    narrow = assign_leaves(x, tree, spill, beam=spill)
    assert (narrow == route(x, tree, spill).leaves[:, :spill]).all()


def test_assignment_is_the_same_on_any_number_of_threads(tree, x, monkeypatch):
    many = np.tile(x, (60, 1))
    monkeypatch.setattr("ehi.index.search.routing.rows_at_once", lambda *_, **__: 50)
    for beam in (None, 2):
        one = assign_leaves(many, tree, 2, beam=beam)
        assert (assign_leaves(many, tree, 2, beam=beam, threads=3) == one).all()


@pytest.mark.parametrize("beam", [0, 1, 1.5])
def test_a_beam_narrower_than_the_spill_is_refused(tree, x, beam):
    with pytest.raises(ValueError, match="beam"):
        assign_leaves(x, tree, 2, beam=beam)


@pytest.mark.parametrize("height, branching", [(2, 1000), (3, 100)])
def test_a_million_leaves_are_never_materialised(height, branching):
    rng = np.random.default_rng(0)
    tree = reference.make_tree("per_node", height, branching, 4, rng)
    x = rng.standard_normal((300, 4)).astype(np.float32)
    rows = rows_at_once(tree, 32)
    for batch, most in ((1, 2**20), (300, 5 * 2**26)):
        tracemalloc.start()
        for start in range(0, batch, rows):
            found = route(x[: batch - start][:rows], tree, 32)
        leaves = assign_leaves(x[:batch], tree, beam=4)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # All leaves of one query take 4 MB, of 300 queries 1.2 GB.
        assert peak < most
    assert (found.nodes_scored == branching + 32 * branching * (height - 1)).all()
    assert leaves.shape == (300, 1)


def test_no_queries_have_no_routes(tree):
    assert route(np.zeros((0, WIDTH), np.float32), tree, 2).leaves.shape[0] == 0


@pytest.mark.parametrize("beam", [1, 3, 4])
def test_equally_probable_leaves_come_in_their_order(beam):
    """Few nodes tie with the last one kept, so they are sorted without keys."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((16, 5)).astype(np.float32)
    x = rng.standard_normal((7, 5)).astype(np.float32)
    twins = np.repeat(vectors, 2, axis=0)  # leaves 2 i and 2 i + 1 are equal
    tree = {"kind": "per_node", "nodes": [twins[None]], "scale": 3.0}
    best = np.argsort(-(x @ vectors.T), axis=1)
    expected = np.stack([2 * best, 2 * best + 1], axis=2).reshape(7, 32)[:, :beam]
    np.testing.assert_array_equal(route(x, tree, beam).leaves, expected)
