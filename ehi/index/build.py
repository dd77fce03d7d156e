"""What the leaves of an index hold: vectors, or product-quantised codes."""

import re

import numpy as np

from ehi.index import check
from ehi.index.contents import Contents, Documents, Segment, check_ids
from ehi.index.index import Index
from ehi.index.search.blas import aligned_empty, one_blas_thread
from ehi.index.search.codes import pack_codes
from ehi.index.search.routing import assign_leaves, tree_shape
from ehi.index.search.topk import MAX_NUMBER

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


# MERGED ehi_index_build: Embeddings and trained parameters to an Index.


def build_index(
    embeddings,
    doc_ids,
    *,
    tree,
    query_tree=None,
    rotation=None,
    codebooks=None,
    assign_codebooks=None,
    leaf_centroids=None,
    spill=1,
    leaf_dtype="float32",
    rerank_vectors=False,
    encoder=None,
    config=None,
    query_head=None,
):
    """Routes every document to its top leaves and stores its vector or code there.

    Args:
        embeddings: (N, D) floats.
        doc_ids: N distinct ids, integers >= 0 or strings.
        tree: dict as in `ehi.index.search.routing`, or None for a flat index of one
        leaf.
        query_tree: the queries' own tree of the same height and branching, or None.
        rotation: (D, D) orthogonal, z = x @ rotation; PQ leaves only.
        codebooks: (M, K, S) for PQ leaves, None for raw ones.
        assign_codebooks: (M, K, S) that choose the codes, None for `codebooks`; a code
            keeps its meaning when codebooks are trained after it was given (JPQ).
        leaf_centroids: (P, D), codes are then of x - centroid; PQ leaves only.
        spill: leaves a document is stored in, s.
        leaf_dtype: 'float32' or 'float16', of the vectors in raw leaves.
        rerank_vectors: also keep all vectors as float16, for search(rerank=).
        encoder, config: JSON dicts, the identity of what made the embeddings.
        query_head: dict of arrays kept beside the index, or None.

    Returns:
        Index, in memory.

    Raises:
        ValueError: an argument that does not fit, an empty corpus, embeddings that are
            not finite, ids that repeat, more leaves than documents.
    """
    embeddings = check.check_embeddings(embeddings)
    num, width = embeddings.shape
    ids = check_ids(doc_ids, num)
    index = make_parameters(
        width, num,
        tree=tree, query_tree=query_tree, rotation=rotation, codebooks=codebooks,
        assign_codebooks=assign_codebooks, leaf_centroids=leaf_centroids, spill=spill,
        encoder=encoder, config=config, query_head=query_head,
    )  # fmt: skip
    segment = make_segment(
        index, embeddings, ids, leaf_dtype=leaf_dtype, rerank_vectors=rerank_vectors
    )
    index.contents = Contents((segment,))
    return index


def make_parameters(
    width, num, *, tree, query_tree=None, rotation=None, codebooks=None,
    assign_codebooks=None, leaf_centroids=None, spill=1, encoder=None, config=None,
    query_head=None,
):  # fmt: skip
    """An Index of checked parameters for `num` documents, without any yet."""
    if num > MAX_NUMBER:
        raise ValueError(f"{num} documents are more than the {MAX_NUMBER} of one index")
    tree, query_tree = _trees(tree, query_tree, width)
    num_leaves, spill = _check_leaves(tree, spill, num)
    check.check_json("encoder", encoder)
    check.check_json("config", config)
    quantiser = check_quantiser(
        width, num_leaves, codebooks=codebooks, assign_codebooks=assign_codebooks,
        rotation=rotation, leaf_centroids=leaf_centroids,
    )  # fmt: skip
    index = Index(
        width=width, spill=spill, tree=tree, query_tree=query_tree, encoder=encoder,
        config=config, query_head=_query_head(query_head), **quantiser,
    )  # fmt: skip
    for name, array in index.parameter_arrays().items():
        check.finite_rows(name, array.reshape(len(array), -1))
    return index


def make_segment(index, embeddings, ids, *, leaf_dtype, rerank_vectors, documents=None):
    """Documents stored as the parameters of an index say.

    Args:
        index: the Index; only its parameters are read.
        embeddings: (N, D) float32.
        ids: (N,) int64 or StringIds.
        leaf_dtype: of the vectors in raw leaves.
        rerank_vectors: also keep all vectors as float16.
        documents: JSON values to show, one for each row, or None.

    Returns:
        Segment.
    """
    leaf_offsets, leaf_rows, leaf_of_copy = _by_leaf(
        assign_leaves(embeddings, index.tree, index.spill), index.num_leaves
    )
    return Segment(
        leaf_offsets=leaf_offsets,
        leaf_rows=leaf_rows,
        ids=ids,
        rerank_vectors=half("rerank_vectors", embeddings) if rerank_vectors else None,
        documents=None if documents is None else Documents.of(documents),
        **make_leaves(index, embeddings, leaf_rows, leaf_of_copy, leaf_dtype),
    )


def _check_leaves(tree, spill, num):
    """Leaves of the tree and leaves of a document, if `num` documents have so many."""
    height, branching = tree_shape(tree)
    num_leaves = branching**height
    if num_leaves > num:
        raise ValueError(
            f"a tree of {num_leaves} leaves is too large for {num} documents"
        )
    spill = check.check_count("spill", spill)
    if spill > num_leaves:
        raise ValueError(f"spill {spill} is larger than the {num_leaves} leaves")
    return num_leaves, spill


def _by_leaf(assigned, num_leaves):
    """Copies of documents in leaf order, of the leaves (N, s) of each document.

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


def _trees(tree, query_tree, width):
    tree = check.check_tree(tree, width)
    query_tree = check.check_tree(query_tree, width, "query_tree")
    if query_tree is not None and tree_shape(query_tree) != tree_shape(tree):
        raise ValueError(
            "query_tree and tree must have the same height and branching, "
            f"got {tree_shape(query_tree)} and {tree_shape(tree)}"
        )
    return tree, query_tree


def _query_head(arrays):
    if arrays is None:
        return None
    bad = [key for key in arrays if not re.fullmatch(r"\w+", key, re.ASCII)]
    if bad:
        raise ValueError(f"query_head names must be plain words, got {bad}")
    return {key: np.asarray(value, np.float32) for key, value in arrays.items()}
