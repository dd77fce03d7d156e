"""Baselines by Faiss: flat, inverted lists, product codes, hashes and a graph."""

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ehi.eval.baselines.base import Baseline, padded
from ehi.index.faiss_to import import_faiss

_KMEANS_ITERATIONS = 25
# Each round has one iteration of k-means. Four take up to 3 times as long and end at
# the same distortion (1 and 4: 0.190 and 0.191 on pydocs at 24 bytes, 0.107 and 0.108
# on SciFact at 48). Codebooks that are fitted afresh to the rotation end at 0.198.
_OPQ_ROUNDS = 50
_HNSW_LINKS = 32
_HNSW_BREADTH = 200


def build_faiss(
    name: str,
    documents: np.ndarray,
    *,
    num_leaves: int | None,
    code_bytes: int | None,
    seed: int,
    doc_ids: Sequence[str] | None,
    rerank_vectors: bool,
) -> Baseline:
    """Train and fill the Faiss index called `name`: see `build_baseline`.

    Raises:
        ImportError: Faiss is not installed.
    """
    faiss = import_faiss()
    # One thread: with several, places in a graph and the order of sums would differ
    # between builds of one seed.
    with omp_threads(faiss, 1):
        transform, rows = None, documents
        if "opq" in name or name == "itq-lsh":
            transform, codebooks = _transform(faiss, name, rows, code_bytes, seed)
            rows = transform.apply(documents)
        index = _new_index(faiss, name, rows.shape[1], num_leaves, code_bytes, seed)
        for clustering in _clusterings(index):
            _best_kmeans(clustering, len(rows), seed)
        if name == "faiss-opq":
            _start_from(faiss, index.pq, codebooks)
        index.train(rows)
        index.add(rows)
        if transform is not None:
            index = faiss.IndexPreTransform(transform, index)
        kept = documents.astype(np.float16) if rerank_vectors else None
        return FaissBaseline(index, documents.shape, doc_ids, kept)


def _new_index(faiss, name, width, num_leaves, code_bytes, seed):
    """An empty index for rows that are already rotated."""
    product = faiss.METRIC_INNER_PRODUCT
    if name in ("faiss-ivf", "faiss-ivfpq", "faiss-opq-ivfpq"):
        coarse = faiss.IndexFlatIP(width)
        if name == "faiss-ivf":
            return faiss.IndexIVFFlat(coarse, width, num_leaves, product)
        return faiss.IndexIVFPQ(coarse, width, num_leaves, code_bytes, 8, product)
    if name in ("faiss-pq", "faiss-opq"):
        return faiss.IndexPQ(width, code_bytes, 8, product)
    if name == "faiss-fastscan":
        return faiss.IndexPQFastScan(width, 2 * code_bytes, 4, product)
    if name == "itq-lsh":
        return faiss.IndexLSH(width, width, False, False)
    if name == "lsh":
        # Thresholds at the documents' medians lost recall on pydocs and SciFact at
        # every size, because queries lie elsewhere.
        index = faiss.IndexLSH(width, 8 * code_bytes, True, False)
        index.rrot.init(seed)
        return index
    if name == "faiss-hnsw":
        index = faiss.IndexHNSWFlat(width, _HNSW_LINKS, product)
        index.hnsw.efConstruction = _HNSW_BREADTH
        index.hnsw.rng = faiss.RandomGenerator(seed)
        return index
    return faiss.IndexFlatIP(width)


def _clusterings(index) -> Iterator[Any]:
    """Settings of each k-means that training runs."""
    if hasattr(index, "nlist"):
        # Rows have unit norm, and lists are chosen by inner product.
        index.cp.spherical = True
        yield index.cp
    if hasattr(index, "pq"):
        yield index.pq.cp


def _best_kmeans(clustering, num_rows, seed):
    """Use all rows; Faiss does not warn if it wants more of them."""
    clustering.niter = _KMEANS_ITERATIONS
    clustering.seed = seed
    clustering.max_points_per_centroid = num_rows
    clustering.min_points_per_centroid = 1


