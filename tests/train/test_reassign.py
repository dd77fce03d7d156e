"""Reassignment of documents to leaves: brute force, ties, overlap, few queries."""

import numpy as np
import pytest

from ehi.train.reassign import reassigned_leaves


def brute_force(tops, reached, fallback, copies):
    """Y' M as dense matrices, then the best leaves by count, fallback and number."""
    documents, leaves = len(fallback), int(max(reached.max(), fallback.max())) + 1
    y, m = np.zeros((len(tops), documents), int), np.zeros((len(tops), leaves), int)
    for query, (rows, found) in enumerate(zip(tops, reached, strict=True)):
        y[query, rows[rows >= 0]] = 1
        m[query, found[found >= 0]] = 1
    counts = y.T @ m
    answer = []
    for document in range(documents):
        place = {leaf: at for at, leaf in enumerate(fallback[document].tolist())}
        row = counts[document]
        able = [leaf for leaf in range(leaves) if row[leaf] or leaf in place]
        able.sort(key=lambda leaf: (-row[leaf], place.get(leaf, leaves), leaf))
        answer.append(able[:copies])
    return answer


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_documents_go_where_most_of_their_queries_look(copies, seed):
    rng = np.random.default_rng(seed)
    queries, documents, leaves = 40, 30, 8
    tops = np.array([rng.permutation(documents)[:5] for _ in range(queries)])
    reached = np.array([rng.permutation(leaves)[:3] for _ in range(queries)])
    tops[::4, 3:], reached[::5, 2:] = -1, -1  # padding counts for nothing
    tops[tops > 25] = -1  # nobody wants the last documents
    fallback = np.array([rng.permutation(leaves)[:3] for _ in range(documents)])
    found = reassigned_leaves(tops, reached, fallback, copies=copies)
    assert found.tolist() == brute_force(tops, reached, fallback, copies)
    assert found[26:].tolist() == fallback[26:, :copies].tolist()


def test_parts_of_the_queries_are_added_up(monkeypatch):
    rng = np.random.default_rng(0)
    tops, reached = rng.integers(9, size=(50, 1)), rng.integers(4, size=(50, 1))
    fallback = np.tile(np.arange(4), (9, 1))
    whole = reassigned_leaves(tops, reached, fallback, copies=2)
    monkeypatch.setattr("ehi.train.reassign.PRODUCTS", 7)
    parts = reassigned_leaves(tops, reached, fallback, copies=2)
    np.testing.assert_array_equal(whole, parts)


def test_what_does_not_fit_is_refused():
    one = np.zeros((3, 1), int)
    with pytest.raises(ValueError, match=r"copies=2 of fallback \(3, 1\)"):
        reassigned_leaves(one, one, one, copies=2)
    with pytest.raises(ValueError, match="do not fit"):
        reassigned_leaves(one, one[:2], one, copies=1)
