"""What all library indexes share: the search and the counts of an `Index`."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from ehi.index.check import check_count, check_queries


@dataclasses.dataclass(frozen=True, eq=False)
class BaselineHits:
    """Results of N queries, with the fields of `ehi.index.Hits`.

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

        The libraries do not return this count, and counting in the search would be
        timed as part of it. So it is counted on first use.
        """
        return self._baseline.count_visited(self._queries, self._beam)

    @property
    def nodes_scored(self) -> np.ndarray:
        """(N,) int64 centroids scored."""
        return np.full(len(self.rows), self._baseline.num_centroids, np.int64)


class Baseline:
    """A library's index, with the part of `Index` that `ehi.eval.measure` uses.

    A subclass sets the attributes and defines two methods:
    `_find(queries, k, beam, rerank, threads)` returns scores (N, k) and rows (N, k);
    `_count(queries, beam)` returns the documents scored (N,).

    Attributes:
        num_documents, width: N and D.
        num_leaves: largest beam. The number of inverted lists P; N for a graph, whose
            beam is efSearch; 1 for an exhaustive search.
        num_centroids: centroids that each query scores to choose lists, P or 0.
        leaf_sizes: (P,) documents in each list; None for a graph.
        bytes_per_doc: bytes stored per document, without its id.
        index_bytes: size of the serialised index.
        query_multiply_adds: multiply-adds of a query for its rotation and its look-up
            table; those with centroids are apart.
        fixed_bytes: bytes that do not grow with the documents: rotation, centroids and
            codebooks.
    """

    num_leaves: int
    num_centroids: int
    leaf_sizes: np.ndarray | None
    bytes_per_doc: float
    index_bytes: int
    query_multiply_adds: int = 0
    fixed_bytes: int = 0

    def __init__(
        self, shape: tuple[int, int], doc_ids: Sequence[str] | None, reranks: bool
    ):
        self.num_documents, self.width = shape
        self._reranks = reranks
        self._ids = None
        if doc_ids is not None:
            # The last entry serves row -1, the padding.
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
        """Find the k best documents by the library's score.

        Args:
            queries: (N, D) floats.
            k: number of results of each query.
            beam: lists to visit (nprobe, leaves_to_search); efSearch of a graph, which
                finds at most `beam` documents; 1 for an exhaustive search.
            rerank: number of candidates scored again with stored vectors, or 0.
            threads: threads of the library.

        Raises:
            ValueError: queries have another width or dtype or are not finite; k, beam,
                rerank or threads are out of range; `rerank` needs vectors that the
                index does not store.
        """
        queries = check_queries(queries, self.width)
        k, beam = check_count("k", k), self._check_beam(beam)
        rerank = self._check_rerank(rerank, k)
        threads = check_count("threads", threads)
        scores, rows = self._find(queries, k, beam, rerank, threads)
        ids = rows if self._ids is None else self._ids[rows]
        return BaselineHits(ids, scores, rows, self, queries, beam)

    def count_visited(self, queries: np.ndarray, beam: int) -> np.ndarray:
        """Count the documents that each query scores: (N,) int64."""
        queries = check_queries(queries, self.width)
        return self._count(queries, self._check_beam(beam))

    @property
    def leaf_load_max(self) -> int | None:
        """Documents in the fullest list; None for a graph."""
        return None if self.leaf_sizes is None else int(self.leaf_sizes.max())

    @property
    def leaf_load_cv(self) -> float | None:
        """Standard deviation / mean of the list sizes; None for a graph."""
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
            raise ValueError(
                f"beam {beam} is larger than {self.num_leaves}, the largest allowed"
            )
        return beam

    def _check_rerank(self, rerank: int, k: int) -> int:
        rerank = check_count("rerank", rerank, least=0)
        if rerank and not self._reranks:
            raise ValueError(
                f"rerank={rerank} needs a baseline built with rerank_vectors=True; "
                "this one stores no vectors"
            )
        if 0 < rerank < k:
            raise ValueError(f"rerank={rerank} candidates are fewer than k={k}")
        return rerank


def padded(scores: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float32 and rows as int64; padding has score -inf and row -1."""
    rows = np.where(rows < 0, -1, rows).astype(np.int64)
    scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
    return scores, rows
