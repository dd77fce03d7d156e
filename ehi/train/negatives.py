"""Hard negatives: from the leaves that a query visits (EHI), or from its teacher.

JPQ's negatives are not here: they come from the whole code table inside the step.
"""

import os

import numpy as np

from ehi.index import Index, build_index
from ehi.index.search.search import queries_at_once
from ehi.parallel.processes import gather_rows, process_slice
from ehi.progress import Progress
from ehi.train.batch import TrainingSet


def mine_from_teacher(
    documents: np.ndarray, queries: np.ndarray, data: TrainingSet, *, per_query: int,
    rows: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The documents that a teacher ranks first, known positives left out.

    Exhaustive, 2 D operations for each of the rows and each document, so it is done for
    those rows only that the phase will draw. Several processes share them, as of
    `mine_from_leaves`.

    Args:
      documents, queries: embeddings (rows, D) by the teacher.
      data: tells which documents are known positives.
      per_query: documents kept for a query.
      rows: (n,) distinct rows of the query table; see `drawn_queries`.

    Returns:
      document rows (rows, per_query) int32, best first, padded with -1; all -1 in rows
      that were not asked for.

    References:
      Distill-VQ: Xiao et al. 2022, arXiv 2204.00185, section 3.3 (top-200).
    """
    index = build_index(documents, np.arange(len(documents)), tree=None)
    return mine_from_leaves(
        index, queries[rows], data, per_query=per_query, beam=1, rows=rows,
        threads=len(os.sched_getaffinity(0)),
    )  # fmt: skip


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
    """The best-scored documents of the visited leaves that are not known positives.

    The search is the NumPy search that serves users, over the index of the current
    parameters, so a mined negative is exactly what a user would wrongly be shown.

    Several processes call this together: of P each searches for every P-th row, and all
    get all of them, the same whatever their hardware rounds. Of scores that differ in
    the last bits only, another number of processes may put another first.

    Args:
      index: of the current parameters, whole in each process; its document ids are row
        numbers.
      query_embeddings: (n, D), one for each of `rows`.
      data: tells which documents are known positives.
      per_query: negatives kept for a query.
      beam: leaves a query visits.
      rows: (n,) distinct rows of the query table; None for its first n.
      threads: of the search.

    Returns:
      document rows (rows, per_query) int32, best first, padded with -1; all -1 in rows
      that were not asked for.
    """
    rows = np.arange(len(query_embeddings)) if rows is None else rows
    own = process_slice()
    kept = _best_negatives(
        index, query_embeddings[own], data, rows[own], per_query, beam, threads
    )
    mined = np.full((data.num_queries, per_query), -1, np.int32)
    mined[rows] = gather_rows(kept, len(rows))
    return mined


def _search(index, queries, k: int, beam: int, threads: int) -> np.ndarray:
    """Ids (n, k) of one search of all queries, done in parts that can be counted."""
    step, ids = queries_at_once(index.parameters, beam, k * index.spill), []
    with Progress("mine negatives", len(queries), "queries", bar=False) as progress:
        for start in range(0, max(len(queries), 1), step):
            part = queries[start : start + step]
            ids.append(index.search(part, k, beam=beam, threads=threads).ids)
            progress.update(len(part))
    return np.concatenate(ids)


def _best_negatives(index, queries, data, rows, per_query, beam, threads) -> np.ndarray:
    """Negatives (n, per_query) int32 of the n queries that are `rows` of the table."""
    row, known = data.positives(rows)
    most = np.bincount(row, minlength=1).max()
    k = min(per_query + int(most), data.num_documents)
    beam = min(beam, index.num_leaves)
    found = _search(index, queries, k, beam, threads)  # (n, k)
    num = data.num_documents
    positive_keys = np.unique(row.astype(np.int64) * num + known)
    keys = np.arange(len(rows))[:, None] * num + found
    negative = (found >= 0) & ~np.isin(keys, positive_keys)
    # A stable sort moves the kept ones to the front without changing their order.
    order = np.argsort(~negative, axis=1, kind="stable")[:, :per_query]
    kept = np.take_along_axis(np.where(negative, found, -1), order, axis=1)
    # Fewer documents than asked for: the same width in all processes.
    missing = per_query - kept.shape[1]
    return np.pad(kept, ((0, 0), (0, missing)), constant_values=-1).astype(np.int32)
