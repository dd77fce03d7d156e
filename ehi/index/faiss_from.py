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

_KINDS = ("IndexFlatIP", "IndexIVFFlat", "IndexPQ", "IndexIVFPQ")
_UNIT = 1e-4  # largest error of a norm that counts as 1
_L2 = (
    "this {} ranks by L2 distance, but an Index scores raw vectors by inner product. "
    "The orders differ unless all vectors have unit norm: normalise the embeddings, or "
    "build the Faiss index with METRIC_INNER_PRODUCT"
)


def from_faiss(faiss_index, ids=None):
    """An index of Faiss as an Index.

    The metric is the inner product or L2. Codes of an L2 index get the score 'l2',
    which ranks as Faiss does: 1 - d / 2 for a unit query and Faiss's squared distance
    d. Raw vectors of an L2 index must have unit norm, and inner products rank them.

    Lists and codes do not change. The coarse centroids become the nodes of a tree of
    height 1, so `search(beam=b)` visits the lists that Faiss visits with nprobe = b. A
    flat index becomes an index of one leaf. A rotation of raw vectors is undone.

    Args:
        faiss_index: IndexFlatIP, IndexFlatL2, IndexIVFFlat, or IndexPQ or IndexIVFPQ of
            4 or 8 bits. Its coarse quantiser is IndexFlatIP or IndexFlatL2. Orthonormal
            LinearTransforms (OPQ) may come before it, and an L2norm if all queries and
            new documents have unit norm. An IDMap or IDMap2 around any of these keeps
            its ids.
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
    core, steps, id_map = _unwrapped(faiss, faiss_index)
    _check_core(faiss, core)
    rotation = _rotation(faiss, steps, core.d)
    width, tree, centroids = core.d, None, None
    if isinstance(core, faiss.IndexIVF):
        tree, centroids = _coarse(faiss, core, rotation)
        offsets, numbers, stored = _lists(faiss, core, id_map)
    else:
        offsets, numbers, stored = _one_list(faiss, core, id_map)
    if not len(numbers):
        raise ValueError("this Faiss index is empty")
    quantiser, leaves = {}, {}
    if isinstance(core, faiss.IndexIVFPQ | faiss.IndexPQ):
        residual = tree is not None and core.by_residual
        quantiser = check_quantiser(
            width, len(offsets) - 1, codebooks=_codebooks(faiss, core.pq),
            assign_codebooks=None, rotation=rotation,
            leaf_centroids=centroids if residual else None,
        )  # fmt: skip
        quantiser["score"] = "l2" if core.metric_type == faiss.METRIC_L2 else "ip"
        leaves["codes"] = stored
    else:
        vectors = finite_rows("vectors", stored.view(np.float32))
        if core.metric_type == faiss.METRIC_L2:
            _check_norms(core, vectors)
        vectors = vectors if rotation is None else vectors @ rotation.T
        leaves["vectors"] = vectors
    distinct, rows = np.unique(numbers, return_inverse=True)
    parameters = Parameters(
        width=width,
        spill=_spill(distinct, rows, offsets),
        tree=check_tree(tree, width),
        **quantiser,
    )
    for name, array in parameters.arrays().items():
        finite_rows(name, array.reshape(len(array), -1))
    segment = Segment(
        leaf_offsets=offsets,
        leaf_rows=rows.astype(np.uint32),
        ids=_external(distinct, ids),
        **leaves,
    )
    return Index(parameters, Contents((segment,)))


def _unwrapped(faiss, index):
    """The index inside IDMaps and IndexPreTransforms.

    Returns:
        The index; the transforms before it, in order; the id of each of its documents,
        or None if these are their numbers.
    """
    steps, id_map = [], None
    while isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        if isinstance(index, faiss.IndexIDMap):
            inner = faiss.vector_to_array(index.id_map)
            id_map = inner if id_map is None else id_map[inner]
        else:
            numbers = range(index.chain.size())
            chain = [index.chain.at(number) for number in numbers]
            steps += [faiss.downcast_VectorTransform(step) for step in chain]
        index = faiss.downcast_index(index.index)
    return index, steps, id_map


def _check_core(faiss, core):
    """Refuses a kind or a metric that an Index cannot represent."""
    kind = type(core).__name__
    # A subclass holds something else beside its lists, or in them.
    if kind not in (*_KINDS, "IndexFlat", "IndexFlatL2"):
        raise ValueError(
            f"cannot take {kind}; allowed are {', '.join(_KINDS)}, also in an "
            "IndexPreTransform or an IndexIDMap"
        )
    if core.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise ValueError(
            "the metric must be METRIC_INNER_PRODUCT or METRIC_L2, got number "
            f"{core.metric_type}"
        )


def _check_norms(core, vectors):
    """Refuses vectors (N, D) that an L2 distance orders unlike an inner product."""
    norms = np.linalg.norm(vectors, axis=1)
    if np.abs(norms - 1).max() > _UNIT:
        raise ValueError(_L2.format(type(core).__name__))


def _is_l2norm(faiss, step):
    return isinstance(step, faiss.NormalizationTransform) and step.norm == 2


def _rotation(faiss, steps, width):
    """The product (D, D) of orthonormal transforms, or None if there are none.

    Raises:
        ValueError: a transform that an Index cannot represent.
    """
    # An L2norm has no matrix, and a rotation before or after it keeps the norm.
    matrices = [_matrix(faiss, step) for step in steps if not _is_l2norm(faiss, step)]
    if not matrices:
        return None
    rotation = np.eye(width, dtype=np.float32)
    for matrix in matrices:
        rotation = rotation @ matrix
    return check_rotation(rotation, width)


def _matrix(faiss, step):
    """The matrix (D, D) of one transform, applied as x @ matrix."""
    kind = type(step).__name__
    if not isinstance(step, faiss.LinearTransform):
        raise ValueError(
            f"cannot take {kind}; allowed before an index are orthonormal "
            "LinearTransforms and L2norm: apply other transforms to the embeddings"
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


def _one_list(faiss, core, id_map):
    """`_lists` of an index without lists."""
    numbers = _mapped(np.arange(core.ntotal), id_map)
    order = np.argsort(numbers, kind="stable")
    stored = faiss.vector_to_array(core.codes).reshape(core.ntotal, core.code_size)
    return np.array([0, core.ntotal]), numbers[order], stored[order]


def _lists(faiss, core, id_map):
    """Starts of the lists (P + 1,); the id (C,) and the bytes (C, m) of each copy.

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
        found = _mapped(list_ids(faiss, lists, number), id_map)
        order = np.argsort(found, kind="stable")
        pointer = lists.get_codes(number)
        codes = faiss.rev_swig_ptr(pointer, sizes[number] * core.code_size)
        ids[part] = found[order]
        stored[part] = codes.reshape(-1, core.code_size)[order]
        lists.release_codes(number, pointer)
    return offsets, ids, stored


def _mapped(numbers, id_map):
    """The ids that an IDMap gives to documents by their numbers (n,)."""
    if id_map is None:
        return numbers
    if numbers.max(initial=-1) >= len(id_map):
        raise ValueError(
            f"the IDMap has {len(id_map)} ids, none for document {numbers.max()}"
        )
    return id_map[numbers]


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
