"""Hard negatives: from the leaves that a query visits (EHI), or from its teacher.

JPQ's negatives are not here: they come from the whole code table inside the step.
"""

import numpy as np

from ehi.index import Index, build_index
from ehi.train.pool import TrainingSet


def mine_from_teacher(
    documents: np.ndarray, queries: np.ndarray, data: TrainingSet, *, per_query: int
) -> np.ndarray:
    """The documents that a teacher ranks first, known positives left out.

    Args:
      documents, queries: embeddings (rows, D) by the teacher.
      data: tells which documents are known positives.
      per_query: documents kept for a query.

    Returns:
      document rows (rows, per_query) int32, best first, padded with -1.

    References:
      Distill-VQ: Xiao et al. 2022, arXiv 2204.00185, section 3.3 (top-200).
    """
    index = build_index(documents, np.arange(len(documents)), tree=None)
    return mine_from_leaves(index, queries, data, per_query=per_query, beam=1)


def mine_from_leaves(
    index: Index,
    query_embeddings: np.ndarray,
    data: TrainingSet,
    *,
    per_query: int,
    beam: int,
    threads: int = 1,
) -> np.ndarray:
    """The best-scored documents of the visited leaves that are not known positives.

    The search is the NumPy search that serves users, over the index of the current
    parameters, so a mined negative is exactly what a user would wrongly be shown.

    Args:
      index: of the current parameters; its document ids are row numbers.
      query_embeddings: (rows, D), one for each row of the query table.
      data: tells which documents are known positives.
      per_query: negatives kept for a query.
      beam: leaves a query visits.

    Returns:
      document rows (rows, per_query) int32, best first, padded with -1.
    """
    rows = len(query_embeddings)
    most = np.bincount(data.positives(np.arange(rows))[0], minlength=rows).max()
    k = min(per_query + int(most), data.num_documents)
    beam = min(beam, index.num_leaves)
    found = index.search(query_embeddings, k, beam=beam, threads=threads).ids  # (N, k)
    row, known = data.positives(np.arange(rows))
    num = data.num_documents
    positive_keys = np.unique(row.astype(np.int64) * num + known)
    keys = np.arange(rows)[:, None] * num + found
    negative = (found >= 0) & ~np.isin(keys, positive_keys)
    # A stable sort moves the kept ones to the front without changing their order.
    order = np.argsort(~negative, axis=1, kind="stable")[:, :per_query]
    kept = np.take_along_axis(np.where(negative, found, -1), order, axis=1)
    mined = np.full((rows, per_query), -1, np.int32)
    mined[:, : kept.shape[1]] = kept
    return mined
