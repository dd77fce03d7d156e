"""Queries one by one, in batches and by threads find the same, ties and all.

Small whole numbers make every score exact, in any order of summation, so that results
are compared with a sort of all scores without a tolerance.
"""

import itertools

import index_reference as reference
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ehi.index import build_index, leaf_log_probs, open_index, save_index
from ehi.index.search.codes import _gathered, decode, factor_table
from ehi.index.search.routing import route
from ehi.index.search.search import route_queries
from ehi.index.search.topk import best_of

WIDTH, HEIGHT, BRANCHING = 4, 3, 3  # 27 leaves, some of them empty
LEAVES = ["raw", "half", "pq", "pq16", "residual"]
SCORED = ["pq l2", "pq16 l2", "residual l2", "pq16 cosine", "residual corrected"]
few_values = st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.0000001])


def whole(rng, *shape):
    return rng.integers(-1, 2, shape).astype(np.float32)


def make(leaf, spill, folder=None):
    """An index of two segments with deleted documents, and queries."""
    rng = np.random.default_rng(5)
    leaf, _, score = leaf.partition(" ")
    parts = {"leaf_dtype": "float16"} if leaf == "half" else {}
    if leaf in ("pq", "residual"):
        parts["codebooks"] = whole(rng, 2, 256, 2)
    if leaf == "pq16":
        parts["codebooks"] = whole(rng, 2, 16, 2)
    if leaf == "residual":
        parts["leaf_centroids"] = whole(rng, BRANCHING**HEIGHT, WIDTH)
    tree = reference.make_tree("per_node", HEIGHT, BRANCHING, WIDTH, rng)
    x = whole(rng, 86, WIDTH)
    if score in ("cosine", "corrected"):
        x = x + (x == 0).all(axis=1, keepdims=True)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    index = build_index(
        x[:80], range(80), tree=tree, spill=spill, score=score or "ip", **parts
    )
    if folder is not None:
        save_index(index, folder)
        index = open_index(folder)
    index.add(x[80:], range(80, 86))
    index.delete([3, 17, 81])
    return index, whole(rng, 16, WIDTH)


def all_scores(index, query, leaves, left_out):
    """{row: best score} of the documents in some leaves, and copies scored."""
    scores, copies = {}, 0
    for segment, leaf in itertools.product(index.segments, leaves):
        start, stop = segment.leaf_offsets[leaf : leaf + 2]
        if segment.codes is None:
            vectors = segment.vectors[start:stop].astype(np.float64)
        else:
            vectors = decode(segment.codes[start:stop], index.byte_codebooks)
        if index.leaf_centroids is not None:
            vectors = vectors + index.leaf_centroids[leaf]
        found = vectors @ query
        if index.score == "l2":
            found = found + 0.5 - (vectors**2).sum(axis=1) / 2
        if segment.factors is not None:  # whole numbers times factors round once
            found = found * factor_table()[segment.factors[start:stop]]
        rows = segment.rows(start, stop).tolist()
        for row, score in zip(rows, found.tolist(), strict=True):
            if row not in left_out:
                scores[row] = max(score, scores.get(row, -np.inf))
                copies += 1
    return scores, copies


@pytest.mark.parametrize("spill", [1, 3])
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("product", ["dot", "vecdot"])
def test_every_path_is_the_sort_of_all_scores(
    leaf, spill, mapped, product, tmp_path, monkeypatch
):
    if product == "vecdot":  # which many wide vectors use
        for name in ("_STREAMED_WIDTH", "_STREAMED_BYTES"):
            monkeypatch.setattr(f"ehi.index.search.one_query.{name}", 0)
    check_every_path(*make(leaf, spill, tmp_path / "index" if mapped else None))


@pytest.mark.parametrize("spill", [1, 3])
@pytest.mark.parametrize("leaf", SCORED)
def test_every_path_of_every_score_is_the_sort_of_all_scores(leaf, spill):
    check_every_path(*make(leaf, spill))


def check_every_path(index, queries):
    assert len(index.segments) == 2  # neither has documents in every leaf
    assert all((np.diff(part.leaf_offsets) == 0).any() for part in index.segments)
    many = np.repeat(queries, 20, axis=0)  # so that leaves are shared
    denied = [0, 5, 60, 84]
    for k, options in itertools.product(
        (1, 7, 100), ({"beam": 5}, {"beam": 27}, {"beam": 20, "min_prob": 0.05})
    ):
        options["deny"] = denied
        batch = index.search(many, k, **options)
        threads = index.search(many, k, threads=3, **options)
        for name in ("rows", "scores", "visited", "leaves", "nodes_scored"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(threads, name))
        for number, query in enumerate(queries):
            one = index.search(query[None], k, **options)
            leaves = [leaf for leaf in batch.leaves[20 * number].tolist() if leaf >= 0]
            assert one.leaves[0].tolist() == leaves
            scores, copies = all_scores(index, query, leaves, {*denied, 3, 17, 81})
            best = sorted(scores, key=lambda row: (-scores[row], row))[:k]
            padded = best + [-1] * (k - len(best))
            assert one.rows[0].tolist() == batch.rows[20 * number].tolist() == padded
            assert one.scores[0, : len(best)].tolist() == [scores[row] for row in best]
            assert one.visited[0] == batch.visited[20 * number] == copies


