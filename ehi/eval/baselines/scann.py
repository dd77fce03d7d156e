"""Baselines by ScaNN: a spherical k-means tree, 4-bit anisotropic codes, re-ordering.

`scann_ops_pybind` runs without TensorFlow. ScaNN has no statistics. A search for all
documents returns those of the visited lists, so counting its results counts the work.
SOAR (Sun et al. 2023, arXiv 2404.00774) puts each document into a second list.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ehi.eval.baselines.base import Baseline, padded

_KMEANS_ITERATIONS = 25
# Results held at once while counting.
_COUNTED = 2**22


def build_scann(
    documents: np.ndarray,
    options: Mapping[str, Any],
    *,
    num_leaves: int | None,
    code_bytes: int | None,
    doc_ids: Sequence[str] | None,
    rerank_vectors: bool,
) -> "ScannBaseline":
    """Train and fill a ScaNN searcher: see `build_baseline`.

    Codes are those of vectors, not of residuals (ScaNN's default): residual codes lost
    4 to 10 points of nDCG@10 at 24 and 48 bytes with 10% visited (train queries of
    pydocs and SciFact).

    Raises:
        ImportError: ScaNN is not installed.
    """
    scann = import_scann()
    rows, width = documents.shape
    builder = scann.scann_ops_pybind.builder(documents, 10, "dot_product")
    if num_leaves is not None:
        builder = builder.tree(
            num_leaves,
            num_leaves,
            training_sample_size=rows,
            # In a small corpus lists shorter than the default, 50, are no worse.
            min_partition_size=1,
            training_iterations=_KMEANS_ITERATIONS,
            spherical=True,
            soar_lambda=options["soar"],
        )
    if code_bytes is None:
        builder = builder.score_brute_force()
    else:
        builder = builder.score_ah(
            width // (2 * code_bytes),
            anisotropic_quantization_threshold=options["anisotropic"],
            training_sample_size=rows,
            training_iterations=_KMEANS_ITERATIONS,
            residual_quantization=False,
        )
    if rerank_vectors:
        builder = builder.reorder(rows, quantize=scann.ReorderType.BFLOAT16)
    searcher = builder.set_n_training_threads(1).build()
    # A scan reads two 4-bit codes from a byte; `serialize` writes one code a byte.
    stored = 4 * width if code_bytes is None else code_bytes
    found = ScannBaseline(
        searcher, documents.shape, doc_ids, rerank_vectors, num_leaves
    )
    # With SOAR most documents are in two lists, each with its own copy.
    copies = found.leaf_sizes.sum() / rows
    found.bytes_per_doc = float(copies * stored + 2 * width * rerank_vectors)
    found.options = options
    # 16 codewords in each subspace.
    found.query_multiply_adds = 0 if code_bytes is None else 16 * width
    found.fixed_bytes = 4 * (found.query_multiply_adds + width * found.num_centroids)
    return found


class ScannBaseline(Baseline):
    """A ScaNN searcher. If built with vectors, it re-orders in every search."""

    def __init__(
        self,
        searcher: Any,
        shape: tuple[int, int],
        doc_ids: Sequence[str] | None,
        reranks: bool,
        num_leaves: int | None,
    ):
        super().__init__(shape, doc_ids, reranks)
        self._searcher = searcher
        self.num_leaves, self.num_centroids = num_leaves or 1, num_leaves or 0
        with tempfile.TemporaryDirectory() as name:
            searcher.serialize(name)
            files = list(Path(name).iterdir())
            self.index_bytes = sum(file.stat().st_size for file in files)
            lists = np.zeros(self.num_documents, np.int64)  # (N,)
            if num_leaves:
                lists = np.load(Path(name) / "datapoint_to_token.npy")
        # SOAR leaves out a second list that would be the first: -1.
        self._lists = lists.reshape(self.num_documents, -1)  # (N, 1 or 2)
        self.leaf_sizes = np.bincount(
            lists[lists >= 0], minlength=self.num_leaves
        )  # (P,)

    def _check_rerank(self, rerank, k):
        rerank = super()._check_rerank(rerank, k)
        if self._reranks and not rerank:
            raise ValueError(
                "scann with rerank_vectors re-orders in every search: rerank must be "
                f"at least k={k}, got 0"
            )
        return rerank

    def _find(self, queries, k, visit, rerank, threads):
        settings = {
            "final_num_neighbors": k,
            "pre_reorder_num_neighbors": rerank or k,
            "leaves_to_search": visit.beam,
        }
        if len(queries) == 1:
            rows, scores = self._searcher.search(queries[0], **settings)
            missing = (0, k - len(rows))
            rows = np.pad(rows.astype(np.int64), missing, constant_values=-1)[None]
            scores = np.pad(scores, missing, constant_values=np.nan)[None]
        elif threads == 1:
            rows, scores = self._searcher.search_batched(queries, **settings)
        else:
            self._searcher.set_num_threads(threads)
            rows, scores = self._searcher.search_batched_parallel(queries, **settings)
        # ScaNN pads with row 0 and score NaN.
        return padded(scores, np.where(np.isnan(scores), -1, rows.astype(np.int64)))

    def _count(self, queries, visit):
        if not self.num_centroids:
            return np.full(len(queries), self.num_documents, np.int64)
        visited = np.empty(len(queries), np.int64)
        every, step = self.num_documents, max(1, _COUNTED // self.num_documents)
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            rows, scores = self._searcher.search_batched(
                queries[part], every, every, visit.beam
            )
            visited[part] = self._scored(rows, ~np.isnan(scores))
        return visited

    def _scored(self, rows, found):
        """Copies that were scored (N,), when all documents found (N, documents) are."""
        if self._lists.shape[1] == 1:
            return np.count_nonzero(found, axis=1)
        # A list was visited if all of its documents were found.
        scored = np.empty(len(rows), np.int64)
        for query, (some, real) in enumerate(zip(rows, found, strict=True)):
            lists = self._lists[some[real]]
            here = np.bincount(lists[lists >= 0], minlength=self.num_leaves)
            scored[query] = here[here == self.leaf_sizes].sum()
        return scored


def import_scann() -> ModuleType:
    """The module `scann`, or an ImportError that says how to install it."""
    try:
        import scann
    except ImportError as error:
        raise ImportError(
            "this baseline needs ScaNN: pip install 'ehi[baselines]'"
        ) from error
    return scann
