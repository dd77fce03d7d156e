"""A search is the slow reference's, in batches, in threads and one query at a time."""

import index_reference as reference
import numpy as np
import pytest

import ehi.index

NUM, WIDTH, BRANCHING = 60, 8, 3
LEAVES = ["raw", "half", "pq", "pq16", "residual", "rotated", "rotated-residual"]


def quantiser(leaf, num_leaves, rng):
    """Keyword arguments of build_index for a kind of leaf."""

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32) / 2

    if leaf in ("raw", "half"):
        return {}
    parts = {"codebooks": normal(4, 16, 2) if leaf == "pq16" else normal(2, 256, 4)}
    if "residual" in leaf:
        parts["leaf_centroids"] = normal(num_leaves, WIDTH)
    if "rotated" in leaf:
        parts["rotation"] = reference.make_rotation(WIDTH, rng)
    return parts


def make(leaf="raw", kind="per_node", height=2, spill=1, num=NUM, **extra):
    """(Index, SlowIndex, queries) over the same random corpus."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((num, WIDTH)).astype(np.float32)
    if leaf == "half":
        x = x.astype(np.float16).astype(np.float32)
        extra["leaf_dtype"] = "float16"
    tree = query_tree = None
    if height:
        tree = reference.make_tree(kind, height, BRANCHING, WIDTH, rng, hidden=3)
        query_tree = reference.make_tree(kind, height, BRANCHING, WIDTH, rng)
    parts = quantiser(leaf, BRANCHING**height, rng)
    shared = {"tree": tree, "query_tree": query_tree, "spill": spill, **parts}
    index = ehi.index.build_index(x, range(num), **shared, **extra)
    queries = rng.standard_normal((9, WIDTH)).astype(np.float32)
    return index, reference.SlowIndex(x, **shared), queries


def assert_is_reference(index, slow, queries, k, beam, **options):
    hits = index.search(queries, k, beam=beam, **options)
    for query, x in enumerate(queries):
        scores, visited, nodes_scored, leaves = slow.search(x, beam)
        reference.assert_same_results(hits.rows[query], hits.scores[query], scores, k)
        assert hits.visited[query] == visited
        assert hits.nodes_scored[query] == nodes_scored
        assert hits.leaves[query].tolist() == leaves
    assert (index.count_visited(queries, beam) == hits.visited).all()
    return hits


@pytest.mark.parametrize("spill", [1, 2])
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("kind", ["per_node", "per_level"])
def test_search_is_the_reference(leaf, kind, spill):
    index, slow, queries = make(leaf, kind, spill=spill)
    for beam in (1, 4, 9):
        hits = assert_is_reference(index, slow, queries, 5, beam)
    assert (hits.visited == spill * NUM).all()  # the full beam is exhaustive


@pytest.mark.parametrize("kind", ["per_node", "per_level"])
@pytest.mark.parametrize("height", [0, 1, 3])
def test_every_height_is_the_reference(height, kind):
    index, slow, queries = make("residual", kind, height)
    for beam in {1, BRANCHING**height // 2 or 1, BRANCHING**height}:
        assert_is_reference(index, slow, queries, 70, beam)  # more than there are


@pytest.mark.parametrize("leaf", LEAVES)
def test_full_beam_gives_the_exhaustive_ids(leaf):
    """Exhaustive = one product with all reconstructions, without any index."""
    index, slow, queries = make(leaf)
    known = dict(copy for leaf in slow.leaves.values() for copy in leaf)
    scores = queries @ np.array([known[row] for row in range(NUM)]).T
    hits = index.search(queries, 6, beam=9)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :6]
    np.testing.assert_allclose(
        hits.scores, np.take_along_axis(scores, order, axis=1), atol=1e-5
    )
    assert (hits.ids == order).all()


@pytest.mark.parametrize("leaf", ["raw", "half", "pq16", "rotated-residual"])
@pytest.mark.parametrize("spill", [1, 2])
def test_batches_threads_and_single_queries_agree(leaf, spill, monkeypatch):
    index, _, queries = make(leaf, spill=spill)
    monkeypatch.setattr("ehi.index.search.batch._BLOCK_SCORES", 4)
    queries = np.tile(queries, (30, 1))  # grouped by leaf
    batch = index.search(queries, 4, beam=5)
    threads = index.search(queries, 4, beam=5, threads=2)
    assert (threads.ids == batch.ids).all()
    assert (threads.scores == batch.scores).all()
    for query in range(9):
        single = index.search(queries[query : query + 1], 4, beam=5)
        assert (single.ids[0] == batch.ids[query]).all()
        np.testing.assert_allclose(single.scores[0], batch.scores[query], atol=1e-5)


@pytest.mark.parametrize("spill", [1, 2])
@pytest.mark.parametrize("leaf", LEAVES)
def test_one_query_is_the_reference(leaf, spill):
    index, slow, queries = make(leaf, spill=spill)
    for query in range(4):
        for k, beam in ((5, 1), (5, 9), (70, 3)):
            assert_is_reference(index, slow, queries[query : query + 1], k, beam)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("leaf", LEAVES)
def test_small_blocks_and_either_order_change_nothing(leaf, order, monkeypatch):
    """Leaves longer than the buffer, the look-up's steps and the small products."""
    index, _, queries = make(leaf, height=1, num=500)
    batch = np.tile(queries, (3, 1))
    whole = index.search(batch, 6, beam=2)
    monkeypatch.setattr("ehi.index.search.batch.scores_order", lambda: order)
    for name, value in (
        ("batch._DECODED_ROWS", 48),
        ("codes._GATHER_ROWS", 20),
        ("batch._SMALL_PRODUCT", WIDTH * 27 * 40),
    ):
        monkeypatch.setattr(f"ehi.index.search.{name}", value)
    for part in (batch, queries[:1]):
        hits, expected = index.search(part, 6, beam=2), whole.ids[: len(part)]
        assert (np.sort(hits.ids) == np.sort(expected)).all()  # some scores are close
        np.testing.assert_allclose(hits.scores, whole.scores[: len(part)], atol=1e-5)


