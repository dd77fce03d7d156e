"""Search: route -> score -> drop duplicates -> re-rank -> top k."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ehi.index.check import check_count, check_queries
from ehi.index.folder import IndexCorruptError
from ehi.index.route import group_by, route, rows_at_once
from ehi.index.score import score_block, score_leaves
from ehi.index.threads import one_blas_thread
from ehi.index.topk import TopK, drop_duplicates, pack, smallest, unpack

_BLOCK_SCORES = 2**19  # scores computed by one GEMM: they stay in the cache
_RERANK_VALUES = 2**22
_SHARED_LEAF = 2  # mean queries of a leaf from which grouping by leaf pays


class Found(NamedTuple):
    """What a search returns, documents by row: see `Hits` for the fields."""

    rows: np.ndarray
    scores: np.ndarray
    visited: np.ndarray
    nodes_scored: np.ndarray
    leaves: np.ndarray


def search(index, queries, k, *, beam=1, rerank=0, threads=1):
    """The k best documents in the `beam` best leaves of each query: Found.

    Raises:
        ValueError: queries of another width or dtype or not finite; k, beam, rerank or
            threads out of range; rerank without stored vectors.
    """
    queries = check_queries(queries, index.width)
    k = check_count("k", k)
    beam = check_beam(index, beam)
    threads = check_count("threads", threads)
    rerank = _check_rerank(index, rerank, k)
    copies = (rerank or k) * index.spill
    step = min(rows_at_once(index.routing_tree, beam), max(1, 2**22 // copies))
    with one_blas_thread():
        parts = [
            _search_part(index, queries[start : start + step], k, beam, rerank, threads)
            for start in range(0, max(len(queries), 1), step)
        ]
    return Found(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def count_visited(index, queries, beam):
    """Copies of documents in the leaves that each query visits: (N,) int64."""
    queries = check_queries(queries, index.width)
    beam = check_beam(index, beam)
    step = rows_at_once(index.routing_tree, beam)
    visited = np.zeros(len(queries), np.int64)
    with one_blas_thread():
        for start in range(0, len(queries), step):
            routes = route(queries[start : start + step], index.routing_tree, beam)
            visited[start : start + step] = _visited(index, routes.leaves)
    return visited


def check_beam(index, beam):
    """`beam` as an int between 1 and the number of leaves."""
    beam = check_count("beam", beam)
    if beam > index.num_leaves:
        raise ValueError(f"beam {beam} is larger than the {index.num_leaves} leaves")
    return beam


def _check_rerank(index, rerank, k):
    rerank = check_count("rerank", rerank, least=0)
    if rerank and index.rerank_vectors is None:
        raise ValueError(
            f"rerank={rerank} needs an index built with rerank_vectors=True, "
            "this one stores none"
        )
    if 0 < rerank < k:
        raise ValueError(f"rerank={rerank} candidates are fewer than k={k}")
    return rerank


def _visited(index, leaves):
    return index.leaf_sizes[leaves].sum(axis=1)


def _search_part(index, queries, k, beam, rerank, threads):
    routes = route(queries, index.routing_tree, beam)
    rotated = queries if index.rotation is None else queries @ index.rotation
    wanted = rerank or k
    find = _search_by_leaf if _share_leaves(routes.leaves) else _search_by_query
    keys = find(index, queries, rotated, routes.leaves, wanted * index.spill, threads)
    if index.spill > 1:
        keys = drop_duplicates(keys, wanted)
    found = unpack(keys)[1]
    if found.size and found.max() >= index.num_documents:
        raise IndexCorruptError(
            f"leaf_rows points at row {found.max()} of {index.num_documents} documents"
        )
    if rerank:
        keys = _rescore(index, queries, keys)
    scores, rows = unpack(keys[:, :k])
    visited = _visited(index, routes.leaves)
    return Found(rows, scores, visited, routes.nodes_scored, routes.leaves)


def _share_leaves(leaves):
    if len(leaves) < _SHARED_LEAF:
        return False
    return leaves.size >= _SHARED_LEAF * len(np.unique(leaves))


def _search_by_query(index, queries, rotated, leaves, k, threads):
    """Each query reads its own leaves: best where queries share few."""
    del threads  # one query is too little work to share
    keys = np.empty((len(queries), k), np.int64)
    for query in range(len(queries)):
        scores, rows = score_leaves(
            index, queries[query], rotated[query], leaves[query]
        )
        if len(scores) > k:
            cut = len(scores) - k
            best = np.flatnonzero(scores >= np.partition(scores, cut)[cut])
            scores, rows = scores[best], rows[best]
        keys[query] = smallest(pack(scores, rows)[None], k)[0]
    return keys


def _search_by_leaf(index, queries, rotated, leaves, k, threads):
    """Each leaf is read once, for all queries that visit it: one GEMM a block."""
    tasks = []  # leaf, its queries, first and last copy
    for leaf, positions in zip(*group_by(leaves.ravel()), strict=True):
        members = positions // leaves.shape[1]
        block = max(_BLOCK_SCORES // len(members), 2 * k, 256)
        start, stop = index.leaf_offsets[leaf : leaf + 2].tolist()
        cuts = [*range(start, stop, block), stop]
        tasks += [(leaf, members, *span) for span in itertools.pairwise(cuts)]
    tasks.sort(key=lambda task: len(task[1]) * (task[3] - task[2]), reverse=True)

    floor = np.full(len(queries), -np.inf, np.float32)
    best = [TopK(len(queries), k, floor) for _ in range(threads)]

    def run(thread):
        for leaf, members, start, stop in tasks[thread::threads]:
            scores = score_block(
                index, queries[members], rotated[members], leaf, start, stop
            )
            best[thread].offer(members, scores, index.leaf_rows[start:stop])

    if threads == 1:
        run(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(threads)))
    for other in best[1:]:
        best[0].merge(other)
    return best[0].result()


def _rescore(index, queries, keys):
    """The same candidates, ordered by their stored full-precision vectors."""
    rows = unpack(keys)[1]  # (N, r)
    step = max(1, _RERANK_VALUES // (rows.shape[1] * index.width))
    scores = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        vectors = index.rerank_vectors[np.maximum(rows[part], 0)].astype(np.float32)
        scores[part] = np.matmul(vectors, queries[part, :, None])[:, :, 0]
    return np.sort(np.where(rows < 0, keys, pack(scores, rows)), axis=1)
