"""New leaves for documents: those where queries look for them (JTR)."""

import numpy as np

# Entries of Y and M that are multiplied at once: 0.4 GB of keys.
PRODUCTS = 2**24


def reassigned_leaves(
    top_documents: np.ndarray,
    reached: np.ndarray,
    fallback: np.ndarray,
    *,
    copies: int,
) -> np.ndarray:
    r"""The leaves that most queries reach which should find a document.

    .. math:: C^*_d = \mathrm{top}_\lambda \sum_q Y_{qd} M_{ql}

    with Y the best documents of each query by a teacher and M the leaves that the query
    reaches. Of equal counts the leaf that comes first in `fallback` wins, then the
    smaller number. A document with fewer leaves than copies, because few queries want
    it, takes the next leaves of `fallback`; the authors' code gives it fewer copies.

    Args:
      top_documents: Y, rows of documents (n, k), padded with -1.
      reached: M, leaves (n, b), padded with -1.
      fallback: (documents, f), leaves that the tree gives a document, best first, all
        different, f >= copies.
      copies: lambda, leaves of each document.

    Returns:
      leaves (documents, copies) int32, all different in a row, the most wanted first.

    Raises:
      ValueError: `fallback` has fewer leaves than copies, or the numbers of queries
        differ.

    References:
      JTR: Li et al. 2023, arXiv 2304.11943, section 3.4, eq. 10.

    >>> import numpy as np
    >>> from ehi.train.reassign import reassigned_leaves
    >>> tops = np.array([[0], [0], [1]])  # two queries want document 0, one document 1
    >>> reached = np.array([[2, 1], [2, 0], [0, 1]])
    >>> fallback = np.array([[0, 1], [1, 2], [2, 0]])
    >>> reassigned_leaves(tops, reached, fallback, copies=1).tolist()
    [[2], [1], [2]]
    """
    documents, wide = fallback.shape
    if copies < 1 or wide < copies or len(top_documents) != len(reached):
        raise ValueError(
            f"copies={copies} of fallback {fallback.shape}, top documents "
            f"{top_documents.shape} and reached leaves {reached.shape} do not fit"
        )
    leaves = int(max(reached.max(initial=0), fallback.max(initial=0))) + 1
    keys, counts = _counts(top_documents, reached, leaves)
    # The leaves of the fallback compete with count 0, so that every row is full.
    row = np.repeat(np.arange(documents), wide)
    keys = np.concatenate([keys, row * leaves + fallback.ravel()])
    counts = np.concatenate([counts, np.zeros(row.size, np.int64)])
    place = np.full(len(keys), wide)  # place in the fallback
    place[-row.size :] = np.tile(np.arange(wide), documents)
    keys, at = np.unique(keys, return_inverse=True)
    total, first = np.zeros(len(keys), np.int64), np.full(len(keys), wide)
    np.add.at(total, at, counts)
    np.minimum.at(first, at, place)
    document, leaf = np.divmod(keys, leaves)
    order = np.lexsort((leaf, first, -total, document))
    start = np.searchsorted(document[order], np.arange(documents))
    return leaf[order][start[:, None] + np.arange(copies)].astype(np.int32)


def _counts(top_documents, reached, leaves: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys ``document * leaves + leaf`` with a count above 0, and the counts.

    The queries are taken in parts, since Y' M has k b entries for each.
    """
    width = top_documents.shape[1] * reached.shape[1]
    part = max(1, PRODUCTS // max(width, 1))
    keys, counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(reached), part):
        rows = slice(start, start + part)
        document = top_documents[rows].astype(np.int64)[:, :, None]  # (n, k, 1)
        leaf = reached[rows].astype(np.int64)[:, None]  # (n, 1, b)
        both = (document >= 0) & (leaf >= 0)
        found = np.unique((document * leaves + leaf)[both], return_counts=True)
        keys.append(found[0])
        counts.append(found[1])
    return np.concatenate(keys), np.concatenate(counts)
