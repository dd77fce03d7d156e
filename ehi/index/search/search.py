"""What all parts of one search share."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ehi.index.check import check_count, check_queries, check_results, check_share
from ehi.index.contents import as_ids
from ehi.index.errors import IndexCorruptError
from ehi.index.search.batch import scores_order, search_by_leaf
from ehi.index.search.blas import map_threads, one_blas_thread
from ehi.index.search.one_query import search_by_query
from ehi.index.search.routing import Routes, route, rows_at_once
from ehi.index.search.topk import EMPTY, pack, smallest, unpack


class Job(NamedTuple):
    """The arguments of a search, checked: see `Index.search`.

    Attributes:
        index: the Index, for its parameters.
        contents: its documents at one moment.
        mask: (R,) bool by row, the documents to consider, or None for all.
        k, beam, min_prob, rerank, threads: as the caller gave them.
    """

    index: object
    contents: object
    mask: np.ndarray | None
    k: int
    beam: int
    min_prob: float
    rerank: int
    threads: int

    @property
    def candidates(self):
        """Documents to find of each query."""
        return self.rerank or self.k

    @property
    def copies(self):
        """Copies to find for that: one document may stand in `spill` leaves."""
        return self.candidates * self.index.spill


# MERGED ehi_index_hits: What a search returns.


@dataclass(eq=False, slots=True)
class Hits:
    """Results of N queries.

    Attributes:
        ids: (N, k) external ids, best first: int64 padded with -1, or objects, str
            padded with None.
        scores: (N, k) float32, padded with -inf.
        visited: (N,) int64 copies of documents scored, those in the visited leaves that
            are neither deleted nor filtered out; spilled duplicates count.
        nodes_scored: (N,) int64 tree nodes whose score was computed.
        leaves: (N, b) int64 leaves visited, best first, padded with -1.
        rows: (N, k) int64 document numbers, in the order they were added, padded with
            -1; `compact` gives new ones.
    """

    ids: np.ndarray
    scores: np.ndarray
    visited: np.ndarray
    nodes_scored: np.ndarray
    leaves: np.ndarray
    rows: np.ndarray


# MERGED ehi_index_search: Search: route -> score -> drop duplicates -> re-rank -> top
# k.
#
# Documents that a mask leaves out (deleted, or filtered) are dropped before the top k
# is
# taken, so k results come back whenever the visited leaves hold as many.
#

_RERANK_VALUES = 2**22
_ROUTED_QUERIES = 64  # of a thread, from which its start is worth it
# Mean queries of a leaf from which grouping by leaf pays, by the order of scores. At 3
# it takes 0.7 to 0.9 times as long of vectors (200,000 x 384, 8 of 512 leaves).
_SHARED_VECTORS, _SHARED_CODES = 2, {"C": 4, "F": 3}


class Found(NamedTuple):
    """What a search returns, documents by row: see `Hits` for the fields."""

    rows: np.ndarray
    scores: np.ndarray
    visited: np.ndarray
    nodes_scored: np.ndarray
    leaves: np.ndarray


def search(
    index, contents, queries, k, *, beam=1, min_prob=0.0, rerank=0, threads=1,
    mask=None, leaves=None,
):  # fmt: skip
    """The k best documents in the leaves that each query visits: Found.

    Args:
        index, contents: the Index, and its documents at one moment.
        queries, k, beam, min_prob, rerank, threads: as of `Index.search`.
        mask: (R,) bool, documents to consider, or None for all.
        leaves: (N, b) where the queries go, of `route_queries` with this beam and
            min_prob, or None: they are routed here.

    Raises:
        ValueError: queries of another width or dtype or not finite; k, beam, min_prob,
            rerank or threads out of range; rerank without stored vectors.
    """
    queries = check_queries(queries, index.width)
    k = check_results("k", k, contents.num_documents)
    beam, min_prob = check_beam(index, beam), check_share("min_prob", min_prob)
    threads = check_count("threads", threads)
    rerank = _check_rerank(contents, rerank, k)
    copies = (rerank or k) * index.spill
    step = 1
    if len(queries) > 1:
        step = min(rows_at_once(index.routing_tree, beam), max(1, 2**22 // copies))
    job = Job(index, contents, mask, k, beam, min_prob, rerank, threads)
    with one_blas_thread():
        parts = [
            _search_part(
                job,
                queries[start : start + step],
                None if leaves is None else leaves[start : start + step],
            )
            for start in range(0, max(len(queries), 1), step)
        ]
    if len(parts) == 1:
        return parts[0]
    *found, leaves = zip(*parts, strict=True)
    return Found(*map(np.concatenate, found), _joined(leaves))


def route_queries(index, queries, beam=1, min_prob=0.0):
    """Where queries go: (N, b) leaves, padded with -1, and (N,) tree nodes scored.

    Raises:
        ValueError: as of `search`.
    """
    parts = [part for _, part in _routed(index, queries, beam, min_prob)]
    nodes_scored = np.concatenate([part.nodes_scored for part in parts])
    return _joined([part.leaves for part in parts]), nodes_scored


def _routed(index, queries, beam, min_prob):
    """Slices of the queries, and the Routes of each."""
    queries = check_queries(queries, index.width)
    beam, min_prob = check_beam(index, beam), check_share("min_prob", min_prob)
    step = rows_at_once(index.routing_tree, beam)
    with one_blas_thread():
        for start in range(0, max(len(queries), 1), step):
            part = slice(start, start + step)
            yield part, route(queries[part], index.routing_tree, beam, min_prob, False)


def _joined(parts):
    """Leaves (n, b) of parts with other b, padded with -1 to the widest: (N, b)."""
    widest = max(part.shape[1] for part in parts)
    widened = [
        np.pad(part, ((0, 0), (0, widest - part.shape[1])), constant_values=-1)
        for part in parts
    ]
    return np.concatenate(widened)


def row_mask(contents, allow=None, deny=None):
    """Which documents may be found: (R,) bool by row, or None for all of them.

    Args:
        allow, deny: external ids, or a bool mask (R,), or None.

    Raises:
        ValueError: a mask of another length, ids of another kind.
    """
    mask = None if contents.deleted is None else ~contents.deleted
    if allow is not None:
        allowed = _as_mask(contents, "allow", allow)
        mask = allowed if mask is None else mask & allowed
    if deny is not None:
        kept = ~_as_mask(contents, "deny", deny)
        mask = kept if mask is None else mask & kept
    return mask


def _as_mask(contents, name, chosen):
    if isinstance(chosen, np.ndarray) and chosen.dtype == bool:
        if chosen.shape != (contents.num_rows,):
            raise ValueError(
                f"{name} is a mask of shape {chosen.shape}, this index has "
                f"{contents.num_rows} rows (deleted documents included)"
            )
        return chosen
    mask = np.zeros(contents.num_rows, bool)
    rows = contents.find(as_ids(chosen))
    mask[rows[rows >= 0]] = True
    return mask


def count_visited(index, contents, queries, beam, min_prob=0.0):
    """Copies of documents in the leaves that each query visits: (N,) int64."""
    visited = np.zeros(len(queries), np.int64)
    for part, routes in _routed(index, queries, beam, min_prob):
        leaves = routes.leaves
        sizes = np.where(leaves < 0, 0, contents.leaf_sizes[leaves])
        visited[part] = sizes.sum(axis=1)
    return visited


def check_beam(index, beam):
    """`beam` as an int between 1 and the number of leaves."""
    beam = check_count("beam", beam)
    if beam > index.num_leaves:
        raise ValueError(f"beam {beam} is larger than the {index.num_leaves} leaves")
    return beam


def _check_rerank(contents, rerank, k):
    rerank = check_results("rerank", rerank, contents.num_documents, least=0)
    if rerank and contents.segments[0].rerank_vectors is None:
        raise ValueError(
            f"rerank={rerank} needs an index built with rerank_vectors=True, "
            "this one stores none"
        )
    if 0 < rerank < k:
        raise ValueError(f"rerank={rerank} candidates are fewer than k={k}")
    return rerank


def _search_part(job, queries, leaves):
    index, nodes_scored = job.index, np.zeros(len(queries), np.int64)
    if leaves is None:
        routes = _route(job, queries)
        leaves, nodes_scored = routes.leaves, routes.nodes_scored
    rotated = queries if index.rotation is None else queries @ index.rotation
    find = search_by_leaf if _share_leaves(index, leaves) else search_by_query
    try:
        scores, rows, visited = find(job, queries, rotated, leaves)
    except IndexError as error:  # of a mask, at a row that is not there
        raise IndexCorruptError(f"leaf_rows points outside: {error}") from None
    if np.maximum.reduce(rows, axis=None, initial=-1) >= job.contents.num_rows:
        raise IndexCorruptError(
            f"leaf_rows points at row {rows.max()} of {job.contents.num_rows} documents"
        )
    if job.rerank:
        scores, rows = _rescore(job, queries, rows)
    return Found(rows, scores, visited, nodes_scored, leaves)


def _route(job, queries):
    """The Routes of queries, found by all threads."""

    def go(part):
        return route(part, job.index.routing_tree, job.beam, job.min_prob, False)

    threads = min(job.threads, 1 + len(queries) // _ROUTED_QUERIES)
    if threads == 1 or job.min_prob:  # which scores the nodes that any query needs
        return go(queries)
    parts = map_threads(go, np.array_split(queries, threads), threads)
    return Routes(*map(np.concatenate, zip(*parts, strict=True)))


def _share_leaves(index, leaves):
    coded = index.codebooks is not None
    least = _SHARED_CODES[scores_order()] if coded else _SHARED_VECTORS
    if len(leaves) < least:
        return False
    visits = np.count_nonzero(leaves >= 0)
    return visits >= least * len(np.unique(leaves))


def _rescore(job, queries, rows):
    """The k best candidates of `rows` (N, r), by their stored full-precision vectors.

    Returns:
        (N, k) float32 scores, (N, k) int64 rows.
    """
    step = max(1, _RERANK_VALUES // (rows.shape[1] * job.index.width))
    scores = np.empty(rows.shape, np.float32)

    def rescore(start):
        part = slice(start, start + step)
        vectors = job.contents.rerank_vectors(np.maximum(rows[part], 0))
        scores[part] = np.matmul(vectors, queries[part, :, None])[:, :, 0]

    map_threads(rescore, range(0, len(rows), step), job.threads)
    return unpack(smallest(np.where(rows < 0, EMPTY, pack(scores, rows)), job.k))
