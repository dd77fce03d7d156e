"""Merges segments into one without deleted documents, a block of leaves at a time."""

import numpy as np

from ehi.index.contents import Documents, Segment, StringIds
from ehi.index.folder import Stream

_BLOCK_COPIES = 2**14  # copies of documents merged at once


def merged_arrays(contents):
    """The arrays of one segment with all documents that are not deleted.

    Copies are sorted by leaf again. Documents keep the order of their rows, so ties are
    broken as before. Memory: a block of 2^14 copies or the fullest leaf; 5 bytes a row;
    5 bytes a copy while leaves are counted.

    Returns:
        name -> array or Stream.

    Raises:
        IndexCorruptError: an array points outside another.
    """
    for segment in contents.segments:
        segment.check_layout()
    deleted = contents.deleted
    live = np.ones(contents.num_rows, bool) if deleted is None else ~deleted
    new_rows = np.cumsum(live, dtype=np.uint32) - np.uint32(1)  # (R,)
    sizes = contents.leaf_sizes
    copies = int(sizes.sum())
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])

    arrays = {"leaf_offsets": offsets}
    rows = (new_rows[rows] for rows in _blocks(contents, live, Segment.rows))
    arrays["leaf_rows"] = Stream("uint32", (copies,), rows)
    first = contents.segments[0]
    for name in ("vectors", "codes"):
        example = getattr(first, name)
        if example is not None:
            blocks = _blocks(contents, live, _part_of(name))
            shape = (copies, example.shape[1])
            arrays[name] = Stream(example.dtype.name, shape, blocks)
    if first.rerank_vectors is not None:
        shape = (contents.num_documents, first.rerank_vectors.shape[1])
        blocks = _rows_of_all(contents, "rerank_vectors")
        arrays["rerank_vectors"] = Stream("float16", shape, blocks)
    return arrays | _ids(contents)


def merged_text(contents):
    """What to show of the documents that are not deleted: parts of bytes, or None."""
    if contents.segments[0].documents is None:
        return None
    return (s.documents.keep(mask) for s, mask in _masks(contents))


def merged_segment(contents):
    """The merged arrays as a Segment in memory."""
    arrays = {
        name: value.array() if isinstance(value, Stream) else value
        for name, value in merged_arrays(contents).items()
    }
    ids = arrays.pop("ids", None)
    if ids is None:
        ids = StringIds(arrays.pop("id_offsets"), arrays.pop("id_text"))
    text = merged_text(contents)
    documents = None if text is None else Documents(np.concatenate(list(text)))
    return Segment(ids=ids, documents=documents, **arrays)


def _part_of(name):
    return lambda segment, start, stop: getattr(segment, name)[start:stop]


def _blocks(contents, live, part):
    """`part` of the copies that are not deleted, by leaf and then by row."""
    segments = contents.segments
    total = sum(segment.leaf_offsets for segment in segments)
    first, num_leaves = 0, len(total) - 1
    while first < num_leaves:
        room = total[first] + _BLOCK_COPIES
        last = int(np.searchsorted(total, room, side="right")) - 1
        last = max(last, first + 1)
        leaves, rows, parts = [], [], []
        for segment in segments:
            offsets = np.asarray(segment.leaf_offsets[first : last + 1])
            leaves.append(np.repeat(np.arange(first, last), np.diff(offsets)))
            rows.append(segment.rows(offsets[0], offsets[-1]))
            parts.append(part(segment, offsets[0], offsets[-1]))
        # Rows ascend from segment to segment, so a stable sort keeps their order.
        order = np.argsort(np.concatenate(leaves), kind="stable")
        order = order[live[np.concatenate(rows)[order]]]
        yield np.concatenate(parts)[order]
        first = last


def _masks(contents):
    """Each segment and a mask of its documents that are not deleted."""
    for segment in contents.segments:
        rows = slice(segment.first_row, segment.first_row + len(segment))
        if contents.deleted is None:
            yield segment, np.ones(len(segment), bool)
        else:
            yield segment, ~contents.deleted[rows]


def _rows_of_all(contents, name):
    """An array by row of all segments, a block at a time."""
    for segment, mask in _masks(contents):
        array = getattr(segment, name)
        for start in range(0, len(segment), _BLOCK_COPIES):
            part = slice(start, start + _BLOCK_COPIES)
            yield array[part][mask[part]]


def _ids(contents):
    kept = list(_masks(contents))
    if not isinstance(contents.segments[0].ids, StringIds):
        return {"ids": np.concatenate([s.ids[mask] for s, mask in kept])}
    parts = [s.ids.keep(mask) for s, mask in kept]
    offsets = np.zeros(contents.num_documents + 1, np.int64)
    np.cumsum(np.concatenate([lengths for lengths, _ in parts]), out=offsets[1:])
    return {
        "id_offsets": offsets,
        "id_text": np.concatenate([text for _, text in parts]),
    }
