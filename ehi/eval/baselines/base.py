"""The common part of all library indexes: the search and the counts of an `Index`."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ehi.index.check import check_count, check_queries, check_share


class Visit(NamedTuple):
    """Lists that a query visits: at most `beam`, of probability `min_prob` or more."""

    beam: int
    min_prob: float | None = None


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
    _beam: float
    _min_prob: float | None

    @functools.cached_property
    def visited(self) -> np.ndarray:
        """(N,) int64 documents scored.

        The libraries do not return this count, and counting in the search would be
        timed as part of it. So it is counted on first use.
        """
        return self._baseline.count_visited(self._queries, self._beam, self._min_prob)

    @property
    def nodes_scored(self) -> np.ndarray:
        """(N,) int64 centroids scored."""
        return np.full(len(self.rows), self._baseline.num_centroids, np.int64)


class Baseline:
    """A library's index, with the part of `Index` that `ehi.eval.measure` uses.

    A subclass sets the attributes and defines two methods, with a whole beam:
    `_find(queries, k, visit, rerank, threads)` returns scores (N, k) and rows (N, k);
    `_count(queries, visit)` returns the documents scored (N,). `visit` is a `Visit`.

    Attributes:
        num_documents, width: N and D.
        num_leaves: largest beam. The number of inverted lists P; N for a graph, whose
            beam is efSearch; 1 for an exhaustive search.
        num_centroids: centroids that each query scores to choose lists, P or 0.
        leaf_sizes: (P,) documents in each list; None for a graph.
        bytes_per_doc: bytes stored per document, without its id.
        index_bytes: size of the serialised index.
        scale: with it, lists have probabilities, and a search may set `min_prob`.
        options: what was chosen of `ehi.eval.baselines.options`.
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
    scale: float | None = None
    options: Mapping[str, Any] = MappingProxyType({})
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
        beam: float = 1,
        min_prob: float | None = None,
        rerank: int = 0,
        threads: int = 1,
    ) -> BaselineHits:
        """Find the k best documents by the library's score.

        Args:
            queries: (N, D) floats.
            k: number of results of each query.
            beam: lists to visit (nprobe, leaves_to_search); efSearch of a graph; 1 for
                an exhaustive search. With 3.4 lists, 40% of the queries visit 4 and the
                others 3; a query visits the same number in every search.
            min_prob: least probability of a visited list, if the index has any; the
                best list is always visited.
            rerank: number of candidates scored again with stored vectors, or 0.
            threads: threads of the library.

        Raises:
            ValueError: queries have another width or dtype or are not finite; k, beam,
                min_prob, rerank or threads are out of range; `rerank` needs vectors
                that the index does not store.
        """
        queries = check_queries(queries, self.width)
        k, beam = check_count("k", k), self._check_beam(beam)
        min_prob = self._check_min_prob(min_prob)
        rerank = self._check_rerank(rerank, k)
        threads = check_count("threads", threads)
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        for some, visit in self._visits(queries, beam, min_prob):
            scores[some], rows[some] = self._find(
                queries[some], k, visit, rerank, threads
            )
        ids = rows if self._ids is None else self._ids[rows]
        return BaselineHits(ids, scores, rows, self, queries, beam, min_prob)

    def count_visited(
        self, queries: np.ndarray, beam: float, min_prob: float | None = None
    ) -> np.ndarray:
        """Count the documents that each query scores: (N,) int64."""
        queries = check_queries(queries, self.width)
        beam, min_prob = self._check_beam(beam), self._check_min_prob(min_prob)
        counts = np.empty(len(queries), np.int64)
        for some, visit in self._visits(queries, beam, min_prob):
            counts[some] = self._count(queries[some], visit)
        return counts

    def leaf_log_probs(self, queries: np.ndarray) -> np.ndarray:
        """log p(list | query): (N, P).

        Raises:
            ValueError: the index has no probabilities.
        """
        self._check_min_prob(0.0)
        return self._log_probs(check_queries(queries, self.width))

    def _visits(self, queries, beam, min_prob) -> Iterator[tuple[Any, Visit]]:
        """The rows of the queries that visit equally many lists, and how many."""
        low = int(beam)
        if low == beam:
            yield slice(None), Visit(low, min_prob)
            return
        wide = _drawn(queries) < beam - low  # (N,)
        for some, lists in ((~wide, low), (wide, low + 1)):
            if some.any():
                yield some, Visit(lists, min_prob)

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

    def _find(self, queries, k, visit, rerank, threads):
        raise NotImplementedError

    def _count(self, queries, visit):
        raise NotImplementedError

    def _log_probs(self, queries):
        raise NotImplementedError

    def _check_min_prob(self, min_prob: float | None) -> float | None:
        if min_prob is None:
            return None
        if self.scale is None:
            raise ValueError(
                f"min_prob={min_prob} needs probabilities of lists; this index has "
                "none: it must be None"
            )
        return check_share("min_prob", min_prob)

    def _check_beam(self, beam: float) -> float:
        if isinstance(beam, float) and self.num_centroids:
            if not beam >= 1:
                raise ValueError(f"beam must be at least 1, got {beam}")
        else:
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


def _drawn(queries: np.ndarray) -> np.ndarray:
    """A number of each query in [0, 1), drawn by its values: (N,)."""
    # The order of the queries must not matter, so the numbers are a hash.
    words = np.ascontiguousarray(queries).view(np.uint32).astype(np.uint64)
    factors = np.random.default_rng(0).integers(
        2**63, size=words.shape[1], dtype=np.uint64
    )
    mixed = words @ (2 * factors + 1)  # modulo 2^64
    mixed ^= mixed >> np.uint64(31)
    return (mixed * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(11)) / 2.0**53
