"""Scores of several leaves at once, each against the queries that visit it.

One leaf is little work for a call into NumPy, and with several threads every call waits
for the interpreter's lock. So the scores of some leaves stand one after the other in
one buffer, and what selects among them is called once for all.
"""

import itertools
from typing import NamedTuple

import numpy as np


class Workspace(NamedTuple):
    """Memory that a thread uses over and over, so that it stays in the cache.

    Attributes:
        scores: (S,) float32, of the documents and queries of all blocks.
        hits: (S,) bool.
    """

    scores: np.ndarray
    hits: np.ndarray


class Blocks:
    """Scores of n queries and m documents of each of some leaves.

    Attributes:
        queries: (sum n,) query numbers, leaf by leaf, distinct within a leaf.
        rows: (sum m,) document rows, leaf by leaf.
        num_queries, num_documents: (leaves,) n and m.
        parts: which of `queries` are a leaf's: slices.
        scores: (n, m) float32 of each leaf, in the buffer, to be written to.
    """

    def __init__(self, queries, rows, workspace, order):
        """Lays out the blocks of leaves.

        Args:
            queries, rows: of each leaf: (n,) and (m,).
            workspace: the Workspace, with room for all scores.
            order: 'C' for scores query by query, 'F' for document by document.
        """
        self.queries, self.rows = np.concatenate(queries), np.concatenate(rows)
        self.num_queries = np.array([len(part) for part in queries])
        self.num_documents = np.array([len(part) for part in rows])
        self.order, self.workspace = order, workspace
        self.first_query = _starts(self.num_queries)
        self.first_row = _starts(self.num_documents)
        self.first_score = _starts(self.num_queries * self.num_documents)
        cuts = itertools.pairwise(self.first_query.tolist())
        self.parts = [slice(*cut) for cut in cuts]
        self.scores = self._views(workspace.scores)
        self._hits = self._views(workspace.hits)

    def bounds(self, k):
        """A lower bound of the k-th best score of each of `queries`: (sum n,).

        That of `kth_bound`; -inf where the leaf has less than k documents.
        """
        # Runs of so many scores are compared at once, which longer ones do faster; of
        # document by document they are n times as long anyway.
        groups = max(64, 4 * k) if self.order == "C" else max(32, 2 * k)
        enough = self.num_documents >= k  # of others nothing is known, or stored
        shape = self.num_queries[enough].sum(), groups
        maxima = np.full(shape, -np.inf, np.float32, order=self.order)
        done = 0
        for leaf in enough.nonzero()[0].tolist():
            scores = self.scores[leaf]
            num, documents = scores.shape
            part, size = maxima[done : done + num], documents // groups
            if size:
                dealt = scores[:, : size * groups].reshape(num, size, groups)
                np.maximum.reduce(dealt, axis=1, out=part)
            else:
                part[:, :documents] = scores
            done += num
        maxima.partition(groups - k, axis=1)
        bounds = np.full(len(self.queries), -np.inf, np.float32)
        bounds[np.repeat(enough, self.num_queries)] = maxima[:, groups - k]
        return bounds

    def at_least(self, floor):
        """Positions in the buffer of scores of at least a floor (sum n,): (hits,)."""
        for part, scores, hits in zip(self.parts, self.scores, self._hits, strict=True):
            np.greater_equal(scores, floor[part, None], out=hits)
        return self.workspace.hits[: self.first_score[-1]].nonzero()[0]

    def take(self, positions):
        """What stands at positions: queries, scores and rows, (hits,) each."""
        leaf = self.first_score.searchsorted(positions, side="right") - 1
        inside = positions - self.first_score[leaf]
        if self.order == "C":
            query, document = np.divmod(inside, self.num_documents[leaf])
        else:
            document, query = np.divmod(inside, self.num_queries[leaf])
        return (
            self.queries[query + self.first_query[leaf]],
            self.workspace.scores[positions],
            self.rows[document + self.first_row[leaf]],
        )

    def _views(self, buffer):
        """Of each leaf its part of a buffer: (n, m)."""
        spans = itertools.pairwise(self.first_score.tolist())
        flat = [buffer[start:stop] for start, stop in spans]
        n, m = self.num_queries.tolist(), self.num_documents.tolist()
        if self.order == "C":
            return [
                part.reshape(*shape) for part, *shape in zip(flat, n, m, strict=True)
            ]
        return [part.reshape(*shape).T for part, *shape in zip(flat, m, n, strict=True)]


def _starts(sizes):
    """Where each of some parts starts, and where the last one stops."""
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts
