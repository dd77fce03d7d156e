"""Exact nearest neighbours: labels of training queries, and the truth of recall."""

import functools
import hashlib

import numpy as np

from ehi.data.vectors.containers import Vectors, chunks
from ehi.files import atomic_write_npz, cache_folder
from ehi.progress import Progress

QUERIES = 1024  # whose products with a chunk of documents are in memory at once


def exact_neighbours(
    documents: Vectors,
    queries: np.ndarray,
    k: int,
    *,
    metric: str,
    exclude: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest documents of every query, by the metric itself.

    Faiss does it if it is installed, else chunked products. The corpus is read once, in
    chunks.

    Args:
      documents: (N, T) float32 or float16.
      queries: (Q, T).
      k: at most N.
      metric: 'cosine', 'ip' or 'l2'.
      exclude: (Q,) row that a query does not find, such as itself; -1 for none.

    Returns:
      rows (Q, k) int64, best first, padded with -1, and scores (Q, k) float32: inner
      products, cosines, or negative squared distances.

    >>> import numpy as np
    >>> rows, _ = exact_neighbours(np.eye(3), np.eye(3)[:1] + 0.1, 1, metric="l2")
    >>> rows.tolist()
    [[0]]
    """
    queries = np.asarray(queries, np.float32)
    if metric == "cosine":
        queries = _unit(queries)
    wanted = min(k + (exclude is not None), len(documents))
    best = np.full((len(queries), wanted), -np.inf, np.float32)
    rows = np.full((len(queries), wanted), -1, np.int64)
    search = _library() or _products
    with Progress("exact neighbours", len(documents), "documents", bar=False) as shown:
        for first, block in chunks(documents):
            block = _unit(block) if metric == "cosine" else block
            for start in range(0, len(queries), QUERIES):
                part = slice(start, start + QUERIES)
                found = search(queries[part], block, min(wanted, len(block)), metric)
                best[part], rows[part] = _join(
                    (best[part], rows[part]), (found[0], found[1] + first)
                )
            shown.update(len(block))
    if exclude is not None:
        best, rows = _without(best, rows, exclude)
    missing = ((0, 0), (0, max(0, k - rows.shape[1])))
    best = np.pad(best, missing, constant_values=-np.inf)
    return np.pad(rows, missing, constant_values=-1)[:, :k], best[:, :k]


def cached_neighbours(
    documents: Vectors, queries: np.ndarray, k: int, *, key: str, **options
) -> tuple[np.ndarray, np.ndarray]:
    """`exact_neighbours`, kept on disk; `key` names the corpus, such as its sha256."""
    found = hashlib.sha256(f"{key} {k} {sorted(options)} {options['metric']}".encode())
    for array in (queries, options.get("exclude")):
        if array is not None:
            found.update(np.ascontiguousarray(array).view(np.uint8))
    path = cache_folder() / "vectors" / f"neighbours-{found.hexdigest()[:32]}.npz"
    if not path.is_file():
        rows, scores = exact_neighbours(documents, queries, k, **options)
        atomic_write_npz(path, {"rows": rows, "scores": scores})
    with np.load(path, allow_pickle=False) as file:
        return file["rows"], file["scores"]


def _join(one, other) -> tuple[np.ndarray, np.ndarray]:
    """The best of two lists of scores and rows; of equal scores the first list's."""
    scores, rows = (np.concatenate(both, 1) for both in zip(one, other, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, : one[0].shape[1]]
    return tuple(np.take_along_axis(array, order, 1) for array in (scores, rows))


def _without(best, rows, exclude):
    """Drop one row of every query, or its last one."""
    own = rows == np.asarray(exclude)[:, None]
    own[~own.any(1), -1] = True
    keep = ~own
    shape = len(rows), rows.shape[1] - 1
    return best[keep].reshape(shape), rows[keep].reshape(shape)


def _products(queries, block, k: int, metric: str):
    scores = queries @ block.T
    if metric == "l2":
        scores *= 2
        scores -= np.vecdot(block, block)
        scores -= np.vecdot(queries, queries)[:, None]
    rows = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    found = np.take_along_axis(scores, rows, 1)
    order = np.lexsort((rows, -found), axis=1)
    return tuple(np.take_along_axis(array, order, 1) for array in (found, rows))


@functools.cache
def _library():
    """The search of Faiss, or None if it is not installed."""
    try:
        import faiss
    except ImportError:
        return None

    def search(queries, block, k: int, metric: str):
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        scores, rows = faiss.knn(queries, np.ascontiguousarray(block), k, metric=kind)
        return (-scores if metric == "l2" else scores), rows

    return search


def _unit(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.maximum(norms, 1e-30)
