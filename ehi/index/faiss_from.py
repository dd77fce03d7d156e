"""An index of Faiss as an Index: the lists become leaves, centroids become tree nodes.

`from_faiss` imports Faiss when it runs, not with this module.
"""

import numpy as np

from ehi.index.check import finite_rows
from ehi.index.contents import Contents, Segment, check_ids
from ehi.index.faiss_to import import_faiss, list_ids
from ehi.index.index import Index
from ehi.index.parameters import (
    Parameters,
    check_quantiser,
    check_rotation,
    check_tree,
)

_KINDS = ("IndexFlatIP", "IndexIVFFlat", "IndexIVFPQ")


def from_faiss(faiss_index, ids=None):
    """An inner-product index of Faiss as an Index.

    Lists and codes do not change. The coarse centroids become the nodes of a tree of
    height 1, so `search(beam=b)` visits the lists that Faiss visits with nprobe = b. A
    flat index becomes an index of one leaf. A rotation of raw vectors is undone.

    Args:
        faiss_index: IndexFlatIP, IndexIVFFlat, or IndexIVFPQ of 4 or 8 bits. Its coarse
            quantiser is IndexFlatIP or IndexFlatL2. Orthonormal LinearTransforms (OPQ)
            may come before it.
        ids: the external id of Faiss id i is ids[i]; None takes the Faiss ids. An id in
            several lists is one spilled document; all ids must be in the same number of
            lists. For an export of `to_faiss`, i is the row, and rows of deleted
            documents count.

    Returns:
        Index, in memory.

    Raises:
        ImportError: Faiss is not installed.
        ValueError: another metric or another kind of index, an empty one, ids that do
            not fit.

    Example:
        >>> import faiss, numpy as np
        >>> flat = faiss.IndexFlatIP(4)
        >>> flat.add(np.eye(4, dtype=np.float32))
        >>> index = from_faiss(flat, ids=["a", "b", "c", "d"])
        >>> index.search(np.array([[0.1, 0.9, 0.5, 0]]), k=2).ids.tolist()
        [['b', 'c']]
    """
    faiss = import_faiss()
    core, rotation = _core(faiss, faiss_index)
    width, tree, centroids = core.d, None, None
    if isinstance(core, faiss.IndexIVF):
        tree, centroids = _coarse(faiss, core, rotation)
        offsets, numbers, stored = _lists(faiss, core)
    else:
        offsets, numbers = np.array([0, core.ntotal]), np.arange(core.ntotal)
        stored = core.reconstruct_n(0, core.ntotal) if core.ntotal else None
    if not len(numbers):
        raise ValueError("this Faiss index is empty")
    quantiser, leaves = {}, {}
    if isinstance(core, faiss.IndexIVFPQ):
        quantiser = check_quantiser(
            width, core.nlist, codebooks=_codebooks(faiss, core.pq),
            assign_codebooks=None, rotation=rotation,
            leaf_centroids=centroids if core.by_residual else None,
        )  # fmt: skip
        leaves["codes"] = stored
    else:
        vectors = stored.view(np.float32)
        vectors = vectors if rotation is None else vectors @ rotation.T
        leaves["vectors"] = finite_rows("vectors", vectors)
    distinct, rows = np.unique(numbers, return_inverse=True)
    parameters = Parameters(
        width=width,
        spill=_spill(distinct, rows, offsets),
        tree=check_tree(tree, width),
        **quantiser,
    )
    segment = Segment(
        leaf_offsets=offsets,
        leaf_rows=rows.astype(np.uint32),
        ids=_external(distinct, ids),
        **leaves,
    )
    return Index(parameters, Contents((segment,)))


def _core(faiss, index):
    """The index after all transforms, and the product of these (D, D) or None.

    Raises:
        ValueError: a kind, metric or transform that an Index cannot represent.
    """
    chained = isinstance(index, faiss.IndexPreTransform)
    core = faiss.downcast_index(index.index) if chained else index
    kind = type(core).__name__
    if isinstance(core, faiss.Index) and core.metric_type == faiss.METRIC_L2:
        raise ValueError(
            f"this {kind} ranks by L2 distance, but an Index by inner product. The "
            "orders differ unless all norms are equal: normalise the embeddings and "
            "build the Faiss index with METRIC_INNER_PRODUCT"
        )
    # A subclass holds something else beside its lists, or in them.
    if kind not in (*_KINDS, "IndexFlat"):
        raise ValueError(
            f"cannot take {kind}; allowed are {', '.join(_KINDS)}, also in an "
            "IndexPreTransform"
        )
    if core.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(
            f"the metric must be METRIC_INNER_PRODUCT, got number {core.metric_type}"
        )
    if not chained:
        return core, None
    rotation = np.eye(index.d, dtype=np.float32)
    for number in range(index.chain.size()):
        step = faiss.downcast_VectorTransform(index.chain.at(number))
        rotation = rotation @ _matrix(faiss, step)
    return core, check_rotation(rotation, index.d)