def _transform(faiss, name, rows, code_bytes, seed):
    """The fitted rotation, and for OPQ its codebooks (M, K, S) as one flat array.

    Raises:
        ValueError: there are fewer rows than principal axes.
    """
    width = rows.shape[1]
    if name == "itq-lsh":
        bits = 8 * code_bytes
        if len(rows) < bits:
            raise ValueError(f"{len(rows)} documents are fewer than {bits} bits")
        transform = faiss.ITQTransform(width, bits, bits < width)
        transform.itq.seed = seed
        transform.train(rows)
        return transform, None
    transform = faiss.OPQMatrix(width, code_bytes, width)
    transform.niter, transform.niter_pq = _OPQ_ROUNDS, 1
    transform.max_train_points = len(rows)
    # Without a start Faiss draws its first rotation from a fixed seed.
    random = np.random.default_rng(seed).standard_normal((width, width))
    start = np.linalg.qr(random)[0].astype(np.float32)
    faiss.copy_array_to_vector(start.ravel(), transform.A)
    quantiser = faiss.ProductQuantizer(width, code_bytes, 8)
    _best_kmeans(quantiser.cp, len(rows), seed)
    transform.pq = quantiser
    transform.train(rows)
    transform.pq = None  # Python frees the quantiser when this function returns
    return transform, faiss.vector_to_array(quantiser.centroids)


def _start_from(faiss, quantiser, codebooks):
    """Make training start from the codebooks of the fitted rotation."""
    faiss.copy_array_to_vector(codebooks, quantiser.centroids)
    quantiser.train_type = faiss.ProductQuantizer.Train_hot_start


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
        self.query_multiply_adds = self._rotation_size() + self._codebooks_size()
        floats = self.query_multiply_adds + self.num_centroids * self._core.d
        self.fixed_bytes = 4 * floats

    def _rotation_size(self) -> int:
        """Entries of the matrix that a query is multiplied by before the search."""
        if self._transform is not None:
            # ITQ applies its mean, axes and rotation as one matrix.
            linear = getattr(self._transform, "pca_then_itq", self._transform)
            return linear.A.size()
        if self._is_hash and self._core.rotate_data:
            return self._core.rrot.A.size()
        return 0

    def _codebooks_size(self) -> int:
        """K D floats of codebooks; a look-up table takes as many multiply-adds."""
        quantiser = getattr(self._core, "pq", None)
        return 0 if quantiser is None else quantiser.ksub * quantiser.d

    def _code_bytes(self) -> int:
        """Bytes of codes or vectors; a graph also has levels, offsets and links."""
        if not self._is_graph:
            return self._core.code_size * self.num_documents
        graph = self._core.hnsw
        stored = (graph.neighbors, graph.offsets, graph.levels)
        links = sum(self._faiss.vector_to_array(part).nbytes for part in stored)
        return links + 4 * self.width * self.num_documents

    def _find(self, queries, k, beam, rerank, threads):
        # Faiss widens the search of a graph to k. Asking for at most `beam` documents
        # keeps the meaning of the beam.
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
        """Parameters of one search; they do not change the index."""
        if self._is_ivf:
            settings = self._faiss.SearchParametersIVF(nprobe=beam)
            if self._transform is None:
                return settings
            return self._faiss.SearchParametersPreTransform(index_params=settings)
        if self._is_graph:
            return self._faiss.SearchParametersHNSW(efSearch=beam)
        return None

    def _rescore(self, queries, rows):
        """Order the same candidates by their stored float16 vectors."""
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
        """Count distances; the statistics of Faiss are sums over a batch."""
        statistics, settings = self._faiss.cvar.hnsw_stats, self._settings(beam)
        visited = np.empty(len(queries), np.int64)
        with omp_threads(self._faiss, 1):
            for query in range(len(queries)):
                statistics.reset()
                self._index.search(queries[query : query + 1], 1, params=settings)
                visited[query] = statistics.ndis
        return visited


@contextlib.contextmanager
def omp_threads(faiss: ModuleType, threads: int) -> Iterator[None]:
    """Set the threads of Faiss, and restore them at the end."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
