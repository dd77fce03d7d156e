"""Baselines by Faiss: flat, inverted lists, product codes, hashes and a graph."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ehi.eval.baselines_base import Baseline
from ehi.eval.baselines_faiss_index import FaissBaseline, import_faiss, omp_threads

_KMEANS_ITERATIONS = 25
# One iteration of k-means a round: 50 rounds of 1 and of 4 end at the same distortion
# (0.190 and 0.191 on pydocs at 24 bytes, 0.107 and 0.108 on SciFact at 48), the latter
# in up to 3 times the time. Codebooks fitted afresh to the rotation end at 0.198.
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
    """Train and fill the Faiss index that `name` stands for: see `build_baseline`.

    Raises:
        ImportError: Faiss is not installed.
    """
    faiss = import_faiss()
    # Equal seeds shall give equal indexes: threads would race for places in the graph
    # and for the order of sums.
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
    """The index, empty, of rows that are rotated already."""
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
        # Thresholds at the medians of the documents lost recall on pydocs and SciFact,
        # at every size: queries lie elsewhere.
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
    """Settings of every k-means that training will run."""
    if hasattr(index, "nlist"):
        # Lists of unit rows, searched by inner product.
        index.cp.spherical = True
        yield index.cp
    if hasattr(index, "pq"):
        yield index.pq.cp


def _best_kmeans(clustering, num_rows, seed):
    """All rows, silently also where there are fewer than Faiss would like."""
    clustering.niter = _KMEANS_ITERATIONS
    clustering.seed = seed
    clustering.max_points_per_centroid = num_rows
    clustering.min_points_per_centroid = 1


def _transform(faiss, name, rows, code_bytes, seed):
    """The fitted rotation and, of OPQ, its codebooks (M, K, S) as one flat array.

    Raises:
        ValueError: fewer rows than principal axes.
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
    # Faiss draws its first rotation from a fixed seed unless there is one already.
    random = np.random.default_rng(seed).standard_normal((width, width))
    start = np.linalg.qr(random)[0].astype(np.float32)
    faiss.copy_array_to_vector(start.ravel(), transform.A)
    quantiser = faiss.ProductQuantizer(width, code_bytes, 8)
    _best_kmeans(quantiser.cp, len(rows), seed)
    transform.pq = quantiser
    transform.train(rows)
    transform.pq = None  # ours, and gone when this returns
    return transform, faiss.vector_to_array(quantiser.centroids)


def _start_from(faiss, quantiser, codebooks):
    """Let training refine the codebooks that the rotation was fitted with."""
    faiss.copy_array_to_vector(codebooks, quantiser.centroids)
    quantiser.train_type = faiss.ProductQuantizer.Train_hot_start
