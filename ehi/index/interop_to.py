"""An Index as an index of Faiss.

The leaves become the inverted lists of an IndexIVFFlat (raw leaves, float16 vectors as
the float32 values they are) or an IndexIVFPQ (codes, byte for byte), by inner product;
ids in the lists are document rows. A rotation stands before it, in an
IndexPreTransform.
"""

from dataclasses import replace

import numpy as np

from ehi.index.codes import decode
from ehi.index.interop_search import FaissIndex, import_faiss


def to_faiss(index, *, fastscan=False):
    """Copies the documents of an index into an index of Faiss.

    Deleted documents are left out; what is added or deleted later is not seen. The
    coarse quantiser holds leaf centroids where codes are of residuals, the nodes of a
    tree of height 1 without residual layer and biases, else the mean of each leaf.
    Only with the nodes does Faiss's own `search` visit the leaves that ours does, so
    search through the wrapper.

    Args:
        index: an Index.
        fastscan: an IndexIVFPQFastScan, for 4-bit codes: several times faster, with
            scores rounded by its 8-bit tables; see `rerank` of `FaissIndex.search`.

    Returns:
        FaissIndex.

    Raises:
        ImportError: Faiss is not installed.
        ValueError: fastscan of leaves other than 4-bit codes.
        IndexCorruptError: leaves point at rows that are not there.
    """
    faiss = import_faiss()
    source = replace(index)
    for segment in source.segments:
        segment.check_layout()
    width, codebooks = index.width, index.codebooks
    if fastscan and (codebooks is None or codebooks.shape[1] != 16):
        leaves = "raw vectors" if codebooks is None else f"K = {codebooks.shape[1]}"
        raise ValueError(f"fastscan needs codes of K = 16 codewords, got {leaves}")
    shape = (faiss.IndexFlatIP(width), width, index.num_leaves)
    if codebooks is None:
        lists = faiss.IndexIVFFlat(*shape, faiss.METRIC_INNER_PRODUCT)
    else:
        num_subspaces, num_codewords, _ = codebooks.shape
        bits = num_codewords.bit_length() - 1
        lists = faiss.IndexIVFPQ(
            *shape, num_subspaces, bits, faiss.METRIC_INNER_PRODUCT
        )
        faiss.copy_array_to_vector(codebooks.ravel(), lists.pq.centroids)
        lists.by_residual = index.leaf_centroids is not None
    shape[0].add(_fill(faiss, lists, source))
    lists.is_trained = True
    if fastscan:
        lists = faiss.IndexIVFPQFastScan(lists)
    if index.rotation is None:
        return FaissIndex(lists, source)
    rotation = faiss.LinearTransform(width, width, False)
    faiss.copy_array_to_vector(index.rotation.T.ravel(), rotation.A)
    rotation.is_trained = rotation.is_orthonormal = True
    return FaissIndex(faiss.IndexPreTransform(rotation, lists), source)


def _fill(faiss, lists, index):
    """Fills the inverted lists; returns the coarse centroids (P, D), rotated."""
    coarse = np.zeros((index.num_leaves, index.width), np.float32)
    given = _given_centroids(index)
    if given is not None:
        coarse[:] = given if index.rotation is None else given @ index.rotation
    for leaf in range(index.num_leaves):
        rows = np.ascontiguousarray(index.contents.rows_in_leaf(leaf), np.int64)
        if not len(rows):
            continue
        stored, vectors = _stored(index, leaf)
        lists.invlists.add_entries(
            leaf, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(stored)
        )
        lists.ntotal += len(rows)
        if given is None:
            coarse[leaf] = vectors().mean(axis=0)
    return coarse


def _given_centroids(index):
    """(P, D) vectors of the leaves that the index itself has, or None."""
    if index.leaf_centroids is not None:
        return index.leaf_centroids
    tree = index.routing_tree
    plain = tree is not None and tree.keys() == {"kind", "nodes", "scale"}
    if plain and len(tree["nodes"]) == 1 and tree["scale"] > 0:
        return tree["nodes"][0][0]
    return None


def _stored(index, leaf):
    """The bytes of a leaf as Faiss holds them, and a function giving their vectors."""
    deleted = index.contents.deleted
    parts = []
    for segment in index.segments:
        start, stop = segment.leaf_offsets[leaf : leaf + 2].tolist()
        part = (segment.vectors if segment.codes is None else segment.codes)[start:stop]
        if deleted is not None:
            part = part[~deleted[segment.rows(start, stop)]]
        parts.append(part)
    stored = np.concatenate(parts)
    if index.codebooks is None:
        stored = stored.astype(np.float32, copy=False)
        return stored.view(np.uint8), lambda: stored
    return stored, lambda: decode(stored, index.byte_codebooks)