@pytest.mark.parametrize("spill", [1, 2])
@pytest.mark.parametrize("leaf", ["raw", "half", "pq16", "rotated-residual"])
def test_batches_threads_and_single_queries_agree_after_updates(leaf, spill):
    index, _, queries = make(leaf, spill=spill)
    x = np.random.default_rng(1).standard_normal((40, WIDTH)).astype(np.float32)
    index.add(x, range(100, 140))
    index.delete([*range(0, 60, 3), 120])
    batch = np.tile(queries, (5, 1))
    for k, options in ((5, {}), (9, {"deny": [1, 101]}), (50, {"allow": range(110)})):
        hits = index.search(batch, k, beam=4, **options)
        threads = index.search(batch, k, beam=4, threads=3, **options)
        assert (threads.rows == hits.rows).all()
        assert (threads.visited == hits.visited).all()
        for query in range(9):
            single = index.search(batch[query : query + 1], k, beam=4, **options)
            assert (single.rows[0] == hits.rows[query]).all()
            assert single.visited[0] == hits.visited[query]
            np.testing.assert_allclose(single.scores[0], hits.scores[query], atol=1e-5)


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch):
    index, _, queries = make()

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("ehi.index.search.batch.multiply", fail)
    for count in (1, 2):
        with pytest.raises(MemoryError, match="no room"):
            index.search(np.tile(queries, (9, 1)), 3, beam=4, threads=count)


@pytest.mark.parametrize("copies", [1, 40])
def test_equal_scores_go_to_the_smaller_row_also_at_the_cut(copies):
    """Small whole numbers make every score exact, in any order of summation."""
    rng = np.random.default_rng(3)
    x = rng.integers(-1, 2, (500, 3)).astype(np.float32)
    tree = reference.make_tree("per_node", 1, 4, 3, rng)
    index = ehi.index.build_index(x, range(500), tree=tree)
    queries = np.tile(rng.integers(-1, 2, (5, 3)).astype(np.float32), (copies, 1))
    order = np.argsort(-(queries @ x.T), axis=1, kind="stable")
    for k in (1, 7, 100):
        assert (index.search(queries, k, beam=4).rows == order[:, :k]).all()


def test_rerank_scores_the_candidates_with_stored_vectors(monkeypatch):
    index, _, queries = make("pq16", rerank_vectors=True, spill=2)
    rough = index.search(queries, 20, beam=6)
    hits = index.search(queries, 3, beam=6, rerank=20)
    monkeypatch.setattr("ehi.index.search.search._RERANK_VALUES", 20 * WIDTH * 2)
    threads = index.search(queries, 3, beam=6, rerank=20, threads=3)
    assert (threads.rows == hits.rows).all() and (threads.scores == hits.scores).all()
    vectors = index.segments[0].rerank_vectors.astype(np.float32)
    for query, x in enumerate(queries):
        exact = {row: float(vectors[row] @ x) for row in rough.rows[query].tolist()}
        exact.pop(-1, None)
        reference.assert_same_results(hits.rows[query], hits.scores[query], exact, 3)
    assert (hits.rows != rough.rows[:, :3]).any()


def test_a_large_batch_is_cut_into_parts_without_a_seam(monkeypatch):
    index, _, queries = make("raw", spill=2)
    whole = index.search(queries, 4, beam=3)
    monkeypatch.setattr("ehi.index.search.search.rows_at_once", lambda *_: 2)
    parts = index.search(queries, 4, beam=3)
    assert (whole.ids == parts.ids).all() and (whole.visited == parts.visited).all()
    assert (index.count_visited(queries, 3) == whole.visited).all()


def test_no_queries_give_no_hits():
    index, _, queries = make()
    hits = index.search(queries[:0], 4, beam=3)
    assert hits.ids.shape == hits.scores.shape == (0, 4)
    assert hits.leaves.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queries": np.ones((2, WIDTH + 1))}, r"shape \(N, 8\).*got \(2, 9\)"),
        ({"queries": np.ones(WIDTH)}, r"got \(8,\)"),
        ({"queries": np.ones((2, WIDTH), int)}, "floats, got dtype int64"),
        ({"queries": np.full((2, WIDTH), np.nan)}, "first in row 0"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 2.5}, "k must be a whole number, got 2.5"),
        ({"beam": 0}, "beam must be at least 1, got 0"),
        ({"beam": 10}, "beam 10 is larger than the 9 leaves"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"rerank": -1}, "rerank must be at least 0"),
        ({"rerank": 20}, "needs an index built with rerank_vectors=True"),
    ],
)
def test_bad_searches_are_refused(change, words):
    index, _, queries = make()
    arguments = {"queries": queries, "k": 3, "beam": 2} | change
    with pytest.raises(ValueError, match=words):
        index.search(**arguments)


def test_fewer_candidates_than_results_are_refused():
    index, _, queries = make(rerank_vectors=True)
    with pytest.raises(ValueError, match="rerank=4 candidates are fewer than k=5"):
        index.search(queries, 5, rerank=4)
