"""Training queries of vectors, and the documents that label them.

The rows of the query table are, in this order: the queries that were given; documents
that are labelled by their neighbours; every document, as a query for itself; the
synthetic queries. No row is stored: each is made of a given vector when it is drawn.
"""

from collections.abc import Callable, Mapping

import numpy as np

from ehi.data.rows import Counted, JoinedRows, Rows
from ehi.data.vectors.metric import Metric
from ehi.data.vectors.neighbours import cached_neighbours, exact_neighbours

NEIGHBOURS = 10  # nearest documents that label a query
PSEUDO = 10_000  # documents that are labelled by their neighbours

Pairs = Mapping[str, tuple[np.ndarray | Counted, np.ndarray | Counted]]


class MappedRows(Rows):
    """Some given vectors, mapped when they are asked for.

    Args:
      given: (N, T).
      apply: vectors (n, T) -> (n, D).
      width: D.
      rows: numbers of the given vectors; None: all.
    """

    def __init__(self, given, apply: Callable, width: int, rows=None):
        self._given, self._apply, self._rows = given, apply, rows
        self.shape = (len(given) if rows is None else len(rows)), width

    def take(self, rows: np.ndarray) -> np.ndarray:
        rows = rows if self._rows is None else self._rows[rows]
        return self._apply(np.asarray(self._given[rows], np.float32))


class Moved(Rows):
    """Synthetic queries: documents moved as known queries lie from their documents.

    ``d + q_j - d_j`` of a random pair j.

    Args:
      queries: the rows of the query table before these, as they were given.
      documents: (N, T) as they were given.
      known: query rows and document rows of the pairs.
      moved: document row of each synthetic query.
      maps: of the metric.
      seed: draws the pairs.
    """

    def __init__(self, queries, documents, known, moved, maps: Metric, seed: int):
        self._queries, self._documents, self._known = queries, documents, known
        self._moved, self._maps = moved, maps
        rng = np.random.default_rng(seed)
        self._drawn = rng.integers(max(len(known[0]), 1), size=len(moved))
        self._drawn = self._drawn.astype(np.uint32)
        self.shape = len(moved), maps.width

    def take(self, rows: np.ndarray) -> np.ndarray:
        drawn = self._drawn[rows]
        asked = self._scaled(self._queries[self._known[0][drawn]])
        answers = self._scaled(self._documents[self._known[1][drawn]])
        documents = self._scaled(self._documents[self._moved[rows]])
        return self._maps.queries(documents + (asked - answers))

    def _scaled(self, x) -> np.ndarray:
        """Vectors whose differences mean something: angles have no length."""
        x = np.asarray(x, np.float32)
        return self._maps.queries(x) if self._maps.name == "cosine" else x


def vector_pairs(
    documents,
    num_queries: int,
    labelled: tuple[np.ndarray, np.ndarray],
    *,
    metric: str,
    rows: np.ndarray | Counted,
    per_document: int,
    seed: int = 0,
    key: str | None = None,
) -> tuple[Pairs, np.ndarray]:
    """The pairs of every source of `ehi.train.phase`.

    Args:
      documents: (N, T).
      num_queries: Q, queries that were given.
      labelled: query rows and document rows of the pairs that are known.
      metric: 'cosine', 'ip' or 'l2'.
      rows: documents that may be asked for as queries, ascending; held-out ones are not
        among them. `Counted` takes no memory.
      per_document: synthetic queries of each of them.
      seed: draws the documents that are labelled by their neighbours ('pseudo').
      key: names the corpus, to keep these labels on disk; None keeps nothing.

    Returns:
      source -> query rows and document rows; the documents of 'pseudo', ascending.
    """
    rng = np.random.default_rng(seed)
    some = rng.choice(len(rows), size=min(PSEUDO, len(rows)), replace=False)
    chosen = rows[np.sort(some)]
    k = min(NEIGHBOURS, len(documents) - 1)
    search = exact_neighbours
    options = {"metric": metric, "exclude": chosen}
    if key is not None:
        search, options = cached_neighbours, options | {"key": key}
    nearest, _ = search(documents, np.asarray(documents[chosen]), k, **options)
    own = num_queries + len(chosen)  # first row of the documents
    moved = own + len(documents)
    num_synthetic = per_document * len(rows)
    if isinstance(rows, Counted):
        synthetic = Counted(rows.start, num_synthetic, period=len(rows))
        asking = Counted(own, len(rows)), Counted(moved, num_synthetic)
    else:
        synthetic = np.tile(rows, per_document)
        asking = own + rows, moved + np.arange(num_synthetic)
    pseudo = num_queries + np.repeat(np.arange(len(chosen)), k)
    return {
        "labelled": labelled,
        "pseudo": (pseudo, nearest.ravel()),
        "documents": (asking[0], rows),
        "synthetic": (asking[1], synthetic),
    }, chosen


def query_table(
    documents, queries, pairs: Pairs, chosen: np.ndarray, maps: Metric, *, seed: int = 0
) -> Rows:
    """The query table (rows, D), of which no row is stored.

    Args:
      documents, queries: (N, T), and (Q, T) or None, as they were given.
      pairs, chosen: of `vector_pairs`.
      maps: of the metric.
      seed: draws the pairs that synthetic queries are moved by.
    """
    asked = [] if queries is None else [queries]
    asked.append(MappedRows(documents, _same, documents.shape[1], chosen))
    known = pairs["labelled" if len(pairs["labelled"][0]) else "pseudo"]
    tables = [MappedRows(table, maps.queries, maps.width) for table in asked]
    moved = pairs["synthetic"][1]
    return JoinedRows(
        [
            *tables,
            MappedRows(documents, maps.queries, maps.width),
            Moved(JoinedRows(asked), documents, known, moved, maps, seed),
        ]
    )


def _same(x: np.ndarray) -> np.ndarray:
    return x