def _matrix(faiss, step):
    """The matrix (D, D) of one transform, applied as x @ matrix."""
    kind = type(step).__name__
    if not isinstance(step, faiss.LinearTransform):
        raise ValueError(
            f"cannot take {kind}; allowed before an index are orthonormal "
            "LinearTransforms: apply other transforms to the embeddings"
        )
    if step.d_in != step.d_out:
        raise ValueError(f"this {kind} changes the width: {step.d_in} to {step.d_out}")
    if step.A.size() != step.d_in * step.d_out:
        raise ValueError(f"this {kind} is not trained")
    if step.have_bias:
        raise ValueError(f"this {kind} has a bias, which an Index cannot represent")
    return faiss.vector_to_array(step.A).reshape(step.d_out, step.d_in).T


def _coarse(faiss, core, rotation):
    """The tree that visits the leaves that the coarse quantiser visits; (P, D)."""
    quantiser = faiss.downcast_index(core.quantizer)
    kind = type(quantiser).__name__
    metrics = (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2)
    flat = kind in ("IndexFlat", "IndexFlatIP", "IndexFlatL2")
    if not flat or quantiser.metric_type not in metrics:
        raise ValueError(
            "the coarse quantiser must be IndexFlatIP or IndexFlatL2, got "
            f"{kind} of metric {quantiser.metric_type}"
        )
    if quantiser.ntotal != core.nlist:
        raise ValueError(
            f"{quantiser.ntotal} coarse centroids for {core.nlist} lists: not trained"
        )
    centroids = quantiser.reconstruct_n(0, core.nlist)  # (P, D)
    if rotation is not None:
        centroids = centroids @ rotation.T
    tree = {"kind": "per_node", "nodes": [centroids[None]], "scale": 1.0}
    if quantiser.metric_type == faiss.METRIC_L2:
        # The nearest c has the largest q.c - |c|^2 / 2.
        tree["biases"] = [-(centroids**2).sum(axis=1)[None] / 2]
    return tree, centroids


def _lists(faiss, core):
    """Where each list starts (P + 1,); the id (C,) and the bytes (C, m) of each copy.

    Within a list, copies are in the order of their ids.
    """
    lists = core.invlists
    sizes = [lists.list_size(number) for number in range(core.nlist)]
    offsets = np.zeros(core.nlist + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    ids = np.empty(offsets[-1], np.int64)
    stored = np.empty((offsets[-1], core.code_size), np.uint8)
    for number in np.flatnonzero(sizes).tolist():
        part = slice(*offsets[number : number + 2])
        found = list_ids(faiss, lists, number)
        order = np.argsort(found, kind="stable")
        pointer = lists.get_codes(number)
        codes = faiss.rev_swig_ptr(pointer, sizes[number] * core.code_size)
        ids[part] = found[order]
        stored[part] = codes.reshape(-1, core.code_size)[order]
        lists.release_codes(number, pointer)
    return offsets, ids, stored


def _codebooks(faiss, quantiser):
    """(M, K, S)."""
    if quantiser.nbits not in (4, 8):
        raise ValueError(f"codes must have 4 or 8 bits, got {quantiser.nbits}")
    shape = (quantiser.M, quantiser.ksub, quantiser.dsub)
    return faiss.vector_to_array(quantiser.centroids).reshape(shape)


def _spill(distinct, rows, offsets):
    """The number of lists that every document is in."""
    counts = np.bincount(rows)
    same_list = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    twice = (rows[1:] == rows[:-1]) & (same_list[1:] == same_list[:-1])
    if twice.any():
        again = distinct[rows[1:][twice][0]]
        raise ValueError(f"Faiss id {again} is twice in one list")
    if counts.min() < counts.max():
        most, least = distinct[counts.argmax()], distinct[counts.argmin()]
        raise ValueError(
            f"Faiss id {most} is in {counts.max()} lists and id {least} in "
            f"{counts.min()}; all ids must be in the same number of lists"
        )
    return int(counts[0])


def _external(numbers, ids):
    """External ids of the distinct Faiss ids (N,), ascending."""
    if ids is None:
        if numbers[0] < 0:
            raise ValueError(
                f"ids start from 0, the Faiss index has {numbers[0]}: give its "
                "documents other ids"
            )
        return check_ids(numbers, len(numbers))
    ids = list(ids)
    if numbers[0] < 0 or numbers[-1] >= len(ids):
        outside = numbers[0] if numbers[0] < 0 else numbers[-1]
        raise ValueError(f"there are {len(ids)} ids, none for Faiss id {outside}")
    return check_ids([ids[number] for number in numbers.tolist()], len(numbers))
