"""Training queries of vectors, and the documents that label them.

The rows of the query table are, in this order: the queries that were given; every
document, as a query; the synthetic queries.
"""

from collections.abc import Mapping

import numpy as np

from ehi.data.vectors.containers import Rows, chunks
from ehi.data.vectors.metric import Metric
from ehi.data.vectors.neighbours import cached_neighbours, exact_neighbours

NEIGHBOURS = 10  # nearest documents that label a query
PSEUDO = 10_000  # documents that are labelled by their neighbours

Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]


def vector_pairs(
    documents: Rows,
    num_queries: int,
    labelled: tuple[np.ndarray, np.ndarray],
    *,
    metric: str,
    rows: np.ndarray,
    per_document: int,
    seed: int = 0,
    key: str | None = None,
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int]:
    """The pairs of every source of `ehi.train.phase`, and the rows of the query table.

    Args:
      documents: (N, T).
      num_queries: Q, queries that were given.
      labelled: query rows and document rows of the pairs that are known.
      metric: 'cosine', 'ip' or 'l2'.
      rows: documents that may be asked for as queries; held-out ones are not among
        them.
      per_document: synthetic queries of each of them.
      seed: draws the documents that are labelled by their neighbours ('pseudo').
      key: names the corpus, to keep these labels on disk; None keeps nothing.

    Returns:
      source -> query rows and document rows; number of rows of the query table.
    """
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(rows)[:PSEUDO])
    k = min(NEIGHBOURS, len(documents) - 1)
    search = exact_neighbours
    options = {"metric": metric, "exclude": chosen}
    if key is not None:
        search, options = cached_neighbours, options | {"key": key}
    nearest, _ = search(documents, np.asarray(documents[chosen]), k, **options)
    first_synthetic = num_queries + len(documents)
    synthetic = np.tile(rows, per_document)
    return {
        "labelled": labelled,
        "pseudo": (np.repeat(num_queries + chosen, k), nearest.ravel()),
        "documents": (num_queries + rows, rows),
        "synthetic": (first_synthetic + np.arange(len(synthetic)), synthetic),
    }, first_synthetic + len(synthetic)


def query_table(
    documents: Rows, queries: Rows | None, pairs: Pairs, maps: Metric, *, seed: int = 0
) -> np.ndarray:
    """The query table: unit vectors (rows, D).

    A synthetic query is a document moved as a known query lies from its document:
    ``d + q_j - d_j`` of a random pair j.

    Args:
      documents, queries: (N, T) and (Q, T) as they were given.
      pairs: of `vector_pairs`.
      maps: of the metric.
      seed: draws the pairs j.
    """
    num_queries = 0 if queries is None else len(queries)
    moved = pairs["synthetic"][1]
    first = num_queries + len(documents)
    table = np.empty((first + len(moved), maps.width), np.float32)
    if num_queries:
        for start, block in chunks(queries):
            table[start : start + len(block)] = maps.queries(block)
    for start, block in chunks(documents):
        table[num_queries + start :][: len(block)] = maps.queries(block)
    if not len(moved):
        return table
    known = pairs["labelled" if len(pairs["labelled"][0]) else "pseudo"]
    drawn = np.random.default_rng(seed).integers(len(known[0]), size=len(moved))
    step = 2**16
    for start in range(0, len(moved), step):
        part = drawn[start : start + step]
        asked = _given(documents, queries, num_queries, known[0][part], maps)
        answers = _scaled(documents[known[1][part]], maps)
        away = asked - answers
        made = _scaled(documents[moved[start : start + step]], maps) + away
        table[first + start :][: len(made)] = maps.queries(made)
    return table


def _given(documents, queries, num_queries: int, rows: np.ndarray, maps) -> np.ndarray:
    """Rows of the query table as vectors that were given."""
    found = np.empty((len(rows), documents.shape[1]), np.float32)
    own = rows >= num_queries
    found[own] = documents[rows[own] - num_queries]
    if num_queries:
        found[~own] = queries[rows[~own]]
    return _scaled(found, maps)


def _scaled(x: np.ndarray, maps: Metric) -> np.ndarray:
    """Vectors whose differences mean something: angles have no length."""
    x = np.asarray(x, np.float32)
    return maps.queries(x) if maps.name == "cosine" else x
