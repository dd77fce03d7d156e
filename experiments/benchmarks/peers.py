"""The systems of the search benchmark: our index, Faiss, ScaNN and usearch.

Ours and Faiss get the same centroids and codebooks. Each is a `System`, so one loop
times them all.
"""

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ehi.index import build_index
from ehi.train.kmeans import kmeans
from ehi.train.opq import fit_pq
from experiments.benchmarks.measure import measured_build

PEERS = {"faiss": "faiss", "scann": "baselines", "usearch": "baselines"}  # pip extras
RERANK = 100  # candidates that are scored again with vectors
_ITERATIONS = 10  # iterations of k-means
_ROWS_PER_CENTROID = 100
_BREADTH_PER_PROBE = 4  # search breadth of a graph for each probed list
_HNSW = {"connectivity": 16, "expansion_add": 128}


@dataclass(frozen=True)
class System:
    """One filled index.

    Attributes:
        name: such as 'ehi pq' or 'faiss raw'.
        prepare: (probes, threads) -> function from queries (n, D) to rows (n, k).
        setting: (probes) -> its own setting for them, such as {'probes': 8}.
        bytes_per_doc: bytes of codes, vectors and links, without ids.
        build_seconds: time to fill it, without training centroids and codebooks.
        peak_build_mb: peak memory while filling over before, or None.
    """

    name: str
    prepare: Callable[[int, int], Callable[[np.ndarray], np.ndarray]]
    setting: Callable[[int], dict[str, int]]
    bytes_per_doc: float
    build_seconds: float
    peak_build_mb: float | None


def train(documents: np.ndarray, lists: int, subspaces: int, seed: int):
    """Fit centroids (P, D) of unit length and codebooks (M, 256, S) to a sample."""
    rng = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed))
    samples = [
        documents[np.sort(rng.permutation(len(documents))[: _ROWS_PER_CENTROID * k])]
        for k in (lists, 256)
    ]
    centroids, _ = kmeans(
        samples[0], lists, iterations=_ITERATIONS, spherical=True, key=keys[0]
    )
    codebooks = fit_pq(
        samples[1], num_subspaces=subspaces, num_codewords=256,
        iterations=_ITERATIONS, key=keys[1],
    )  # fmt: skip
    return np.asarray(centroids), np.asarray(codebooks)


def missing(peers: list[str]) -> dict[str, str]:
    """Return the peers that are not installed, each with its install command.

    Raises:
        ValueError: a peer is unknown.
    """
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"unknown peer {peer!r}; allowed: {', '.join(PEERS)}")
    return {
        peer: f"pip install -e '.[{PEERS[peer]}]'"
        for peer in peers
        if importlib.util.find_spec(peer) is None
    }


def build_systems(
    documents: np.ndarray,
    centroids: np.ndarray,
    codebooks: np.ndarray,
    *,
    k: int,
    peers: list[str],
) -> Iterator[System]:
    """Fill one system after the other, each of Faiss after the same one of ours."""
    for words in (None, codebooks):
        ours = _ours(documents, centroids, words, k)
        if "faiss" not in peers:
            yield from ours
            continue
        theirs = _faiss(documents, centroids, words, k)
        yield from itertools.chain(*zip(ours, theirs, strict=True))
    if "scann" in peers:
        yield _scann(documents, len(centroids), k)
    if "usearch" in peers:
        yield _usearch(documents, k)


def one_level_tree(centroids: np.ndarray) -> dict[str, Any]:
    """Return the tree of height 1 whose leaves are inverted lists."""
    return {"kind": "per_node", "nodes": [centroids[None]], "scale": 1.0}


def _ours(documents, centroids, codebooks, k):
    """Yield our index with raw leaves; or with PQ leaves, plain and re-ranked."""
    index, seconds, peak = measured_build(
        lambda: build_index(
            documents, range(len(documents)), tree=one_level_tree(centroids),
            codebooks=codebooks, rerank_vectors=codebooks is not None,
        )
    )  # fmt: skip

    def prepare(probes, threads, rerank=0):
        def find(queries):
            return index.search(
                queries, k, beam=probes, threads=threads, rerank=rerank
            ).ids

        return find

    size = index.bytes_per_doc
    if codebooks is None:
        yield System("ehi raw", prepare, _probes, size, seconds, peak)
        return
    plain = size - 2 * documents.shape[1]  # without the float16 re-ranking vectors
    yield System("ehi pq", prepare, _probes, plain, seconds, peak)
    rerank = max(k, RERANK)
    yield System(
        f"ehi pq + re-rank {rerank}",
        lambda probes, threads: prepare(probes, threads, rerank),
        _probes, size, seconds, peak,
    )  # fmt: skip


