"""Documents whose scores differ by rounding only: equal ones come in row order.

A matrix product rounds the score of a document differently at different places of the
matrix, so documents of equal bytes can get scores that differ in the last bits.
`settle` looks for scores that are so close and computes them again, by a sum whose
rounding depends on nothing but the query and the document's bytes. Equal documents then
tie exactly, and the smaller row comes first: for one query, in batches, by threads and
by shards.
"""

import itertools
import math

import numpy as np

from ehi.index.search.codes import decode, factor_table
from ehi.index.search.one_query import score_allowed
from ehi.index.search.routing import group_by

# Scores that differ by less than this fraction of |query| |document| are close. A
# float32 product of unit vectors of width 768 was wrong by up to 7e-7, so two of them
# may differ by 1.4e-6.
_CLOSE = 2**-19
_FEW = 32  # up to this many scores, Python finds close ones faster than NumPy
_VALUES = 2**22  # numbers of the documents scored at once, or of their leaves


def settle(request, queries, rotated, leaves, scores, rows):
    """The r best of r + 1 candidates, equal documents in the order of their rows.

    Args:
        request: the Request.
        queries, rotated: (N, D) float32, before and after the rotation.
        leaves: (N, b) leaf numbers, padded with -1.
        scores, rows: (N, r + 1) the best documents, padded with -inf and -1.

    Returns:
        (N, r) float32 scores and (N, r) int64 rows.
    """
    wanted = scores[:, :-1], rows[:, :-1]
    norm, others = _sizes(request)
    if len(scores) == 1 and scores.shape[1] <= _FEW:
        # Infinite for a query so large that its square overflows: see below.
        close = (math.sqrt(np.vdot(queries, queries)) * norm + others) * _CLOSE
        if _all_apart(scores[0].tolist(), close):
            return wanted
    exact = queries.astype(np.float64)
    close = (np.sqrt(np.vecdot(exact, exact)) * norm + others) * _CLOSE
    close = close.astype(np.float32)[:, None]
    close = np.maximum(close, _CLOSE * np.abs(scores[:, 1:]))
    with np.errstate(invalid="ignore"):
        gaps = scores[:, :-1] - scores[:, 1:]
    near = gaps < close  # not at missing results, where gaps are infinite or NaN
    if not near.any():
        return wanted
    scores, rows = (part.copy() for part in wanted)
    # A document that equals the last one may be missing: find all that are close.
    cut = near[:, -1]
    # Scores that are exactly equal are in the order of their rows already.
    uneven = (near & (gaps > 0)).any(axis=1) & ~cut
    if uneven.any():
        near = near & uneven[:, None]
        again = near.copy()
        again[:, 1:] |= near[:, :-1]
        query, place = again.nonzero()
        chosen = rows[query, place]
        exact = _exact_scores(
            request.parameters, request.contents, queries, rotated, leaves, query,
            chosen,
        )  # fmt: skip
        run = np.cumsum(~near[query, place - 1] | (place == 0))  # runs of close scores
        order = np.lexsort((chosen, -exact, run))
        scores[query, place], rows[query, place] = exact[order], chosen[order]
    for number in cut.nonzero()[0].tolist():
        floor = scores[number, -1] - 2 * close[number, -1]
        part = slice(number, number + 1)
        best = _all_from(request, queries[part], rotated[part], leaves[part], floor)
        if len(best[1]) >= rows.shape[1]:
            scores[number], rows[number] = (found[: rows.shape[1]] for found in best)
    return scores, rows


def _sizes(request):
    """Bounds a, b of the terms of a score: they add up to at most |query| a + b."""
    parameters = request.parameters
    if parameters.codebooks is None:
        return request.contents.vector_norm, 0.0
    norm = parameters.code_norm
    if parameters.score == "l2":
        return norm, (1 + norm**2) / 2
    if parameters.has_factors:  # f |x^| is 1, or 1 / cos(x, x^)
        return max(norm, 2.0), 0.0
    return norm, 0.0


def _all_apart(scores, close):
    """Whether no two of some descending scores are close."""
    return not any(
        one - other < max(close, _CLOSE * abs(other))
        for one, other in itertools.pairwise(scores)
    )


