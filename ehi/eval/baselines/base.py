"""What the libraries' indexes share: they are searched and counted as an Index is."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from ehi.index.check import check_count, check_queries


@dataclasses.dataclass(frozen=True, eq=False)
class BaselineHits:
    """Results of N queries, as `ehi.index.Hits` has them.

    Attributes:
        ids: (N, k) external ids, best first: int64 padded with -1, or objects padded
            with None.
        scores: (N, k) float32, padded with -inf.
        rows: (N, k) int64 document numbers, padded with -1.
    """

    ids: np.ndarray
    scores: np.ndarray
    rows: np.ndarray
    _baseline: "Baseline"
    _queries: np.ndarray
    _beam: int

    @functools.cached_property
    def visited(self) -> np.ndarray:
        """(N,) int64 documents scored.

        Counted when asked for: the libraries do not return it with the results, and a
        second look inside the search would be timed as part of it.
        """
        return self._baseline.count_visited(self._queries, self._beam)

    @property
    def nodes_scored(self) -> np.ndarray:
        """(N,) int64 centroids scored."""
        return np.full(len(self.rows), self._baseline.num_centroids, np.int64)


class Baseline:
    """A library's index with what `ehi.eval.measure` asks of an Index.

    A subclass sets the attributes and has `_find(queries, k, beam, rerank, threads)`,
    which returns scores (N, k) and rows (N, k), and `_count(queries, beam)`, which
    returns the documents scored (N,).

    Attributes:
        num_documents, width: N and D.
        num_leaves: largest beam: inverted lists P; N of a graph, whose beam is
            efSearch; 1 of an exhaustive search.
        num_centroids: scored by every query to choose lists, P or 0.
        leaf_sizes: (P,) documents in each list, None of a graph.
        bytes_per_doc: everything stored per document but its id.
        index_bytes: of the serialised index.
    """

    num_leaves: int
    num_centroids: int
    leaf_sizes: np.ndarray | None
    bytes_per_doc: float
    index_bytes: int

    def __init__(
        self, shape: tuple[int, int], doc_ids: Sequence[str] | None, reranks: bool
    ):
        self.num_documents, self.width = shape
        self._reranks = reranks
        self._ids = None
        if doc_ids is not None:
            # One entry more: row -1, of padding, is None.
            self._ids = np.array([*doc_ids, None], dtype=object)

    def search(
        self,
        queries: np.ndarray,
        k: int = 10,
        *,
        beam: int = 1,
        rerank: int = 0,
        threads: int = 1,
    ) -> BaselineHits:
        """The k best documents by the library's score.

        Args:
            queries: (N, D) floats.
            k: results of a query.
            beam: lists visited (nprobe, leaves_to_search), or efSearch of a graph,
                which finds no more than `beam` documents; else 1.
            rerank: 0, or how many of the best are scored again with stored vectors.
            threads: of the library.

        Raises:
            ValueError: queries of another width or dtype or not finite; k, beam, rerank
                or threads out of range; rerank without stored vectors.
        """
        queries = check_queries(queries, self.width)
        k, beam = check_count("k", k), self._check_beam(beam)
        rerank = self._check_rerank(rerank, k)
        threads = check_count("threads", threads)
        scores, rows = self._find(queries, k, beam, rerank, threads)
        ids = rows if self._ids is None else self._ids[rows]
        return BaselineHits(ids, scores, rows, self, queries, beam)

    def count_visited(self, queries: np.ndarray, beam: int) -> np.ndarray:
        """Documents each query scores, counted: (N,) int64."""
        queries = check_queries(queries, self.width)
        return self._count(queries, self._check_beam(beam))

    @property
    def leaf_load_max(self) -> int | None:
        """Documents in the fullest list; None of a graph."""
        return None if self.leaf_sizes is None else int(self.leaf_sizes.max())

    @property
    def leaf_load_cv(self) -> float | None:
        """Standard deviation of the list sizes over their mean; None of a graph."""
        if self.leaf_sizes is None:
            return None
        return float(self.leaf_sizes.std() / self.leaf_sizes.mean())

    def _find(self, queries, k, beam, rerank, threads):
        raise NotImplementedError

    def _count(self, queries, beam):
        raise NotImplementedError

    def _check_beam(self, beam: int) -> int:
        beam = check_count("beam", beam)
        if beam > self.num_leaves:
            raise ValueError(f"beam {beam} is larger than {self.num_leaves}")
        return beam

    def _check_rerank(self, rerank: int, k: int) -> int:
        rerank = check_count("rerank", rerank, least=0)
        if rerank and not self._reranks:
            raise ValueError(
                f"rerank={rerank} needs a baseline built with rerank_vectors=True, "
                "this one stores none"
            )
        if 0 < rerank < k:
            raise ValueError(f"rerank={rerank} candidates are fewer than k={k}")
        return rerank


def padded(scores: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 and rows int64, those without a row -inf and -1."""
    rows = np.where(rows < 0, -1, rows).astype(np.int64)
    scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
    return scores, rows
