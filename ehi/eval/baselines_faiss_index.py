"""A filled index of Faiss: searched, its work counted, its bytes measured."""

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ehi.eval.baselines_base import Baseline, padded


class FaissBaseline(Baseline):
    """A Faiss index, whole (`_index`) and without the rotation before it (`_core`)."""

    def __init__(
        self,
        index: Any,
        shape: tuple[int, int],
        doc_ids: Sequence[str] | None,
        vectors: np.ndarray | None,
    ):
        super().__init__(shape, doc_ids, vectors is not None)
        self._faiss = faiss = import_faiss()
        self._index, self._core, self._transform = index, index, None
        if isinstance(index, faiss.IndexPreTransform):
            self._core = faiss.downcast_index(index.index)
            self._transform = faiss.downcast_VectorTransform(index.chain.at(0))
        self._vectors = vectors
        self._is_ivf = isinstance(self._core, faiss.IndexIVF)
        self._is_graph = isinstance(self._core, faiss.IndexHNSW)
        self._is_hash = isinstance(self._core, faiss.IndexLSH)
        self.num_leaves, self.num_centroids = 1, 0
        self.leaf_sizes = np.array([self.num_documents])  # (1,)
        if self._is_ivf:
            self.num_leaves = self.num_centroids = self._core.nlist
            lists = self._core.invlists
            self.leaf_sizes = np.array(
                [lists.list_size(p) for p in range(self.num_leaves)], np.int64
            )  # (P,)
        elif self._is_graph:
            self.num_leaves, self.leaf_sizes = self.num_documents, None
        rerank_bytes = 0 if vectors is None else vectors.nbytes
        per_document = (self._code_bytes() + rerank_bytes) / self.num_documents
        self.bytes_per_doc = per_document
        self.index_bytes = faiss.serialize_index(index).nbytes + rerank_bytes

    def _code_bytes(self) -> int:
        """Bytes of codes or vectors and, of a graph, of levels, offsets and links."""
        if not self._is_graph:
            return self._core.code_size * self.num_documents
        graph = self._core.hnsw
        stored = (graph.neighbors, graph.offsets, graph.levels)
        links = sum(self._faiss.vector_to_array(part).nbytes for part in stored)
        return links + 4 * self.width * self.num_documents

    def _find(self, queries, k, beam, rerank, threads):
        # A graph widens its search to k: a beam that keeps its meaning finds no more
        # than `beam` documents.
        wanted = min(rerank or k, beam) if self._is_graph else rerank or k
        with omp_threads(self._faiss, threads):
            found = self._index.search(queries, wanted, params=self._settings(beam))
        scores, rows = padded(-found[0] if self._is_hash else found[0], found[1])
        if rerank:
            scores, rows = self._rescore(queries, rows)
        missing = max(0, k - rows.shape[1])
        return (
            np.pad(scores[:, :k], ((0, 0), (0, missing)), constant_values=-np.inf),
            np.pad(rows[:, :k], ((0, 0), (0, missing)), constant_values=-1),
        )

    def _settings(self, beam):
        """Parameters of one search: the index itself stays as it is."""
        if self._is_ivf:
            settings = self._faiss.SearchParametersIVF(nprobe=beam)
            if self._transform is None:
                return settings
            return self._faiss.SearchParametersPreTransform(index_params=settings)
        if self._is_graph:
            return self._faiss.SearchParametersHNSW(efSearch=beam)
        return None

    def _rescore(self, queries, rows):
        """The same candidates, ordered by their stored float16 vectors."""
        scores = np.full(rows.shape, -np.inf, np.float32)
        for query, candidates in enumerate(rows):
            found = candidates >= 0
            vectors = self._vectors[candidates[found]].astype(np.float32)
            scores[query, found] = vectors @ queries[query]
        order = np.argsort(-scores, axis=1, kind="stable")
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def _count(self, queries, beam):
        if self._is_graph:
            return self._count_in_graph(queries, beam)
        if not self._is_ivf:
            return np.full(len(queries), self.num_documents, np.int64)
        if self._transform is not None:
            queries = self._transform.apply(queries)
        with omp_threads(self._faiss, 1):
            _, lists = self._core.quantizer.search(queries, beam)  # (N, b)
        return self.leaf_sizes[lists].sum(axis=1)

    def _count_in_graph(self, queries, beam):
        """Distances computed, by the statistics of Faiss, which add up over a batch."""
        statistics, settings = self._faiss.cvar.hnsw_stats, self._settings(beam)
        visited = np.empty(len(queries), np.int64)
        with omp_threads(self._faiss, 1):
            for query in range(len(queries)):
                statistics.reset()
                self._index.search(queries[query : query + 1], 1, params=settings)
                visited[query] = statistics.ndis
        return visited


def import_faiss() -> ModuleType:
    """The module `faiss`, or an ImportError that says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "this baseline needs Faiss: pip install -e '.[faiss]'"
        ) from error
    return faiss


@contextlib.contextmanager
def omp_threads(faiss: ModuleType, threads: int) -> Iterator[None]:
    """Lend Faiss so many threads, and take them back."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
