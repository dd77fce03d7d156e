"""Embeddings and trained parameters to the documents of an index.

embeddings -> leaves of each document -> copies in leaf order -> vectors or codes
"""

import numpy as np

from ehi.index import check
from ehi.index.columns import StoredDocuments, metadata_of
from ehi.index.contents import Contents, Segment, check_ids
from ehi.index.parameters import make_parameters
from ehi.index.search.blas import aligned_empty, one_blas_thread
from ehi.index.search.codes import decode, factor_bytes, factors_of, pack_codes
from ehi.index.search.routing import assign_leaves

_ENCODE_ROWS = 2048  # copies encoded at once: their distances stay in the cache


def count_nothing(documents):
    """The `progress` of a build that nobody watches."""


def build(
    embeddings, doc_ids, *, leaves=None, leaf_dtype="float32", rerank_vectors=False,
    metadata=None, progress=None, **parameters,
):  # fmt: skip
    """The Parameters and the Contents of a new index: see `build_index`."""
    embeddings = check.check_embeddings(embeddings)
    num, width = embeddings.shape
    ids = check_ids(doc_ids, num)
    if metadata is not None:
        metadata = metadata_of(metadata, num)
    parameters = make_parameters(width, num, **parameters)
    check_unit(parameters, embeddings)
    if leaves is not None:
        leaves = check.check_leaves(
            leaves, num, parameters.spill, parameters.num_leaves
        )
    segment, squares = make_segment(
        parameters, embeddings, ids, leaf_dtype=leaf_dtype,
        rerank_vectors=rerank_vectors, metadata=metadata, leaves=leaves,
        progress=progress or count_nothing,
    )  # fmt: skip
    return parameters, Contents((segment,), history=first_history(num, squares))


def first_history(num, squares):
    """The history of a new index: see `ehi.index.drift`.

    Args:
        num: its documents.
        squares: sum of |x - x^|^2 over their copies and the number of these, or None.
    """
    distortion = mean_square(squares)
    return {"documents": num, "distortion": distortion, "added": 0,
            "added_distortion": None}  # fmt: skip


def mean_square(squares):
    """The mean of (sum, number) in four digits, which hide how it was summed."""
    return None if squares is None else float(f"{squares[0] / squares[1]:.4g}")


def check_unit(parameters, embeddings):
    """Refuses embeddings (N, D) that are not unit vectors, if the score needs them."""
    if parameters.has_factors:
        check.finite_rows("embeddings", embeddings, unit_for=parameters.score)


def make_segment(
    parameters, embeddings, ids, *, leaf_dtype, rerank_vectors, documents=None,
    metadata=None, leaves=None, progress=count_nothing,
):  # fmt: skip
    """Routes documents and stores them as the parameters say.

    Args:
        parameters: the Parameters.
        embeddings: (N, D) float32.
        ids: (N,) int64 or StringIds.
        leaf_dtype: of the vectors in raw leaves.
        rerank_vectors: also keep all vectors as float16.
        documents: JSON values to show, one for each row, or None.
        metadata: the Metadata of all rows, or None.
        leaves: (N, s) int64 of each document, or None for those of the tree.
        progress: called with the number of documents of every block that is done.

    Returns:
        Segment, and the squares of `make_leaves`.
    """
    assigned = leaves
    if leaves is None:
        assigned = assign_leaves(
            embeddings, parameters.tree, parameters.spill, progress=progress
        )
    else:
        progress(len(embeddings))
    leaf_offsets, leaf_rows, leaf_of_copy = _by_leaf(assigned, parameters.num_leaves)
    stored, squares = make_leaves(
        parameters, embeddings, leaf_rows, leaf_of_copy, leaf_dtype, progress
    )
    segment = Segment(
        leaf_offsets=leaf_offsets,
        leaf_rows=leaf_rows,
        ids=ids,
        rerank_vectors=half("rerank_vectors", embeddings) if rerank_vectors else None,
        documents=None if documents is None else StoredDocuments.of(documents),
        metadata=metadata,
        **stored,
    )
    return segment, squares


