"""Baselines: indexes of Faiss and ScaNN, by name."""

from collections.abc import Sequence

import numpy as np

from ehi.eval.baselines.base import Baseline
from ehi.eval.baselines.options import (
    OPTIONS,
    RABITQ_FACTORS,
    WITHOUT_CODEBOOKS,
    Options,
    check_options,
)
from ehi.index.check import check_count, check_embeddings, check_queries

BASELINES = tuple(OPTIONS)
# For ScaNN both lists and codes are optional.
WITH_LISTS = {
    "faiss-ivf", "linear-router", "faiss-ivfpq", "faiss-opq-ivfpq",
    "linear-router-opq", "faiss-ivfrabitq", "scann",
}  # fmt: skip
_RAW = {"faiss-flat", "faiss-ivf", "linear-router", "faiss-hnsw", "faiss-hnsw-sq"}
_CODES = set(BASELINES) - _RAW - {"scann"}
_ADDITIVE = {"faiss-rq", "faiss-lsq", "faiss-prq"}


def build_baseline(
    name: str,
    documents: np.ndarray,
    *,
    num_leaves: int | None = None,
    code_bytes: int | None = None,
    seed: int = 0,
    doc_ids: Sequence[str] | None = None,
    rerank_vectors: bool = False,
    options: Options | None = None,
    queries: np.ndarray | None = None,
) -> Baseline:
    """Train a library's index on document embeddings and add them to it.

    Args:
        name: one of `BASELINES`.
        documents: (N, D) float32 unit rows.
        num_leaves: P, the inverted lists of an IVF or ScaNN; None for other indexes.
        code_bytes: bytes of a document's code; None for raw vectors.
        seed: for all random choices. ScaNN has no seed and always builds the same.
        doc_ids: external ids of the N documents; None for their row numbers.
        rerank_vectors: also store 2-byte vectors for `rerank`.
        options: some of `ehi.eval.baselines.options`; None for the defaults.
        queries: training queries (rows, D) of a linear router, which also learns from
            the documents; None for the documents alone. Others ignore them.

    Raises:
        ValueError: unknown name or option, or sizes that do not fit together.
        ImportError: the library is not installed; the message says how to install it.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; there are {', '.join(BASELINES)}")
    documents = check_embeddings(documents)
    if doc_ids is not None and len(doc_ids) != len(documents):
        raise ValueError(f"{len(doc_ids)} doc_ids for {len(documents)} documents")
    if queries is not None:
        queries = check_queries(queries, documents.shape[1])
    options = check_options(name, options)
    _check_sizes(name, documents.shape, num_leaves, code_bytes)
    sizes = {"num_leaves": num_leaves, "code_bytes": code_bytes}
    kept = {"doc_ids": doc_ids, "rerank_vectors": rerank_vectors}
    # Faiss and ScaNN are optional, so each is imported only when it is needed.
    if name == "scann":
        from ehi.eval.baselines.scann import build_scann

        return build_scann(documents, options, **sizes, **kept)
    from ehi.eval.baselines.faiss_build import build_faiss

    return build_faiss(
        name, documents, options, queries,
        seed=check_count("seed", seed, 0), **sizes, **kept,
    )  # fmt: skip


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
        # Its bits are rotated principal axes, and there are D of those. ITQ after a
        # random expansion to 2 D took 50 s at D = 384 and had less recall than `lsh`.
        if 8 * code_bytes > width:
            raise ValueError(
                f"itq-lsh has at most one bit for each dimension: code_bytes="
                f"{code_bytes} are {8 * code_bytes} bits of {width} dimensions; use "
                "'lsh'"
            )
        return
    if name in ("faiss-rabitq", "faiss-ivfrabitq") and code_bytes <= RABITQ_FACTORS:
        raise ValueError(
            f"{name} stores {RABITQ_FACTORS} bytes of factors with the bits: code_bytes"
            f" must be more, got {code_bytes}"
        )
    if name not in WITHOUT_CODEBOOKS:
        _check_codes(name, rows, width, code_bytes)


def _check_codes(name, rows, width, code_bytes):
    codewords, blocks = 256, code_bytes
    if name in ("faiss-fastscan", "scann"):
        codewords, blocks = 16, 2 * code_bytes
    # An additive code has whole vectors as codewords.
    if name not in _ADDITIVE and width % blocks:
        raise ValueError(
            f"{name} with code_bytes={code_bytes} has {blocks} subspaces, which do not "
            f"divide the width {width}"
        )
    if rows < codewords:
        raise ValueError(f"{rows} documents are fewer than {codewords} codewords")