@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize("beam", [1, 2, 5, 8, 9])
def test_one_query_is_routed_as_in_a_batch(height, beam):
    """Nodes of small whole numbers: many leaves are equally probable."""
    rng = np.random.default_rng(2)
    branching = 9 if height == 1 else 3
    nodes = [whole(rng, branching**h, branching, WIDTH) for h in range(height)]
    tree = {"kind": "per_node", "nodes": nodes, "scale": 1.0}
    x = whole(rng, 50, WIDTH)
    batch = route(x, tree, beam)
    plain = route(x, tree, beam, normalise=False)
    np.testing.assert_array_equal(plain.leaves, batch.leaves)
    np.testing.assert_array_equal(plain.nodes_scored, batch.nodes_scored)
    for query, row in enumerate(x):
        for normalise in (True, False):
            one = route(row[None], tree, beam, normalise=normalise)
            assert one.leaves[0].tolist() == batch.leaves[query].tolist()
        np.testing.assert_allclose(
            route(row[None], tree, beam).log_probs[0],
            leaf_log_probs(row[None], tree)[0, one.leaves[0]],
            atol=1e-6,
        )
    if height == 1:
        exact = np.argsort(-(x @ nodes[0][0].T), axis=1, kind="stable")
        np.testing.assert_array_equal(batch.leaves, exact[:, :beam])


def test_threads_share_the_routing_without_a_seam(monkeypatch):
    index, queries = make("raw", 1)
    whole_batch = index.search(queries, 3, beam=4)
    monkeypatch.setattr("ehi.index.search.search._ROUTED_QUERIES", 1)
    parts = []

    def counted(x, *arguments):
        parts.append(len(x))
        return route(x, *arguments)

    monkeypatch.setattr("ehi.index.search.search.route", counted)
    hits = index.search(queries, 3, beam=4, threads=3)
    assert sorted(parts) == [5, 5, 6]
    assert (hits.leaves == whole_batch.leaves).all()
    assert (hits.nodes_scored == whole_batch.nodes_scored).all()
    assert (hits.leaves == route_queries(index, queries, 4)[0]).all()


def test_missing_results_have_no_id():
    x = whole(np.random.default_rng(0), 5, WIDTH)
    for ids, none in ((range(5, 10), -1), ("abcde", None)):
        hits = build_index(x, list(ids), tree=None).search(x[:1], 7)
        assert hits.ids[0, 5:].tolist() == [none, none]
        assert set(hits.ids[0, :5]) == set(ids)


@given(st.lists(st.integers(0, 12), min_size=1), st.integers(1, 10))
def test_gathered_rows_come_in_equal_arrays(sizes, num):
    rows = np.arange(2 * sum(sizes)).reshape(-1, 2)
    gathered = list(_gathered(np.split(rows, np.cumsum(sizes)[:-1]), num))
    assert [len(part) for part in gathered[:-1]] == [num] * (len(gathered) - 1)
    assert all(0 < len(part) <= num for part in gathered)
    assert [row for part in gathered for row in part.tolist()] == rows.tolist()


@given(
    st.integers(1, 60).flatmap(
        lambda m: st.tuples(
            npst.arrays(np.float32, m, elements=few_values), st.permutations(range(m))
        )
    ),
    st.integers(1, 20),
)
def test_the_best_of_a_row_is_its_sort(row, k):
    scores, numbers = row[0], np.array(row[1])
    order = np.lexsort((numbers, -scores))[:k]
    found = best_of(scores, numbers, k)
    assert found[0].tolist() == scores[order].tolist()
    assert found[1].tolist() == numbers[order].tolist()


def test_large_queries_are_finite_although_their_squares_are_not():
    index, queries = make("raw", 1)
    hits, large = (index.search(queries * scale, 3, beam=27) for scale in (1, 1e25))
    assert (large.rows == hits.rows).all()
    queries[7, 1] = -np.inf
    with pytest.raises(ValueError, match="NaN or infinity in 1 rows, first in row 7"):
        index.search(queries, 3)