def _all_from(request, query, rotated, leaves, floor):
    """All documents of one query (1, D) that score at least `floor`, best first."""
    scores, rows = score_allowed(request, query[0], rotated[0], leaves[0])
    kept = (scores >= floor).nonzero()[0]
    rows = np.unique(rows(kept) if callable(rows) else rows[kept]).astype(np.int64)
    queries = np.zeros(len(rows), np.int64)
    scores = _exact_scores(
        request.parameters, request.contents, query, rotated, leaves, queries,
        rows,
    )  # fmt: skip
    order = np.lexsort((rows, -scores))
    return scores[order], rows[order]


def score_again(parameters, contents, queries, leaves, rows):
    """Scores of the documents found, each rounded on its own.

    Args:
        parameters, contents: those of the index.
        queries: (N, D) float32.
        leaves: (N, b) leaves that the queries visit, padded with -1.
        rows: (N, r) documents found in them, padded with -1.

    Returns:
        (N, r) float32, padded with -inf.
    """
    rotation = parameters.rotation
    rotated = queries if rotation is None else queries @ rotation
    scores = np.full(rows.shape, -np.inf, np.float32)
    step = max(1, _VALUES // max(1, rows.shape[1] * leaves.shape[1]))
    for start in range(0, len(rows), step):
        query, place = (rows[start : start + step] >= 0).nonzero()
        query += start
        scores[query, place] = _exact_scores(
            parameters, contents, queries, rotated, leaves, query, rows[query, place],
        )  # fmt: skip
    return scores


def _exact_scores(parameters, contents, queries, rotated, leaves, query, rows):
    """Scores of documents by their best copy, each rounded on its own.

    Args:
        parameters, contents: those of the index.
        queries, rotated: (N, D) float32, before and after the rotation.
        leaves: (N, b) leaves whose copies count, padded with -1.
        query: (J,) which of the queries.
        rows: (J,) which document.

    Returns:
        (J,) float32, -inf for a document that is in none of its leaves.
    """
    scores = np.full(len(rows), -np.inf, np.float32)
    coded, centroids = parameters.codebooks is not None, parameters.leaf_centroids
    l2 = parameters.score == "l2"
    asked = rotated if coded else queries
    step = max(1, _VALUES // parameters.width)
    for segment in contents.segments if len(rows) else ():
        item, leaf, copy = _copies_of(segment, rows, query, leaves)
        for start in range(0, len(item), step):
            part = slice(start, start + step)
            which = query[item[part]]
            if coded:
                vectors = decode(segment.codes[copy[part]], parameters.byte_codebooks)
            else:
                vectors = segment.vectors[copy[part]].astype(np.float32, copy=False)
            if l2 and centroids is not None:
                vectors += parameters.rotated_centroids[leaf[part]]
            found = np.vecdot(asked[which], vectors)
            if l2:
                found += 0.5 - np.vecdot(vectors, vectors) / 2
            elif centroids is not None:
                found += np.vecdot(queries[which], centroids[leaf[part]])
            if segment.factors is not None:
                found *= factor_table().take(segment.factors[copy[part]])
            np.maximum.at(scores, item[part], found)
    return scores


def _copies_of(segment, rows, query, leaves):
    """The copies of documents `rows` (J,) in the leaves (N, b) of `query` (J,).

    Returns:
        item (c,) in 0 .. J - 1, leaf (c,) and copy (c,) of each copy found.
    """
    offsets, leaf_rows = segment.leaf_offsets, segment.leaf_rows
    # Rows of other segments become numbers that are no row of this one.
    wanted = (rows - segment.first_row).astype(np.uint32)
    if len(leaves) == 1:  # every item may be in every leaf
        distinct, visits = leaves[0], [np.arange(len(rows))] * leaves.shape[1]
    else:
        distinct, visits = group_by(leaves[query].ravel())
        visits = [visit // leaves.shape[1] for visit in visits]
    starts, stops = offsets[distinct].tolist(), offsets[distinct + 1].tolist()
    items, copies, counts = [], [], []
    for item, start, stop in zip(visits, starts, stops, strict=True):
        if start < stop:
            here = leaf_rows[start:stop]
            place = here.searchsorted(wanted[item])  # rows ascend within a leaf
            np.minimum(place, len(here) - 1, out=place)
            hit = here[place] == wanted[item]
            item, copy = item[hit], place[hit] + start
        else:  # an empty leaf, or the padding of leaves, -1
            item = copy = item[:0]
        items.append(item)
        copies.append(copy)
        counts.append(len(item))
    leaf = np.repeat(distinct, counts)
    return np.concatenate(items), leaf, np.concatenate(copies)
