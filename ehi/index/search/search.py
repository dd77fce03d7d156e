"""One search, from queries to results: route -> score -> score again -> top k.

Documents that are deleted or filtered out are dropped before the top k is taken. So k
results come back whenever the visited leaves hold k documents that may be found.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ehi.index.check import (
    IndexCorruptError,
    check_count,
    check_queries,
    check_results,
    check_share,
)
from ehi.index.contents import Contents, as_ids
from ehi.index.parameters import Parameters
from ehi.index.search.batch import scores_order, search_by_leaf
from ehi.index.search.blas import map_threads, one_blas_thread
from ehi.index.search.one_query import search_by_query
from ehi.index.search.routing import Routes, route, rows_at_once
from ehi.index.search.ties import settle
from ehi.index.search.topk import keys_of, smallest, unpack

_RERANK_VALUES = 2**22  # numbers of stored vectors that are read at once
_ROUTED_QUERIES = 64  # per thread; a thread that routes fewer does not pay
# Reading each leaf once for all its queries pays from this mean number of queries per
# leaf on. For codes it depends on the order of scores. At a mean of 3, it takes 0.7 to
# 0.9 times as long for vectors (200,000 x 384, 8 of 512 leaves).
_SHARED_VECTORS, _SHARED_CODES = 2, {"C": 4, "F": 3}


@dataclass(eq=False, slots=True)
class Hits:
    """Results of N queries.

    Attributes:
        ids: (N, k) external ids, best first. They are int64 padded with -1, or objects
            (str) padded with None.
        scores: (N, k) float32, padded with -inf.
        visited: (N,) int64 copies of documents that were scored. They are in the
            visited leaves and neither deleted nor filtered out. A spilled document
            counts once for each of its copies.
        nodes_scored: (N,) int64 tree nodes that were scored.
        leaves: (N, b) int64 leaves that were visited, best first, padded with -1.
        rows: (N, k) int64 numbers of the documents in the order they were added,
            padded with -1; `compact` numbers them anew.

    Example:
        >>> import numpy as np
        >>> from ehi.index import build_index
        >>> index = build_index(np.eye(3), ["a", "b", "c"], tree=None)
        >>> hits = index.search(np.array([[0.1, 0.9, 0.5]]), k=2)
        >>> hits.ids.tolist(), hits.rows.tolist(), hits.visited.tolist()
        ([['b', 'c']], [[1, 2]], [3])
    """

    ids: np.ndarray
    scores: np.ndarray
    visited: np.ndarray
    nodes_scored: np.ndarray
    leaves: np.ndarray
    rows: np.ndarray


class Found(NamedTuple):
    """`Hits` without external ids."""

    rows: np.ndarray
    scores: np.ndarray
    visited: np.ndarray
    nodes_scored: np.ndarray
    leaves: np.ndarray


class Request(NamedTuple):
    """The checked arguments of one search: see `Index.search`.

    Attributes:
        parameters: the Parameters of the index.
        contents: its documents at one moment.
        mask: (R,) bool by row, the documents that may be found, or None for all.
        k, beam, min_prob, rerank, threads: as the caller gave them.
    """

    parameters: Parameters
    contents: Contents
    mask: np.ndarray | None
    k: int
    beam: int
    min_prob: float
    rerank: int
    threads: int

    @property
    def found(self):
        """Documents to find for each query: one more than needed, see `settle`."""
        return (self.rerank or self.k) + 1

    @property
    def copies(self):
        """Copies that surely contain `found` documents: each has at most `spill`."""
        return self.found * self.parameters.spill


def search(
    parameters, contents, queries, k, *, beam=1, min_prob=0.0, rerank=0, threads=1,
    mask=None, leaves=None,
):  # fmt: skip
    """The k best documents in the leaves that each query visits: Found.

    Args:
        parameters, contents: those of the index.
        queries, k, beam, min_prob, rerank, threads: as of `Index.search`.
        mask: (R,) bool, the documents that may be found, or None for all.
        leaves: (N, b) leaves that the queries visit, as `route_queries` returns them
            for this beam and min_prob, or None to route the queries here.

    Raises:
        ValueError: queries of another width or dtype or not finite; k, beam, min_prob,
            rerank or threads out of range; rerank without stored vectors.
    """
    queries = check_queries(queries, parameters.width)
    k = check_results("k", k, contents.num_documents)
    beam, min_prob = check_beam(parameters, beam), check_share("min_prob", min_prob)
    threads = check_count("threads", threads)
    rerank = _check_rerank(contents, rerank, k)
    request = Request(parameters, contents, mask, k, beam, min_prob, rerank, threads)
    step = 1
    if len(queries) > 1:
        step = queries_at_once(parameters, beam, rerank or k)
    with one_blas_thread():
        parts = [
            _search_part(
                request,
                queries[start : start + step],
                None if leaves is None else leaves[start : start + step],
            )
            for start in range(0, max(len(queries), 1), step)
        ]
    if len(parts) == 1:
        return parts[0]
    *found, leaves = zip(*parts, strict=True)
    return Found(*map(np.concatenate, found), joined(leaves))


def queries_at_once(parameters, beam, k):
    """The number of queries that a search handles together.

    Searches of this many queries each give the same bits as one search of all.

    Args:
        parameters: those of the index.
        beam: leaves that a query visits.
        k: results of each query, or candidates to re-rank.
    """
    routed = rows_at_once(parameters.routing_tree, beam)
    copies = (k + 1) * parameters.spill  # see `Request`
    return min(routed, max(1, 2**22 // copies))


def as_queries(index, queries):
    """Queries as float32 (N, D), at least one; texts are encoded.

    Raises:
        ValueError: none, or such that the index refuses them.
    """
    if isinstance(queries, str) or (
        len(queries) and all(isinstance(query, str) for query in queries)
    ):
        queries = index.text_encoder(queries)
    queries = check_queries(queries, index.width)
    if not len(queries):
        raise ValueError("there are no queries")
    return queries


def check_beam(parameters, beam):
    """`beam` as an int between 1 and the number of leaves."""
    beam = check_count("beam", beam)
    if beam > parameters.num_leaves:
        raise ValueError(
            f"beam {beam} is larger than the {parameters.num_leaves} leaves"
        )
    return beam


def check_setting(parameters, setting):
    """A stored search setting whose beam, min_prob and rerank fit; None stays None.

    Raises:
        ValueError: one is missing or does not fit.
    """
    if setting is None:
        return None
    return {
        **setting,
        "beam": check_beam(parameters, setting["beam"]),
        "min_prob": check_share("min_prob", setting["min_prob"]),
        "rerank": check_count("rerank", setting["rerank"], least=0),
    }


def default_setting(parameters, contents):
    """The stored beam, min_prob and rerank, or None if the index stores none.

    They are those of `Index.tune`, or else those in the identity of the encoder, where
    whoever trained the index wrote 'default_beam' and 'default_min_prob'.
    """
    stored = contents.setting
    if stored is None:
        encoder = parameters.encoder or {}
        beam = encoder.get("default_beam")
        if not isinstance(beam, int) or beam < 1:
            return None
        # A flat index may have the beam of a config with a tree.
        beam = min(beam, parameters.num_leaves)
        min_prob = encoder.get("default_min_prob", 0.0)
        return {"beam": beam, "min_prob": min_prob, "rerank": 0}
    return {name: stored[name] for name in ("beam", "min_prob", "rerank")}


def chosen_setting(parameters, contents, k, beam=None, min_prob=None, rerank=None):
    """beam, min_prob and rerank of a search whose caller may have left them out.

    If both beam and min_prob are left out, the stored ones count, or else one leaf.
    """
    stored = None
    if beam is None and min_prob is None:
        stored = default_setting(parameters, contents)
    if stored is None:
        stored = {"beam": 1, "min_prob": 0.0, "rerank": 0}
    if rerank is None and stored["rerank"]:
        k = check_results("k", k, contents.num_documents)
        rerank = max(stored["rerank"], k)
    return {
        "beam": stored["beam"] if beam is None else beam,
        "min_prob": stored["min_prob"] if min_prob is None else min_prob,
        "rerank": 0 if rerank is None else rerank,
    }


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


def _search_part(request, queries, leaves):
    """`search` of the queries that are routed at once."""
    parameters, nodes_scored = request.parameters, np.zeros(len(queries), np.int64)
    if leaves is None:
        routes = _route(request, queries)
        leaves, nodes_scored = routes.leaves, routes.nodes_scored
    rotation = parameters.rotation
    rotated = queries if rotation is None else queries @ rotation
    find = search_by_leaf if _share_leaves(parameters, leaves) else search_by_query
    try:
        scores, rows, visited = find(request, queries, rotated, leaves)
    except IndexError as error:  # a row that the mask does not have
        raise IndexCorruptError(f"leaf_rows points outside: {error}") from None
    num_rows = request.contents.num_rows
    if np.maximum.reduce(rows, axis=None, initial=-1) >= num_rows:
        raise IndexCorruptError(
            f"leaf_rows points at row {rows.max()} of {num_rows} documents"
        )
    scores, rows = settle(request, queries, rotated, leaves, scores, rows)
    if request.rerank:
        scores = rerank_scores(request.contents, queries, rows, request.threads)
        keys = keys_of(scores, rows)
        scores, rows = unpack(smallest(keys, request.k))
    return Found(rows, scores, visited, nodes_scored, leaves)


def _route(request, queries):
    """The Routes of queries, found by all threads."""
    tree = request.parameters.routing_tree

    def go(part):
        return route(part, tree, request.beam, request.min_prob, False)

    threads = min(request.threads, 1 + len(queries) // _ROUTED_QUERIES)
    # With a min_prob, all queries together decide which nodes are scored.
    if threads == 1 or request.min_prob:
        return go(queries)
    parts = map_threads(go, np.array_split(queries, threads), threads)
    return Routes(*map(np.concatenate, zip(*parts, strict=True)))


def _share_leaves(parameters, leaves):
    """Whether enough queries visit the same leaves to read each leaf once for all."""
    coded = parameters.codebooks is not None
    least = _SHARED_CODES[scores_order()] if coded else _SHARED_VECTORS
    if len(leaves) < least:
        return False
    visits = np.count_nonzero(leaves >= 0)
    return visits >= least * len(np.unique(leaves))


def rerank_scores(contents, queries, rows, threads=1):
    """Inner products of queries and the stored vectors of candidates.

    Args:
        contents: the documents, which store re-rank vectors.
        queries: (N, D) float32.
        rows: (N, r) candidates of each query, padded with -1.
        threads: Python threads over blocks of queries.

    Returns:
        (N, r) float32; meaningless where a row is -1.
    """
    step = max(1, _RERANK_VALUES // (rows.shape[1] * queries.shape[1]))
    scores = np.empty(rows.shape, np.float32)

    def score(start):
        part = slice(start, start + step)
        vectors = contents.rerank_vectors(np.maximum(rows[part], 0))  # (n, r, D)
        # It rounds equal vectors alike, which a matrix product does not.
        scores[part] = np.vecdot(vectors, queries[part, None])

    map_threads(score, range(0, len(rows), step), threads)
    return scores


def route_queries(parameters, queries, beam=1, min_prob=0.0):
    """Leaves that queries visit, (N, b) padded with -1, and (N,) tree nodes scored.

    Raises:
        ValueError: as of `search`.
    """
    parts = [part for _, part in routed(parameters, queries, beam, min_prob)]
    nodes_scored = np.concatenate([part.nodes_scored for part in parts])
    return joined([part.leaves for part in parts]), nodes_scored


def count_visited(parameters, contents, queries, beam, min_prob=0.0):
    """Copies of documents in the leaves that each query visits: (N,) int64."""
    visited = np.zeros(len(queries), np.int64)
    for part, routes in routed(parameters, queries, beam, min_prob):
        leaves = routes.leaves
        sizes = np.where(leaves < 0, 0, contents.leaf_sizes[leaves])
        visited[part] = sizes.sum(axis=1)
    return visited


def routed(parameters, queries, beam, min_prob):
    """Slices of the queries, and the Routes of each."""
    queries = check_queries(queries, parameters.width)
    beam, min_prob = check_beam(parameters, beam), check_share("min_prob", min_prob)
    tree = parameters.routing_tree
    step = rows_at_once(tree, beam)
    with one_blas_thread():
        for start in range(0, max(len(queries), 1), step):
            part = slice(start, start + step)
            yield part, route(queries[part], tree, beam, min_prob, False)


def joined(parts):
    """Leaves (n, b) of parts with different b, padded with -1 to the widest: (N, b)."""
    widest = max(part.shape[1] for part in parts)
    widened = [
        np.pad(part, ((0, 0), (0, widest - part.shape[1])), constant_values=-1)
        for part in parts
    ]
    return np.concatenate(widened)


def row_mask(contents, allow=None, deny=None, where=None):
    """The documents that may be found: (R,) bool by row, or None for all of them.

    Args:
        allow, deny: external ids, or a bool mask (R,), or None.
        where: a condition on metadata, or None.

    Raises:
        ValueError: a mask of another length, ids of another kind, or a condition that
            does not fit the metadata.
    """
    mask = None if contents.deleted is None else ~contents.deleted
    if allow is not None:
        allowed = _as_mask(contents, "allow", allow)
        mask = allowed if mask is None else mask & allowed
    if deny is not None:
        kept = ~_as_mask(contents, "deny", deny)
        mask = kept if mask is None else mask & kept
    if where is not None:
        met = contents.where(where)
        mask = met if mask is None else mask & met
    return mask


def _as_mask(contents, name, chosen):
    """Ids, or a mask, as a mask (R,)."""
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
