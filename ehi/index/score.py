"""Scores of one query in its leaves.

Raw leaves hold vectors d and score q.d. PQ leaves hold codes and score
(q R).decode(codes) + q.centroid(leaf), the last term where codes are of residuals
(Jegou et al., Product quantization for nearest neighbor search, 2011, section IV).
"""

import functools

import numpy as np

from ehi.index.aligned import aligned_row
from ehi.index.codes import query_table, sum_table

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
