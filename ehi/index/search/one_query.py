"""Scores of one query in its leaves.

Raw leaves hold vectors d and score q.d. PQ leaves hold codes and score
(q R).decode(codes) + q.centroid(leaf), the last term where codes are of residuals
(Jegou et al., Product quantization for nearest neighbor search, 2011, section IV).
"""

import functools

import numpy as np

from ehi.index.search.blas import aligned_row
from ehi.index.search.codes import query_table, sum_table
from ehi.index.search.topk import best_of

# Vectors of one query's leaves, from where on a product for each row (`vecdot`) is
# faster than one of all: it reads memory 5 to 10% sooner, but of 2,000 x 384 in the
# cache it takes 1.3 times as long.
_STREAMED_WIDTH, _STREAMED_BYTES = 256, 2**26


def score_leaves(index, contents, query, rotated, leaves):
    """Scores of one query against whole leaves, segment by segment, leaf by leaf.

    Args:
        index, contents: the Index, and its documents.
        query, rotated: (D,) float32, before and after the rotation.
        leaves: (b,) leaf numbers.

    Returns:
        (m,) float32 scores, and a function from positions among them, or from None
        for all, to document rows.
    """
    parts, spans = [], []
    for segment in contents.segments:
        stored = segment.vectors if segment.codes is None else segment.codes
        starts, stops = segment.leaf_offsets[leaves], segment.leaf_offsets[leaves + 1]
        spans.append((segment, starts, stops))
        bounds = zip(starts.tolist(), stops.tolist(), strict=True)
        parts += [stored[i:j] for i, j in bounds]
    scores = np.empty(sum(map(len, parts)), np.float32)
    if index.codebooks is None:
        first = contents.segments[0].vectors
        streams = len(query) >= _STREAMED_WIDTH and first.nbytes >= _STREAMED_BYTES
        if streams:
            _multiply_all(parts, aligned_row(query), scores, np.vecdot)
        else:
            _multiply_all(parts, query, scores, np.dot)
    else:
        sum_table(query_table(index.codeword_columns, rotated), parts, scores)
    if index.leaf_centroids is not None:
        shifts = np.tile(index.leaf_centroids[leaves] @ query, len(contents.segments))
        scores += np.repeat(shifts, [len(part) for part in parts])
    return scores, functools.partial(_rows_of, spans)


def _rows_of(spans, positions=None):
    """Document rows of positions in spans (segment, starts, stops) of copies."""
    if positions is None or len(spans) > 1:
        rows = [
            segment.rows(*span)
            for segment, starts, stops in spans
            for span in zip(starts.tolist(), stops.tolist(), strict=True)
        ]
        rows = np.concatenate(rows)
        return rows if positions is None else rows[positions]
    segment, starts, stops = spans[0]
    ends = (stops - starts).cumsum()
    leaf = ends.searchsorted(positions, side="right")
    return segment.rows_at(positions + (stops - ends)[leaf])


def _multiply_all(parts, query, out, product):
    """out = inner products of a query (D,) with arrays (m, D), one after the other."""
    done = 0
    for vectors in parts:
        if vectors.dtype != np.float32:
            vectors = vectors.astype(np.float32)
        product(vectors, query, out=out[done : done + len(vectors)])
        done += len(vectors)


# MERGED ehi_index_by_query: One query, or queries that share few leaves: each reads
# its own leaves.
#
# The arrays here are short, so that a call into NumPy costs more than its work: some
# microseconds, once the documents have pushed NumPy's own code out of the cache.
#
# No leaf is left out by an upper bound of its scores. Of raw leaves that is q.c + |q| r
# with the mean c and radius r of the leaf: of 1,600 visits to 8 leaves it spares 1 on a
# Gaussian mixture of 200,000 x 384, and none on 5,000 to 17,000 text embeddings, where
# the bounds are 1.1 to 1.2 and the tenth best score is 0.5 to 0.6. Of codes, the sum of
# the best table entries is the same for all leaves (but for a centroid's share), and no
# score exceeds it.
#


def search_by_query(job, queries, rotated, leaves):
    """The best documents of each query in its leaves.

    Args:
        job: the Job.
        queries, rotated: (N, D) float32, before and after the rotation.
        leaves: (N, b) leaf numbers, padded with -1.

    Returns:
        (N, r) float32 scores and (N, r) int64 rows, r = job.candidates, best first,
        padded with -inf and -1; (N,) int64 copies that were scored.
    """
    k = job.candidates
    scores = np.empty((len(queries), k), np.float32)
    rows = np.empty((len(queries), k), np.int64)
    visited = np.empty(len(queries), np.int64)
    for query in range(len(queries)):
        best_scores, best_rows, visited[query] = _search_one(
            job, queries[query], rotated[query], leaves[query]
        )
        found = len(best_rows)
        scores[query, :found], rows[query, :found] = best_scores, best_rows
        if found < k:
            scores[query, found:], rows[query, found:] = -np.inf, -1
    return scores, rows, visited


def _search_one(job, query, rotated, leaves):
    if job.min_prob:
        leaves = leaves[leaves >= 0]
    scores, rows = score_leaves(job.index, job.contents, query, rotated, leaves)
    if job.mask is not None:
        rows = rows()
        allowed = np.flatnonzero(job.mask[rows])
        scores, rows = scores[allowed], rows[allowed]
    visited = len(scores)
    scores, rows = best_of(scores, rows, job.copies)
    if job.index.spill > 1:  # each document once, at its best score
        first = np.unique(rows, return_index=True)[1]
        first.sort()
        first = first[: job.candidates]
        scores, rows = scores[first], rows[first]
    return scores, rows, visited
