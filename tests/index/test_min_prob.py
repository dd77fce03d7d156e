"""Leaves visited by probability: the surer the tree, the fewer leaves."""

import index_reference as reference
import numpy as np
import pytest

import ehi.index
from ehi.index.search.routing import leaf_log_probs, route

NUM, WIDTH, BRANCHING = 200, 6, 4


def make(kind="per_node", height=2, **options):
    rng = np.random.default_rng(3)
    tree = reference.make_tree(kind, height, BRANCHING, WIDTH, rng)
    documents = rng.standard_normal((NUM, WIDTH)).astype(np.float32)
    queries = rng.standard_normal((40, WIDTH)).astype(np.float32)
    return ehi.index.build_index(documents, range(NUM), tree=tree, **options), queries


def expected_leaves(log_probs, min_prob, beam):
    """Leaves of one query, best first: those probable enough, and always the best."""
    order = np.argsort(-log_probs, kind="stable")[:beam]
    return [order[0], *order[1:][np.exp(log_probs[order[1:]]) >= min_prob]]


@pytest.mark.parametrize("kind", ["per_node", "per_level"])
@pytest.mark.parametrize("height", [1, 2, 3])
@pytest.mark.parametrize("min_prob", [0.02, 0.2, 0.9])
def test_routes_are_all_leaves_above_the_probability(kind, height, min_prob):
    index, queries = make(kind, height)
    leaves = index.num_leaves
    found = route(queries, index.tree, leaves, min_prob)
    exact = leaf_log_probs(queries, index.tree)
    counts = set()
    for query in range(len(queries)):
        kept = found.leaves[query] >= 0
        expected = expected_leaves(exact[query], min_prob, leaves)
        assert found.leaves[query][kept].tolist() == expected
        assert not kept[len(expected) :].any()  # padding comes last
        assert np.isneginf(found.log_probs[query][~kept]).all()
        counts.add(len(expected))
    assert len(counts) > 1 or min_prob == 0.9  # the number differs between queries
    if height > 1 and min_prob == 0.2:  # nodes below others are not scored
        everything = route(queries, index.tree, leaves).nodes_scored
        assert found.nodes_scored.mean() < everything.mean()


def test_the_beam_is_the_most_that_a_query_visits():
    index, queries = make(height=1)
    found = route(queries, index.tree, 2, 0.05).leaves
    exact = leaf_log_probs(queries, index.tree)
    assert found.shape == (len(queries), 2)
    for query, leaves in enumerate(found):
        expected = expected_leaves(exact[query], 0.05, 2)
        assert leaves[leaves >= 0].tolist() == expected


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("spill", [1, 2])
def test_batches_threads_and_single_queries_agree(spill, deleted, monkeypatch):
    index, queries = make(spill=spill)
    if deleted:
        index.delete(range(0, NUM, 3))
    setting = {"beam": index.num_leaves, "min_prob": 0.1}
    batch = index.search(queries, 7, **setting)
    assert (batch.leaves < 0).any()
    assert (index.count_visited(queries, **setting) == batch.visited).all()
    threads = index.search(queries, 7, threads=2, **setting)
    assert (threads.ids == batch.ids).all() and (threads.leaves == batch.leaves).all()
    monkeypatch.setattr("ehi.index.search.search.rows_at_once", lambda *_: 3)
    parts = index.search(queries, 7, **setting)  # each part may be narrower
    assert (parts.ids == batch.ids).all() and (parts.visited == batch.visited).all()
    for query in range(len(queries)):
        single = index.search(queries[query : query + 1], 7, **setting)
        assert (single.ids[0] == batch.ids[query]).all()
        assert single.visited[0] == batch.visited[query]
        found = single.leaves[0][single.leaves[0] >= 0].tolist()
        assert batch.leaves[query][: len(found)].tolist() == found
        # Only the rows of these leaves were searched.
        rows = [index.contents.rows_in_leaf(leaf) for leaf in found]
        assert set(single.rows[0]) <= {-1, *np.concatenate(rows).tolist()}


def test_zero_is_every_leaf_of_the_beam_and_one_is_the_best_alone():
    index, queries = make()
    plain, zero = index.search(queries, 5, beam=6), index.search(
        queries, 5, beam=6, min_prob=0.0
    )  # fmt: skip
    assert (plain.ids == zero.ids).all() and (plain.leaves == zero.leaves).all()
    one = index.search(queries, 5, beam=6, min_prob=1.0)
    assert (one.ids == index.search(queries, 5, beam=1).ids).all()
    empty = index.search(queries[:0], 5, beam=6, min_prob=0.5)
    assert empty.ids.shape == (0, 5)


@pytest.mark.parametrize("min_prob", [-0.1, 1.5, np.nan, "0.1"])
def test_what_is_no_probability_is_refused(min_prob):
    index, queries = make()
    with pytest.raises(ValueError, match="min_prob must be a number between 0 and 1"):
        index.search(queries, 5, min_prob=min_prob)
