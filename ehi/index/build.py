"""Embeddings and trained parameters to an Index."""

import re

import numpy as np

from ehi.index import check
from ehi.index.documents import Documents, check_ids
from ehi.index.index import Index
from ehi.index.leaves import check_quantiser, half, make_leaves
from ehi.index.nodes import tree_shape
from ehi.index.route import assign_leaves
from ehi.index.segment import Contents, Segment
from ehi.index.topk import MAX_NUMBER


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
        tree: dict as in `ehi.index.nodes`, or None for a flat index of one leaf.
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
