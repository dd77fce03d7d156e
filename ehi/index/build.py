"""Embeddings and trained parameters to an Index."""

import json
import re

import numpy as np

from ehi.index import check
from ehi.index.documents import StringIds
from ehi.index.index import Index
from ehi.index.route import assign_leaves, tree_shape
from ehi.index.score import pack_codes
from ehi.index.threads import one_blas_thread
from ehi.index.topk import MAX_NUMBER

_ENCODE_ROWS = 2048  # copies encoded at once: their distances stay in the cache


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
        tree: dict as in `ehi.index.route`, or None for a flat index of one leaf.
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
    if num > MAX_NUMBER:
        raise ValueError(f"{num} documents are more than the {MAX_NUMBER} of one index")
    ids = _external_ids(doc_ids, num)
    tree, query_tree = _trees(tree, query_tree, width)
    height, branching = tree_shape(tree)
    num_leaves = branching**height
    if num_leaves > num:
        raise ValueError(
            f"a tree of {num_leaves} leaves is too large for {num} documents"
        )
    spill = check.check_count("spill", spill)
    if spill > num_leaves:
        raise ValueError(f"spill {spill} is larger than the {num_leaves} leaves")
    _check_identity(encoder, config)

    copies = assign_leaves(embeddings, tree, spill).ravel()  # (N s,), by row
    order = np.argsort(copies, kind="stable")
    leaf_offsets = np.zeros(num_leaves + 1, np.int64)
    np.cumsum(np.bincount(copies, minlength=num_leaves), out=leaf_offsets[1:])
    leaf_rows = (order // spill).astype(np.uint32)
    leaves = _leaves(
        embeddings,
        leaf_rows,
        copies[order],
        num_leaves,
        codebooks=codebooks,
        assign_codebooks=assign_codebooks,
        rotation=rotation,
        leaf_centroids=leaf_centroids,
        leaf_dtype=leaf_dtype,
    )
    return Index(
        width=width,
        spill=spill,
        leaf_offsets=leaf_offsets,
        leaf_rows=leaf_rows,
        ids=ids,
        tree=tree,
        query_tree=query_tree,
        rerank_vectors=_half("rerank_vectors", embeddings) if rerank_vectors else None,
        encoder=encoder,
        config=config,
        query_head=_query_head(query_head),
        **leaves,
    )


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


def _leaves(
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
    """The Index fields of raw or PQ leaves, copies in the order of `rows`."""
    if leaf_dtype not in ("float32", "float16"):
        raise ValueError(
            f"leaf_dtype must be 'float32' or 'float16', got {leaf_dtype!r}"
        )
    if codebooks is None:
        for name, value in (
            ("rotation", rotation),
            ("leaf_centroids", leaf_centroids),
            ("assign_codebooks", assign_codebooks),
        ):
            if value is not None:
                raise ValueError(f"{name} needs codebooks")
        vectors = embeddings
        if leaf_dtype == "float16":
            vectors = _half("embeddings", embeddings)
        return {"vectors": vectors[rows]}
    width = embeddings.shape[1]
    codebooks = check.check_codebooks(codebooks, width)
    choosing = codebooks
    if assign_codebooks is not None:
        choosing = check.check_codebooks(assign_codebooks, width)
        if choosing.shape != codebooks.shape:
            raise ValueError(
                f"assign_codebooks are {choosing.shape}, codebooks {codebooks.shape}; "
                "they must have one shape"
            )
    if rotation is not None:
        rotation = check.check_rotation(rotation, width)
    if leaf_centroids is not None:
        leaf_centroids = check.check_centroids(leaf_centroids, num_leaves, width)
    codes = np.empty((len(rows), len(codebooks)), np.uint8)
    with one_blas_thread():  # the products are too small for more
        for start in range(0, len(rows), _ENCODE_ROWS):
            part = slice(start, start + _ENCODE_ROWS)
            vectors = embeddings[rows[part]]
            if leaf_centroids is not None:
                vectors -= leaf_centroids[leaf_of_copy[part]]
            if rotation is not None:
                vectors = vectors @ rotation
            codes[part] = encode_pq(vectors, choosing)
    return {
        "codes": pack_codes(codes, codebooks.shape[1]),
        "codebooks": codebooks,
        "assign_codebooks": None if choosing is codebooks else choosing,
        "rotation": rotation,
        "leaf_centroids": leaf_centroids,
    }


def _trees(tree, query_tree, width):
    tree = check.check_tree(tree, width)
    query_tree = check.check_tree(query_tree, width, "query_tree")
    if query_tree is not None and tree_shape(query_tree) != tree_shape(tree):
        raise ValueError(
            "query_tree and tree must have the same height and branching, "
            f"got {tree_shape(query_tree)} and {tree_shape(tree)}"
        )
    return tree, query_tree


def _external_ids(doc_ids, num):
    ids = list(doc_ids)
    if len(ids) != num:
        raise ValueError(f"{len(ids)} doc_ids for {num} embeddings")
    strings = all(isinstance(value, str) for value in ids)
    if not strings and not all(
        isinstance(value, int | np.integer) and value >= 0 for value in ids
    ):
        raise ValueError("doc_ids must be all strings or all integers from 0 up")
    if len(set(ids)) < num:
        seen = set()
        twice = next(value for value in ids if value in seen or seen.add(value))
        raise ValueError(f"doc_ids repeat: {twice!r} stands twice")
    return StringIds.of(ids) if strings else np.array(ids, np.int64)


def _check_identity(encoder, config):
    for name, value in (("encoder", encoder), ("config", config)):
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must be plain JSON: {error}") from None


def _query_head(arrays):
    if arrays is None:
        return None
    bad = [key for key in arrays if not re.fullmatch(r"\w+", key, re.ASCII)]
    if bad:
        raise ValueError(f"query_head names must be plain words, got {bad}")
    return {key: np.asarray(value, np.float32) for key, value in arrays.items()}


def _half(name, vectors):
    with np.errstate(over="ignore"):
        return check.finite_rows(f"{name} as float16", vectors.astype(np.float16))
