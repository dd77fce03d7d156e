"""Refuses arrays of a folder whose shapes, dtypes or offsets do not fit each other."""

from ehi.index.check import check_codebooks
from ehi.index.documents import StringIds
from ehi.index.nodes import tree_shape


def check_fit(index):
    """Checks the parameters of an Index, its documents apart.

    Raises:
        ValueError: naming the array.
    """
    if index.query_tree is not None:
        shapes = tree_shape(index.tree), tree_shape(index.query_tree)
        if shapes[0] != shapes[1]:
            raise ValueError(f"tree and query_tree have the shapes {shapes}")
    if index.spill > index.num_leaves:
        raise ValueError(f"spill {index.spill} of {index.num_leaves} leaves")
    names = ("assign_codebooks", "rotation", "leaf_centroids")
    if index.codebooks is None:
        for name in names:
            if getattr(index, name) is not None:
                raise ValueError(f"{name} without codebooks")
        return
    codebooks = check_codebooks(index.codebooks, index.width)
    square = (index.width, index.width)
    leaves = (index.num_leaves, index.width)
    _expect("codebooks", index.codebooks, codebooks.shape, "float32")
    for name, shape in zip(names, (codebooks.shape, square, leaves), strict=True):
        if getattr(index, name) is not None:
            _expect(name, getattr(index, name), shape, "float32")


def check_segment(index, segment, num, first):
    """Checks the arrays of a segment of `num` documents.

    Args:
        index: the Index whose parameters it has to fit.
        segment: the Segment.
        num: its documents, as the manifest says.
        first: the first segment, which all have to be like, or None.

    Raises:
        ValueError: naming the array.
    """
    if isinstance(segment.ids, StringIds):
        offsets = segment.ids.offsets
        _expect("id_offsets", offsets, (num + 1,), "int64")
        if offsets[0]:
            raise ValueError(f"id_offsets start at {offsets[0]}, not 0")
        _expect("id_text", segment.ids.text, (offsets[-1],), "uint8")
    else:
        _expect("ids", segment.ids, (num,), "int64")
    copies, offsets = num * index.spill, segment.leaf_offsets
    _expect("leaf_rows", segment.leaf_rows, (copies,), "uint32")
    _expect("leaf_offsets", offsets, (index.num_leaves + 1,), "int64")
    descend = (offsets[1:] < offsets[:-1]).any()  # a difference may overflow
    if offsets[0] or offsets[-1] != copies or descend:
        raise ValueError(f"leaf_offsets do not ascend from 0 to {copies}")
    if (segment.vectors is None) == (segment.codes is None):
        raise ValueError("leaves hold either vectors or codes")
    if (segment.codes is None) != (index.codebooks is None):
        raise ValueError("codes need codebooks, and vectors have none")
    if segment.codes is None:
        shape = (copies, index.width)
        _expect("vectors", segment.vectors, shape, "float32", "float16")
    else:
        num_subspaces, num_codewords, _ = index.codebooks.shape
        code_bytes = num_subspaces if num_codewords == 256 else num_subspaces // 2
        _expect("codes", segment.codes, (copies, code_bytes), "uint8")
    if segment.rerank_vectors is not None:
        shape = (num, index.width)
        _expect("rerank_vectors", segment.rerank_vectors, shape, "float16")
    if first is not None and _kind(segment) != _kind(first):
        raise ValueError(f"segments differ: {_kind(first)} and {_kind(segment)}")


def _kind(segment):
    """What all segments of an index have in common."""
    return {
        "string ids": isinstance(segment.ids, StringIds),
        "vectors": None if segment.vectors is None else segment.vectors.dtype.name,
        "rerank_vectors": segment.rerank_vectors is not None,
        "documents": segment.documents is not None,
    }


def _expect(name, array, shape, *dtypes):
    if array.shape != shape or array.dtype.name not in dtypes:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}, expected {dtypes[0]} {shape}"
        )