def _by_leaf(assigned, num_leaves):
    """Puts copies of documents in leaf order, given the leaves (N, s) of each document.

    Returns:
        leaf_offsets (P + 1,), where each leaf starts; leaf_rows (N s,), the document of
        each copy; leaf_of_copy (N s,).
    """
    copies = assigned.ravel()  # (N s,), by row
    order = np.argsort(copies, kind="stable")
    leaf_offsets = np.zeros(num_leaves + 1, np.int64)
    np.cumsum(np.bincount(copies, minlength=num_leaves), out=leaf_offsets[1:])
    leaf_rows = (order // assigned.shape[1]).astype(np.uint32)
    return leaf_offsets, leaf_rows, copies[order]


def make_leaves(
    parameters, embeddings, rows, leaf_of_copy, leaf_dtype, progress=count_nothing
):
    """The vectors, or codes and factors, of copies of documents, as of a Segment.

    Args:
        parameters: the Parameters.
        embeddings: (N, D) float32.
        rows: (C,) document of each copy, in leaf order.
        leaf_of_copy: (C,) leaf of each copy.
        leaf_dtype: 'float32' or 'float16', of the vectors in raw leaves.
        progress: called with the number of documents of every block that is done.

    Returns:
        name -> array, 'factors' only if the score needs them; the sum of |x - x^|^2
        over the copies and their number, None for vectors.

    Raises:
        ValueError: another dtype, or embeddings too large for float16.
    """
    check.check_choice("leaf_dtype", leaf_dtype, ("float32", "float16"))
    if parameters.codebooks is None:
        if leaf_dtype == "float16":
            embeddings = half("embeddings", embeddings)
        vectors = aligned_empty((len(rows), parameters.width), leaf_dtype)
        embeddings.take(rows, 0, out=vectors, mode="clip")  # 'clip' avoids a copy
        progress(len(rows) // parameters.spill)
        return {"vectors": vectors}, None
    codes, factors, square = encode_copies(
        parameters, embeddings, rows, leaf_of_copy, progress
    )
    stored = {"codes": pack_codes(codes, parameters.codebooks.shape[1])}
    if factors is not None:
        stored["factors"] = factors
    return stored, (square, len(rows))


def encode_copies(parameters, embeddings, rows, leaf_of_copy, progress):
    """Codes and factors of copies of documents, a block of them at a time.

    Args:
        parameters, embeddings, rows, leaf_of_copy, progress: as of `make_leaves`.

    Returns:
        (C, M) uint8, one code a byte; (C,) uint8, or None if the score needs none; the
        sum of |x - x^|^2, where x^ has the codewords that were chosen.
    """
    choosing = parameters.assign_codebooks
    choosing = parameters.codebooks if choosing is None else choosing
    codes = np.empty((len(rows), len(choosing)), np.uint8)
    factors = np.empty(len(rows), np.uint8) if parameters.has_factors else None
    square = 0.0
    with one_blas_thread():  # the products are too small for more threads
        for start in range(0, len(rows), _ENCODE_ROWS):
            part = slice(start, start + _ENCODE_ROWS)
            vectors = embeddings[rows[part]]
            if parameters.leaf_centroids is not None:
                vectors -= parameters.leaf_centroids[leaf_of_copy[part]]
            if parameters.rotation is not None:
                vectors = vectors @ parameters.rotation
            codes[part] = encode_pq(vectors, choosing)
            known = decode(codes[part], choosing)
            missed = vectors - known
            square += float(np.vdot(missed, missed))
            if factors is not None:
                if choosing is not parameters.codebooks:
                    known = decode(codes[part], parameters.codebooks)
                if parameters.leaf_centroids is not None:
                    centroids = parameters.rotated_centroids[leaf_of_copy[part]]
                    known += centroids
                    vectors += centroids
                found = factors_of(parameters.score, known, vectors)
                factors[part] = factor_bytes(found)
            stop = min(part.stop, len(rows))
            progress(stop // parameters.spill - start // parameters.spill)
    return codes, factors, square


def encode_pq(vectors, codebooks):
    """The nearest codeword of every sub-vector: argmin_j |x_m - codeword_mj|.

    Args:
        vectors: (N, D) float32, rotated, centroids subtracted.
        codebooks: (M, K, S).

    Returns:
        (N, M) int64 codes; of equal distances the smaller code wins.
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
    """Vectors as float16, refused if one is too large or too small for that."""
    vectors = np.asarray(vectors, np.float32)
    return check.finite_rows(name, vectors, half=True).astype(np.float16)
