"""What the leaves of an index hold: vectors, or product-quantised codes."""

import numpy as np

from ehi.index import check
from ehi.index.score import pack_codes
from ehi.index.threads import one_blas_thread

_ENCODE_ROWS = 2048  # copies encoded at once: their distances stay in the cache


def make_leaves(
    embeddings,
    rows,
    leaf_of_copy,
    num_leaves,
    *,
    codebooks,
    assign_codebooks,
    rotation,
    leaf_centroids,
    leaf_dtype,
):
    """The Index fields of raw or PQ leaves, copies in the order of `rows`.

    Args:
        embeddings: (N, D) float32.
        rows: (N s,) document of each copy, in leaf order.
        leaf_of_copy: (N s,) leaf of each copy.
        num_leaves: P.
        codebooks, assign_codebooks, rotation, leaf_centroids, leaf_dtype: as of
            `build_index`.

    Raises:
        ValueError: an argument that does not fit.
    """
    if leaf_dtype not in ("float32", "float16"):
        raise ValueError(
            f"leaf_dtype must be 'float32' or 'float16', got {leaf_dtype!r}"
        )
    transform = {"rotation": rotation, "leaf_centroids": leaf_centroids}
    if codebooks is None:
        for name, value in {**transform, "assign_codebooks": assign_codebooks}.items():
            if value is not None:
                raise ValueError(f"{name} needs codebooks")
        vectors = embeddings
        if leaf_dtype == "float16":
            vectors = half("embeddings", embeddings)
        return {"vectors": vectors[rows]}
    width = embeddings.shape[1]
    codebooks, choosing = _check_codebooks(codebooks, assign_codebooks, width)
    if rotation is not None:
        transform["rotation"] = check.check_rotation(rotation, width)
    if leaf_centroids is not None:
        transform["leaf_centroids"] = check.check_centroids(
            leaf_centroids, num_leaves, width
        )
    codes = _encode_copies(embeddings, rows, leaf_of_copy, choosing, **transform)
    return {
        "codes": pack_codes(codes, codebooks.shape[1]),
        "codebooks": codebooks,
        "assign_codebooks": None if choosing is codebooks else choosing,
        **transform,
    }


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
        closeness = words @ codebooks[m].T - half_norms[m]  # (N, K)
        codes[:, m] = closeness.argmax(axis=1)
    return codes


def half(name, vectors):
    """Vectors as float16, if all of them stay finite."""
    with np.errstate(over="ignore"):
        return check.finite_rows(f"{name} as float16", vectors.astype(np.float16))


def _check_codebooks(codebooks, assign_codebooks, width):
    """The codebooks that decode, and those that choose: the same, or frozen ones."""
    codebooks = check.check_codebooks(codebooks, width)
    if assign_codebooks is None:
        return codebooks, codebooks
    choosing = check.check_codebooks(assign_codebooks, width)
    if choosing.shape != codebooks.shape:
        raise ValueError(
            f"assign_codebooks are {choosing.shape}, codebooks {codebooks.shape}; "
            "they must have one shape"
        )
    return codebooks, choosing


def _encode_copies(
    embeddings, rows, leaf_of_copy, codebooks, *, rotation, leaf_centroids
):
    """Codes (N s, M) uint8 of all copies, a block of rows at a time."""
    codes = np.empty((len(rows), len(codebooks)), np.uint8)
    with one_blas_thread():  # the products are too small for more
        for start in range(0, len(rows), _ENCODE_ROWS):
            part = slice(start, start + _ENCODE_ROWS)
            vectors = embeddings[rows[part]]
            if leaf_centroids is not None:
                vectors -= leaf_centroids[leaf_of_copy[part]]
            if rotation is not None:
                vectors = vectors @ rotation
            codes[part] = encode_pq(vectors, codebooks)
    return codes
