"""Build the Faiss indexes: rotate, fit codebooks, lists and graphs, add documents."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ehi.eval.baselines.base import Baseline
from ehi.eval.baselines.faiss import FaissBaseline, omp_threads
from ehi.eval.baselines.faiss_transform import Transformed, transformed
from ehi.eval.baselines.linear_router import top_lists, train_router
from ehi.eval.baselines.options import ROUTERS, Options
from ehi.index.faiss_to import import_faiss

_KMEANS_ITERATIONS = 25
_GRAPH_BREADTH = 200  # efConstruction
# The scale of our trees, for lists whose index does not choose one.
_SCALE = 20.0
_LSQ_SPLITS = 4
_CODED_LISTS = {"faiss-ivfpq", "faiss-opq-ivfpq", "linear-router-opq"}


def build_faiss(
    name: str,
    documents: np.ndarray,
    options: Options,
    queries: np.ndarray | None,
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
        made = transformed(faiss, name, documents, code_bytes, seed, options)
        index = _new_index(faiss, name, made, num_leaves, code_bytes, seed, options)
        _fit(faiss, index, made, seed, options)
        index.add(made.rows)
        if name in ROUTERS:
            _learn_routes(faiss, index, made, queries, seed, options)
        if made.of_queries is not None:
            index = faiss.IndexPreTransform(made.of_queries, index)
        kept = documents.astype(np.float16) if rerank_vectors else None
        found = FaissBaseline(index, documents.shape, doc_ids, kept)
    found.options = options
    if found.num_centroids:
        # The weights of a router already have the scale of logits.
        found.scale = 1.0 if name in ROUTERS else options.get("scale", _SCALE)
    if made.patterns:
        # Sign bits need no table of products: a query is multiplied by the rotation.
        found.query_multiply_adds = made.of_queries.A.size()
        found.fixed_bytes = 4 * found.query_multiply_adds
    return found


def _metric(faiss, options: Options) -> int:
    l2 = options.get("metric") == "l2"
    return faiss.METRIC_L2 if l2 else faiss.METRIC_INNER_PRODUCT


def _new_index(faiss, name, made, num_leaves, code_bytes, seed, options):
    """An empty index for rows that are already transformed."""
    width, metric = made.rows.shape[1], _metric(faiss, options)
    if made.patterns:
        index = faiss.IndexPQ(width, code_bytes, 8, metric)
        faiss.copy_array_to_vector(made.codebooks, index.pq.centroids)
        index.is_trained = True
        return index
    if num_leaves is not None:
        return _new_lists(faiss, name, width, num_leaves, code_bytes, options)
    if name.startswith("faiss-hnsw"):
        return _new_graph(faiss, name, width, code_bytes, seed, options)
    if name in ("lsh", "itq-lsh"):
        return faiss.IndexLSH(width, width, False, False)
    if name == "faiss-fastscan":
        return faiss.IndexPQFastScan(width, 2 * code_bytes, 4, metric)
    if name == "faiss-sq":
        kind = f"QT_{options['bits']}bit"
        return faiss.IndexScalarQuantizer(
            width, getattr(faiss.ScalarQuantizer, kind), metric
        )
    if name == "faiss-rabitq":
        index = faiss.IndexRaBitQ(width, metric)
        index.qb = 0  # the query stays in floats
        return index
    if name in ("faiss-rq", "faiss-lsq", "faiss-prq"):
        return _new_additive(faiss, name, width, code_bytes, metric, options)
    if name == "faiss-flat":
        return faiss.IndexFlatIP(width)
    return faiss.IndexPQ(width, code_bytes, 8, metric)


def _new_lists(faiss, name, width, num_leaves, code_bytes, options):
    coarse, metric = faiss.IndexFlatIP(width), _metric(faiss, options)
    shape = (coarse, width, num_leaves)
    if name in _CODED_LISTS:
        index = faiss.IndexIVFPQ(*shape, code_bytes, 8, metric)
        index.by_residual = options.get("residual", False)
    elif name == "faiss-ivfrabitq":
        index = faiss.IndexIVFRaBitQ(*shape, metric)
        index.qb = 0
    else:
        index = faiss.IndexIVFFlat(*shape, metric)
    return index


def _new_graph(faiss, name, width, code_bytes, seed, options):
    metric, links = _metric(faiss, options), options["links"]
    if name == "faiss-hnsw-pq":
        index = faiss.IndexHNSWPQ(width, code_bytes, links, 8, metric)
    elif name == "faiss-hnsw-sq":
        kind = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexHNSWSQ(width, kind, links, metric)
    else:
        index = faiss.IndexHNSWFlat(width, links, metric)
    index.hnsw.efConstruction = _GRAPH_BREADTH
    index.hnsw.rng = faiss.RandomGenerator(seed)
    return index


def _new_additive(faiss, name, width, code_bytes, metric, options):
    """Codes that are sums of codewords; for distances a byte of the norm as well."""
    kinds = faiss.AdditiveQuantizer
    search = kinds.ST_LUT_nonorm
    if metric == faiss.METRIC_L2:
        search = kinds.ST_norm_qint8
    if name == "faiss-rq":
        return faiss.IndexResidualQuantizer(width, code_bytes, 8, metric, search)
    # Local search solves for all codewords at once. In one part of 24 bytes a round of
    # its 25 takes 45 s of a core.
    splits = options.get("splits", _LSQ_SPLITS)
    splits = splits if code_bytes % splits == 0 else 1
    kind = faiss.IndexProductResidualQuantizer
    if name == "faiss-lsq":
        kind = faiss.IndexProductLocalSearchQuantizer
    return kind(width, splits, code_bytes // splits, 8, metric, search)


def _fit(faiss, index, made: Transformed, seed: int, options: Options) -> None:
    """Train an index on all rows, with settings that Faiss leaves to its caller."""
    if made.patterns:
        return
    storage = index
    if isinstance(index, faiss.IndexHNSW):
        storage = faiss.downcast_index(index.storage)
    for clustering in _clusterings(storage):
        best_kmeans(clustering, len(made.rows), seed)
        clustering.niter = options.get("iterations", _KMEANS_ITERATIONS)
    if made.codebooks is not None and not hasattr(storage, "nlist"):
        # Training starts from the codebooks of the fitted rotation.
        faiss.copy_array_to_vector(made.codebooks, storage.pq.centroids)
        storage.pq.train_type = faiss.ProductQuantizer.Train_hot_start
    encoders = _residual_encoders(faiss, index)
    for encoder in encoders:
        # Training on every hypothesis takes many times as long.
        encoder.train_type = faiss.ResidualQuantizer.Train_top_beam
        encoder.max_beam_size = 1
        best_kmeans(encoder.cp, len(made.rows), seed)
    if isinstance(index, faiss.IndexProductLocalSearchQuantizer):
        for part in _parts(faiss, index.plsq):
            part.random_seed = seed
            part.encode_ils_iters = options["rounds"]
    index.train(made.rows)
    for encoder in encoders:
        encoder.max_beam_size = options.get("breadth", 5)


def _clusterings(index) -> Iterator[Any]:
    """Settings of each k-means that training runs."""
    if hasattr(index, "nlist"):
        # Rows have unit norm, and lists are chosen by inner product.
        index.cp.spherical = True
        yield index.cp
    if hasattr(index, "pq"):
        yield index.pq.cp


def _residual_encoders(faiss, index) -> list[Any]:
    if isinstance(index, faiss.IndexResidualQuantizer):
        return [index.rq]
    if isinstance(index, faiss.IndexProductResidualQuantizer):
        return _parts(faiss, index.prq)
    return []


def _parts(faiss, quantiser) -> list[Any]:
    """The quantisers of parts of a vector, which Faiss gives as their base class."""
    parts = map(quantiser.subquantizer, range(quantiser.nsplits))
    return [faiss.downcast_AdditiveQuantizer(part) for part in parts]


def best_kmeans(clustering: Any, num_rows: int, seed: int) -> None:
    """Use all rows; Faiss does not warn if it wants more of them."""
    clustering.niter = _KMEANS_ITERATIONS
    clustering.seed = seed
    clustering.max_points_per_centroid = num_rows
    clustering.min_points_per_centroid = 1


def _learn_routes(faiss, index, made, queries, seed, options) -> None:
    """Replace the centroids by learned weights; the lists stay."""
    rows, lists = made.rows, np.empty(len(made.rows), np.int64)
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        members = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
        lists[members] = number
    centroids = index.quantizer.reconstruct_n(0, index.nlist)  # (P, D)
    asked, targets = rows, lists
    if queries is not None and len(queries):
        if made.of_queries is not None:
            queries = made.of_queries.apply(queries)
        asked = np.concatenate([queries, rows])
        targets = np.concatenate([top_lists(queries, rows, lists), lists])
    weights = train_router(
        asked, targets, options.get("start_scale", _SCALE) * centroids,
        rate=options["rate"], seed=seed,
    )  # fmt: skip
    index.quantizer.reset()
    index.quantizer.add(weights)
