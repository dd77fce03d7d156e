"""Hard negatives: from the leaves that a query visits (EHI), its teacher, or the data.

JPQ's negatives are not here: they come from the whole code table inside the step.
"""

import os
from typing import NamedTuple

import numpy as np

from ehi.data.candidates import Candidates
from ehi.index import Index, build_index
from ehi.index.search.search import queries_at_once
from ehi.parallel.processes import gather_rows, process_slice
from ehi.progress import Progress
from ehi.train.batch import TrainingSet

# Documents that an exhaustive search has in memory at once.
SEARCHED = 2**17


def mine_from_teacher(
    documents: np.ndarray, queries: np.ndarray, data: TrainingSet, *, per_query: int,
    rows: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The documents that a teacher ranks first, without known positives.

    The search is exhaustive, 2 D operations for each query and document, so pass only
    the rows that the phase draws. Several processes share them as in
    `mine_from_leaves`.

    Args:
      documents, queries: embeddings (rows, D) by the teacher.
      data: names the known positives.
      per_query: documents kept for a query.
      rows: (n,) distinct rows of the query table; see `drawn_queries`.

    Returns:
      document rows (n, per_query) int32 of the n queries, best first, padded with -1.

    References:
      Distill-VQ: Xiao et al. 2022, arXiv 2204.00185, section 3.3 (top-200).
    """
    own, threads = process_slice(), len(os.sched_getaffinity(0))
    k, known = _candidates(data, rows[own], per_query)
    found = search_whole(documents, queries[rows[own]], k, threads)
    return gather_rows(_negatives(found, known, per_query), len(rows))


def given_negatives(
    candidates: Candidates, data: TrainingSet, *, per_query: int, rows: np.ndarray
) -> np.ndarray:
    """The documents that come with each query, without known positives.

    A query with fewer than `per_query` has them again, so that each draw gives one.

    Args:
      candidates: of the first rows of the query table.
      data: names the known positives.
      per_query: negatives kept for a query, the first of its list.
      rows: (n,) rows of the query table.

    Returns:
      document rows (n, per_query) int32, padded with -1; all -1 for queries that have
      none.
    """
    offsets, documents = candidates.offsets, candidates.documents.astype(np.int64)
    queries = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    row, known = data.positives(np.arange(len(offsets) - 1))
    num = data.num_documents
    negative = ~np.isin(queries * num + documents, row * num + known)
    queries, documents = queries[negative], documents[negative]
    first = np.searchsorted(queries, np.arange(len(offsets)))
    counts = np.diff(first)  # of each query
    some = np.flatnonzero(counts)
    places = np.arange(per_query) % counts[some, None]
    table = np.full((len(counts) + 1, per_query), -1, np.int32)
    table[some] = documents[first[some, None] + places]
    return table[np.minimum(rows, len(counts))]  # other queries have none


def mine_from_leaves(
    index: Index,
    query_embeddings: np.ndarray,
    data: TrainingSet,
    *,
    per_query: int,
    beam: int,
    rows: np.ndarray | None = None,
    threads: int = 1,
) -> np.ndarray:
    """The best documents of the visited leaves, without known positives.

    The NumPy search that serves users searches the index of the current parameters, so
    a mined negative is what a user would wrongly see.

    Several processes call this together. Each of P processes searches for every P-th
    row, and all get the same result for all rows. If scores differ in the last bits
    only, the order may depend on the number of processes.

    Args:
      index: of the current parameters, the whole index in each process; its document
        ids are row numbers.
      query_embeddings: (n, D), one for each row of `rows`.
      data: names the known positives.
      per_query: negatives kept for a query.
      beam: leaves that a query visits.
      rows: (n,) distinct rows of the query table; None for its first n.
      threads: of the search.

    Returns:
      document rows (n, per_query) int32 of the n queries, best first, padded with -1.
    """
    rows = np.arange(len(query_embeddings)) if rows is None else rows
    own = process_slice()
    k, known = _candidates(data, rows[own], per_query)
    beam = min(beam, index.num_leaves)
    found = _search(index, query_embeddings[own], k, beam, threads).ids
    return gather_rows(_negatives(found, known, per_query), len(rows))


def search_whole(
    documents: np.ndarray, queries: np.ndarray, k: int, threads: int = 1
) -> np.ndarray:
    """The k documents with the largest inner products, of all documents.

    At most `SEARCHED` documents are in memory at once.

    Args:
      documents: (rows, D), a memory map or an array.
      queries: (n, D).
      k: at most all documents.
      threads: of the search.

    Returns:
      document rows (n, k), best first; of equal scores the smaller row.
    """
    best = None
    for start in range(0, len(documents), SEARCHED):
        part = np.asarray(documents[start : start + SEARCHED], np.float32)
        index = build_index(part, np.arange(start, start + len(part)), tree=None)
        hits = _search(index, queries, min(k, len(part)), 1, threads)
        if best is None:
            best = hits.scores, hits.ids
            continue
        scores, ids = (
            np.concatenate(both, axis=1)
            for both in zip(best, (hits.scores, hits.ids), strict=True)
        )
        # The rows so far are smaller, and stay in front of equal scores.
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = tuple(np.take_along_axis(x, order, axis=1) for x in (scores, ids))
    return best[1]


class _Hits(NamedTuple):
    scores: np.ndarray  # (n, k)
    ids: np.ndarray  # (n, k)


def _search(index, queries, k: int, beam: int, threads: int) -> _Hits:
    """The k best of all queries, searched in parts so that progress is logged."""
    step, found = queries_at_once(index.parameters, beam, k), []
    with Progress("mine negatives", len(queries), "queries", bar=False) as progress:
        for start in range(0, max(len(queries), 1), step):
            part = queries[start : start + step]
            hits = index.search(part, k, beam=beam, threads=threads)
            found.append((hits.scores, hits.ids))
            progress.update(len(part))
    return _Hits(*map(np.concatenate, zip(*found, strict=True)))


def _candidates(data, rows, per_query: int):
    """Documents to find for each query, so that enough are left without positives.

    Returns the number k, and (number of documents, query, positive) of the n queries
    whose rows of the table are given.
    """
    row, known = data.positives(rows)
    most = np.bincount(row, minlength=1).max()
    k = min(per_query + int(most), data.num_documents)
    return k, (data.num_documents, row.astype(np.int64), known)


def _negatives(found, positives, per_query: int) -> np.ndarray:
    """The first negatives (n, per_query) int32 of documents found (n, k)."""
    num, row, known = positives
    positive_keys = np.unique(row * num + known)
    keys = np.arange(len(found))[:, None] * num + found
    negative = (found >= 0) & ~np.isin(keys, positive_keys)
    # A stable sort moves the negatives to the front and keeps their order.
    order = np.argsort(~negative, axis=1, kind="stable")[:, :per_query]
    kept = np.take_along_axis(np.where(negative, found, -1), order, axis=1)
    # Padding to `per_query` gives all processes the same width.
    missing = per_query - kept.shape[1]
    return np.pad(kept, ((0, 0), (0, missing)), constant_values=-1).astype(np.int32)