def _faiss(documents, centroids, codebooks, k):
    """Yield an IndexIVFFlat; or an IndexIVFPQ without residuals, plain and refined."""
    import faiss

    width, lists = documents.shape[1], len(centroids)
    coarse = faiss.IndexFlatIP(width)
    coarse.add(centroids)
    product = faiss.METRIC_INNER_PRODUCT
    if codebooks is None:
        index = faiss.IndexIVFFlat(coarse, width, lists, product)
    else:
        subspaces = len(codebooks)
        index = faiss.IndexIVFPQ(coarse, width, lists, subspaces, 8, product)
        index.by_residual = False
        faiss.copy_array_to_vector(codebooks.ravel(), index.pq.centroids)
    index.is_trained = True
    _, seconds, peak = measured_build(lambda: index.add(documents))

    def prepare(probes, threads):
        faiss.omp_set_num_threads(threads)
        index.nprobe = probes
        return lambda queries: index.search(queries, k)[1]

    if codebooks is None:
        size = 4 * width
        yield System("faiss raw", prepare, _probes, size, seconds, peak)
        return
    yield System("faiss pq", prepare, _probes, subspaces, seconds, peak)
    vectors = faiss.IndexFlat(width, product)
    vectors.add(documents)
    refined = faiss.IndexRefine(index, vectors)
    rerank = max(k, RERANK)
    refined.k_factor = rerank / k

    def prepare_refined(probes, threads):
        prepare(probes, threads)
        return lambda queries: refined.search(queries, k)[1]

    yield System(
        f"faiss pq + re-rank {rerank}", prepare_refined, _probes,
        subspaces + 4 * width, seconds, peak,
    )  # fmt: skip


def _scann(documents, lists, k):
    """Return ScaNN: tree, 4-bit anisotropic codes of 2 dimensions, re-ordering."""
    import scann

    rerank = max(k, RERANK)
    builder = scann.scann_ops_pybind.builder(documents, k, "dot_product")
    sample = min(len(documents), _ROWS_PER_CENTROID * lists)
    builder = builder.tree(
        lists, min(lists, 8), training_sample_size=sample, min_partition_size=1,
        training_iterations=_ITERATIONS, spherical=True,
    ).score_ah(
        2, anisotropic_quantization_threshold=0.2, training_sample_size=sample,
        training_iterations=_ITERATIONS,
    ).reorder(rerank).set_n_training_threads(_num_cpus())  # fmt: skip
    searcher, seconds, peak = measured_build(builder.build)

    def prepare(probes, threads):
        def find(queries):
            if len(queries) == 1:
                return searcher.search(queries[0], leaves_to_search=probes)[0][None]
            if threads == 1:
                return searcher.search_batched(queries, leaves_to_search=probes)[0]
            return searcher.search_batched_parallel(queries, leaves_to_search=probes)[0]

        searcher.set_num_threads(threads)
        return find

    width = documents.shape[1]
    size = width / 4 + 4 * width
    name = f"scann + re-rank {rerank}"
    return System(name, prepare, _probes, size, seconds, peak)


def _usearch(documents, k):
    """Return usearch: an HNSW graph over float32 vectors."""
    from usearch.index import Index

    index = Index(ndim=documents.shape[1], metric="ip", dtype="f32", **_HNSW)
    rows = np.arange(len(documents), dtype=np.uint64)
    _, seconds, peak = measured_build(
        lambda: index.add(rows, documents, threads=_num_cpus())
    )

    def prepare(probes, threads):
        index.expansion_search = _breadth(probes)["expansion"]
        return lambda queries: np.atleast_2d(
            index.search(queries, k, threads=threads).keys
        ).astype(np.int64)

    size = index.serialized_length / len(documents)
    return System("usearch hnsw", prepare, _breadth, size, seconds, peak)


def _probes(probes):
    return {"probes": probes}


def _breadth(probes):
    return {"expansion": _BREADTH_PER_PROBE * probes}


def _num_cpus():
    return len(os.sched_getaffinity(0))
