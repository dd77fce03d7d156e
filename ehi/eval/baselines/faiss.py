"""Search of Faiss indexes: flat, lists, codes, bits and graphs."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ehi.eval.baselines.base import Baseline, padded
from ehi.index.faiss_to import import_faiss

# A search of a graph is at least this wide, since all measures look at ten results.
_LEAST_BREADTH = 10


class FaissBaseline(Baseline):
    """A Faiss index: whole (`_index`), and without a rotation before it (`_core`)."""

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
        self._storage = self._core
        if self._is_graph:
            self._storage = faiss.downcast_index(self._core.storage)
        # The best of these scores is the smallest.
        self._is_distance = isinstance(self._core, faiss.IndexLSH) or (
            self._core.metric_type == faiss.METRIC_L2
        )
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
        table, floats = self._tables()
        rotation = 0 if self._transform is None else self._transform.A.size()
        self.query_multiply_adds = rotation + table
        self.fixed_bytes = 4 * (rotation + floats + self.num_centroids * self._core.d)

    def _tables(self) -> tuple[int, int]:
        """Multiply-adds of a query for its look-up table, and floats of codebooks."""
        core, faiss = self._storage, self._faiss
        if hasattr(core, "pq"):
            return core.pq.ksub * core.pq.d, core.pq.ksub * core.pq.d
        for name in ("rq", "plsq", "prq"):
            if hasattr(core, name):
                codebooks = getattr(core, name).codebooks.size()
                return codebooks, codebooks
        if isinstance(core, faiss.IndexScalarQuantizer):
            return core.d, core.sq.trained.size()  # steps and least values
        if isinstance(core, (faiss.IndexRaBitQ, faiss.IndexIVFRaBitQ)):
            return core.d, core.d  # the centre
        return 0, 0

    def _code_bytes(self) -> int:
        """Bytes of codes or vectors; a graph also has levels, offsets and links."""
        codes = self._storage.code_size * self.num_documents
        if not self._is_graph:
            return codes
        graph = self._core.hnsw
        stored = (graph.neighbors, graph.offsets, graph.levels)
        links = sum(self._faiss.vector_to_array(part).nbytes for part in stored)
        return links + codes

    def _find(self, queries, k, visit, rerank, threads):
        wanted = rerank or k
        # Faiss widens the search of a graph to the number of results. Asking for fewer
        # keeps the meaning of the beam.
        first = min(wanted, self._breadth(visit)) if self._is_graph else wanted
        with omp_threads(self._faiss, threads):
            scores, rows = self._search(queries, first, visit)
        scores, rows = padded(-scores if self._is_distance else scores, rows)
        if first < wanted:
            scores, rows = self._with_neighbours(queries, scores, rows, wanted)
        if rerank:
            scores, rows = self._rescore(queries, rows)
        missing = max(0, k - rows.shape[1])
        return (
            np.pad(scores[:, :k], ((0, 0), (0, missing)), constant_values=-np.inf),
            np.pad(rows[:, :k], ((0, 0), (0, missing)), constant_values=-1),
        )

    def _search(self, queries, wanted, visit):
        """Scores and rows (N, wanted) as Faiss returns them."""
        if visit.min_prob is None:
            return self._index.search(queries, wanted, params=self._settings(visit))
        lists, centroid_scores = self._probable(queries, visit)  # (N, b)
        queries = np.ascontiguousarray(self._rotated(queries))
        if self._core.metric_type == self._faiss.METRIC_L2:
            # Faiss reads them only where its own coarse search would give distances.
            centroid_scores = np.zeros_like(centroid_scores)
        scores = np.empty((len(queries), wanted), np.float32)
        rows = np.empty((len(queries), wanted), np.int64)
        pointers = map(
            self._faiss.swig_ptr, (lists, centroid_scores, scores, rows)
        )  # fmt: skip
        self._core.search_preassigned_c(
            len(queries), self._faiss.swig_ptr(queries), wanted, *pointers, False,
            self._faiss.SearchParametersIVF(nprobe=lists.shape[1]),
        )  # fmt: skip
        return scores, rows

    def _rotated(self, queries):
        return queries if self._transform is None else self._transform.apply(queries)

    def _probable(self, queries, visit):
        """Probable lists (N, b), padded with -1, and scores of their centroids."""
        with omp_threads(self._faiss, 1):
            scores, lists = self._core.quantizer.search(
                self._rotated(queries), self.num_leaves
            )  # (N, P), best first
        probs = np.exp(_log_softmax(self.scale * scores))
        visited = probs >= visit.min_prob
        visited[:, 0] = True
        visited[:, visit.beam :] = False
        widest = int(visited.sum(axis=1).max())
        lists = np.where(visited, lists, -1)[:, :widest]
        return np.ascontiguousarray(lists), np.ascontiguousarray(scores[:, :widest])

    def _log_probs(self, queries):
        with omp_threads(self._faiss, 1):
            scores, lists = self._core.quantizer.search(
                self._rotated(queries), self.num_leaves
            )
        log_probs = np.empty_like(scores)
        np.put_along_axis(log_probs, lists, _log_softmax(self.scale * scores), axis=1)
        return log_probs

    def _breadth(self, visit):
        return min(max(visit.beam, _LEAST_BREADTH), self.num_documents)

    def _settings(self, visit):
        """Parameters of one search; they do not change the index."""
        if self._is_ivf:
            settings = self._faiss.SearchParametersIVF(nprobe=visit.beam)
        elif self._is_graph:
            settings = self._faiss.SearchParametersHNSW(efSearch=self._breadth(visit))
        else:
            return None
        if self._transform is None:
            return settings
        return self._faiss.SearchParametersPreTransform(index_params=settings)

    @functools.cached_property
    def _links(self):
        """(N, 2 M) neighbours of each document in the lowest level, padded with -1."""
        graph = self._core.hnsw
        starts = self._faiss.vector_to_array(graph.offsets)[:-1].astype(np.int64)
        places = starts[:, None] + np.arange(graph.nb_neighbors(0))
        return self._faiss.vector_to_array(graph.neighbors)[places]

    @functools.cached_property
    def _stored(self):
        """(N, D) documents as the graph sees them."""
        return self._storage.reconstruct_n(0, self.num_documents)

    def _with_neighbours(self, queries, scores, rows, wanted):
        """Lists of a graph, filled with what the search scored but does not return.

        A search ends when the best document that is left is worse than all results. So
        it has scored the neighbours of every result.
        """
        width = min(wanted, self.num_documents)
        filled = np.full((len(rows), width), -1, np.int64)
        values = np.full((len(rows), width), -np.inf, np.float32)
        for query, found in enumerate(rows):
            found = found[found >= 0]
            near = np.setdiff1d(self._links[found], found)
            near = near[near >= 0]
            their = self._stored[near] @ queries[query]
            if self._is_distance:
                apart = self._stored[near] - queries[query]
                their = -np.einsum("nd,nd->n", apart, apart)
            best = np.argsort(-their, kind="stable")[: width - len(found)]
            end = len(found) + len(best)
            filled[query, :end] = np.concatenate([found, near[best]])
            # Rounding must not put a neighbour above a result.
            worst = scores[query, len(found) - 1] if len(found) else np.inf
            values[query, : len(found)] = scores[query, : len(found)]
            values[query, len(found) : end] = np.minimum(their[best], worst)
        return values, filled

    def _rescore(self, queries, rows):
        """Order the same candidates by their stored float16 vectors."""
        scores = np.full(rows.shape, -np.inf, np.float32)
        for query, candidates in enumerate(rows):
            found = candidates >= 0
            vectors = self._vectors[candidates[found]].astype(np.float32)
            scores[query, found] = vectors @ queries[query]
        order = np.argsort(-scores, axis=1, kind="stable")
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)

    def _count(self, queries, visit):
        if self._is_graph:
            return self._count_in_graph(queries, visit)
        if not self._is_ivf:
            return np.full(len(queries), self.num_documents, np.int64)
        if visit.min_prob is None:
            with omp_threads(self._faiss, 1):
                _, lists = self._core.quantizer.search(
                    self._rotated(queries), visit.beam
                )  # (N, b)
        else:
            lists, _ = self._probable(queries, visit)
        sizes = np.append(self.leaf_sizes, 0)  # list -1 is empty
        return sizes[lists].sum(axis=1)

    def _count_in_graph(self, queries, visit):
        """Count distances; the statistics of Faiss are sums over a batch."""
        statistics, settings = self._faiss.cvar.hnsw_stats, self._settings(visit)
        visited = np.empty(len(queries), np.int64)
        with omp_threads(self._faiss, 1):
            for query in range(len(queries)):
                statistics.reset()
                self._index.search(queries[query : query + 1], 1, params=settings)
                visited[query] = statistics.ndis
        return visited


def _log_softmax(logits):
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@contextlib.contextmanager
def omp_threads(faiss: ModuleType, threads: int) -> Iterator[None]:
    """Set the threads of Faiss, and restore them at the end."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
