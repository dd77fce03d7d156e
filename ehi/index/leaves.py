"""What the leaves of an index hold: vectors, or product-quantised codes."""

import numpy as np

from ehi.index import check
from ehi.index.aligned import aligned_empty
from ehi.index.codes import pack_codes
from ehi.index.threads import one_blas_thread

_ENCODE_ROWS = 2048  # copies encoded at once: their distances stay in the cache


def check_quantiser(
    width, num_leaves, *, codebooks, assign_codebooks, rotation, leaf_centroids
):
    """The parameters of PQ leaves as float32 arrays that fit; all None of raw leaves.

    Raises:
        ValueError: an argument that does not fit.
    """
    parts = {
        "codebooks": codebooks,
        "assign_codebooks": assign_codebooks,
        "rotation": rotation,
        "leaf_centroids": leaf_centroids,
    }
    if codebooks is None:
        for name, value in parts.items():
            if value is not None:
                raise ValueError(f"{name} needs codebooks")
        return parts
    parts["codebooks"] = check.check_codebooks(codebooks, width)
    if assign_codebooks is not None:
        choosing = check.check_codebooks(assign_codebooks, width)
        if choosing.shape != parts["codebooks"].shape:
            raise ValueError(
                f"assign_codebooks are {choosing.shape}, codebooks "
                f"{parts['codebooks'].shape}; they must have one shape"
            )
        parts["assign_codebooks"] = choosing
    if rotation is not None:
        parts["rotation"] = check.check_rotation(rotation, width)
    if leaf_centroids is not None:
        parts["leaf_centroids"] = check.check_centroids(
            leaf_centroids, num_leaves, width
        )
    return parts


def make_leaves(index, embeddings, rows, leaf_of_copy, leaf_dtype):
    """The vectors or codes of copies of documents, as a Segment holds them.

    Args:
        index: the Index; only its parameters are read.
        embeddings: (N, D) float32.
        rows: (C,) document of each copy, in leaf order.
        leaf_of_copy: (C,) leaf of each copy.
        leaf_dtype: 'float32' or 'float16', of the vectors in raw leaves.

    Raises:
        ValueError: another dtype, or embeddings too large for float16.
    """
    if leaf_dtype not in ("float32", "float16"):
        raise ValueError(
            f"leaf_dtype must be 'float32' or 'float16', got {leaf_dtype!r}"
        )
    if index.codebooks is None:
        if leaf_dtype == "float16":
            embeddings = half("embeddings", embeddings)
        vectors = aligned_empty((len(rows), index.width), leaf_dtype)
        embeddings.take(rows, 0, out=vectors, mode="clip")  # which spares a copy
        return {"vectors": vectors}
    codes = encode_copies(index, embeddings, rows, leaf_of_copy)
    return {"codes": pack_codes(codes, index.codebooks.shape[1])}


def encode_copies(index, embeddings, rows, leaf_of_copy):
    """Codes (C, M) uint8 of copies of documents, a block of them at a time."""
    choosing = index.assign_codebooks
    choosing = index.codebooks if choosing is None else choosing
    codes = np.empty((len(rows), len(choosing)), np.uint8)
    with one_blas_thread():  # the products are too small for more
        for start in range(0, len(rows), _ENCODE_ROWS):
            part = slice(start, start + _ENCODE_ROWS)
            vectors = embeddings[rows[part]]
            if index.leaf_centroids is not None:
                vectors -= index.leaf_centroids[leaf_of_copy[part]]
            if index.rotation is not None:
                vectors = vectors @ index.rotation
            codes[part] = encode_pq(vectors, choosing)
    return codes


def encode_pq(vectors, codebooks):
    """The nearest codeword of every sub-vector: argmin_j |x_m - codeword_mj|.

    Args:
        vectors: (N, D) float32, rotated, and without their centroids.
        codebooks: (M, K, S).

    Returns:
        (N, M) int64 codes; equal distances go to the smaller code.
    """
    num_subspaces, _, width = codebooks.shape
    half_norms = (codebooks**2).sum(axis=2) / 2  # (M, K)
    codes = np.empty((len(vectors), num_subspaces), np.int64)
    for m in range(num_subspaces):
        words = vectors[:, m * width : (m + 1) * width]
        closeness = words @ codebooks[m].T  # (N, K)
        closeness -= half_norms[m]  # in place: twice as fast
        codes[:, m] = closeness.argmax(axis=1)
    return codes


def half(name, vectors):
    """Vectors as float16, if all of them stay finite."""
    with np.errstate(over="ignore"):
        return check.finite_rows(f"{name} as float16", vectors.astype(np.float16))
