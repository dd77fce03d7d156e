"""The traditional pipeline by the libraries people use, measured as an Index is."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from ehi.index.check import check_count, check_embeddings, check_queries

BASELINES = (
    "faiss-flat",
    "faiss-ivf",
    "faiss-pq",
    "faiss-opq",
    "faiss-ivfpq",
    "faiss-opq-ivfpq",
    "lsh",
    "itq-lsh",
    "faiss-hnsw",
    "faiss-fastscan",
    "scann",
)
# ScaNN can do without lists, and without codes.
WITH_LISTS = {"faiss-ivf", "faiss-ivfpq", "faiss-opq-ivfpq", "scann"}
_BYTE_CODES = {"faiss-pq", "faiss-opq", "faiss-ivfpq", "faiss-opq-ivfpq"}
_CODES = _BYTE_CODES | {"lsh", "itq-lsh", "faiss-fastscan"}


def build_baseline(
    name: str,
    documents: np.ndarray,
    *,
    num_leaves: int | None = None,
    code_bytes: int | None = None,
    seed: int = 0,
    doc_ids: Sequence[str] | None = None,
    rerank_vectors: bool = False,
) -> "Baseline":
    """Train one library's index on document embeddings and fill it with them.

    Args:
        name: one of `BASELINES`.
        documents: (N, D) float32 unit rows; the score is the inner product.
        num_leaves: P, inverted lists of an IVF or ScaNN; None where there are none.
        code_bytes: bytes of a document's code; None for raw vectors.
        seed: of every random choice; ScaNN takes none, its builds are all alike.
        doc_ids: external ids of the N documents; None for their row numbers.
        rerank_vectors: keep 2-byte vectors for `rerank`.

    Raises:
        ValueError: an unknown name, or sizes that do not fit each other.
        ImportError: the library is not installed; says how to install it.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; there are {', '.join(BASELINES)}")
    documents = check_embeddings(documents)
    if doc_ids is not None and len(doc_ids) != len(documents):
        raise ValueError(f"{len(doc_ids)} doc_ids for {len(documents)} documents")
    _check_sizes(name, documents.shape, num_leaves, code_bytes)
    sizes = {"num_leaves": num_leaves, "code_bytes": code_bytes}
    kept = {"doc_ids": doc_ids, "rerank_vectors": rerank_vectors}
    # Faiss and ScaNN are extras: their modules are read only when one is asked for.
    if name == "scann":
        from ehi.eval.baselines_scann import build_scann

        return build_scann(documents, **sizes, **kept)
    from ehi.eval.baselines_faiss import build_faiss

    return build_faiss(
        name, documents, seed=check_count("seed", seed, 0), **sizes, **kept
    )


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


def _check_sizes(name, shape, num_leaves, code_bytes):
    rows, width = shape
    for label, value, needed in (
        ("num_leaves", num_leaves, name in WITH_LISTS),
        ("code_bytes", code_bytes, name in _CODES),
    ):
        if value is not None:
            check_count(label, value)
        if name != "scann" and (value is not None) != needed:
            wants = f"needs {label}" if needed else f"has no {label}: it must be None"
            raise ValueError(f"{name} {wants}, got {label}={value}")
    if num_leaves is not None and num_leaves > rows:
        raise ValueError(f"num_leaves={num_leaves} of only {rows} documents")
    if code_bytes is None or name == "lsh":
        return
    if name == "itq-lsh":
        # Its bits are rotated principal axes, of which there are D. ITQ after a random
        # expansion to 2 D took 50 s at D = 384 and had less recall than `lsh`.
        if 8 * code_bytes > width:
            raise ValueError(
                f"itq-lsh has at most one bit a dimension: code_bytes={code_bytes} are "
                f"{8 * code_bytes} bits of {width} dimensions; use 'lsh'"
            )
        return
    codewords, blocks = 16, 2 * code_bytes
    if name in _BYTE_CODES:
        codewords, blocks = 256, code_bytes
    if width % blocks:
        raise ValueError(
            f"{name} with code_bytes={code_bytes} has {blocks} subspaces, which do not "
            f"divide the width {width}"
        )
    if rows < codewords:
        raise ValueError(f"{rows} documents are fewer than {codewords} codewords")
