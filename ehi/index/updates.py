"""Adds, deletes and replaces documents of an index, and merges its segments.

Each function makes new Contents and gives them to the index as one object; a search
that runs meanwhile continues with the old ones. An index that was opened from a folder
writes there first, under the writer's lock. When a call returns, its work survives a
crash.
"""

import contextlib
import threading
from dataclasses import replace

import numpy as np

from ehi.index import check, store
from ehi.index.build import check_unit, make_segment
from ehi.index.columns import Metadata, StoredDocuments, StringIds, metadata_of
from ehi.index.contents import Segment, as_ids, check_ids
from ehi.index.drift import grown, remembering
from ehi.index.folder import Stream, writer_lock
from ehi.index.search.topk import MAX_NUMBER

_IN_MEMORY = threading.Lock()  # protects all indexes that have no folder to lock
_SWAPPING = threading.Lock()
_BLOCK_COPIES = 2**14  # copies of documents merged at once


def add(index, embeddings, ids, *, documents=None, metadata=None, encoder=None):
    """Adds documents, routed and encoded by the trained parameters.

    Each call makes a segment, and every search reads all segments: add many documents
    at once, and `compact` from time to time.

    Args:
        embeddings: (N, D) floats.
        ids: N ids that the index does not have, of the kind it has.
        documents: N JSON values to show; needed if the index stores them.
        metadata: N dicts of the fields of the index, as of `build_index`; needed if the
            index stores metadata.
        encoder: identity of what made the embeddings, compared with the index's.

    Raises:
        ValueError: an argument does not fit the index, or an id is there already.
        IndexLockedError: somebody else is writing to the folder.
        OSError: the folder cannot be written; the index is unchanged.

    >>> from ehi.index import build_index
    >>> index = build_index(np.eye(3)[:2], ["a", "b"], tree=None)
    >>> index.add(np.eye(3)[2:], ["c"])
    >>> index.search(np.eye(3)[2:], k=1).ids.tolist(), index.num_documents
    ([['c']], 3)
    """
    ids, make = _incoming(index, embeddings, ids, documents, metadata, encoder)
    with _writing(index) as contents:
        there = np.flatnonzero(contents.find(ids) >= 0)
        if len(there):
            raise ValueError(
                f"{len(there)} ids are in the index already, first "
                f"{_named(ids, there[0])}; update() replaces documents"
            )
        _commit(index, grown(contents, *make()))


def delete(index, ids, *, missing="raise"):
    """Deletes documents and returns how many were deleted.

    Args:
        ids: external ids.
        missing: 'raise', or 'ignore' ids that are not there.

    Raises:
        LookupError: an id is not there.
        IndexLockedError, OSError: as in `add`.

    >>> from ehi.index import build_index
    >>> index = build_index(np.eye(3), ["a", "b", "c"], tree=None)
    >>> index.delete(["a", "z"], missing="ignore"), index.num_documents
    (1, 2)
    """
    check.check_choice("missing", missing, ("raise", "ignore"))
    ids = as_ids(ids)
    with _writing(index) as contents:
        rows = _rows(contents, ids, missing)
        if len(rows):
            _commit(index, contents.without(rows))
    return len(rows)


def update(
    index, embeddings, ids, *, documents=None, metadata=None, encoder=None,
    missing="raise",
):  # fmt: skip
    """Replaces documents, all or none, and returns how many were replaced.

    Args:
        embeddings, ids, documents, metadata, encoder: as in `add`.
        missing: 'raise', or 'add' documents that are not there.

    Raises:
        LookupError: an id is not there.
        ValueError, IndexLockedError, OSError: as in `add`.

    >>> from ehi.index import build_index
    >>> index = build_index(np.eye(3), ["a", "b", "c"], tree=None)
    >>> index.update(2 * np.eye(3)[:1], ["a"])
    1
    >>> index.search(np.eye(3)[:1], k=1).scores.tolist()
    [[2.0]]
    """
    check.check_choice("missing", missing, ("raise", "add"))
    ids, make = _incoming(index, embeddings, ids, documents, metadata, encoder)
    with _writing(index) as contents:
        rows = _rows(contents, ids, missing)
        _commit(index, grown(contents.without(rows), *make()))
    return len(rows)


def compact(index):
    """Merges all segments into one and drops deleted documents.

    Results stay the same, but for scores that differ by rounding. Rows get new numbers.
    Memory: see `merged_arrays`.

    Raises:
        IndexLockedError, OSError: as in `add`.

    >>> from ehi.index import build_index
    >>> index = build_index(np.eye(3)[:2], ["a", "b"], tree=None)
    >>> index.add(np.eye(3)[2:], ["c"])
    >>> index.compact()
    >>> len(index.segments), index.num_documents
    (1, 3)
    """
    with _writing(index) as contents:
        if len(contents.segments) == 1 and contents.deleted is None:
            return
        contents = remembering(contents)
        if contents.folder is not None:
            merged = merged_arrays(contents)[0], merged_texts(contents)
            _swap(index, store.write_compacted(index.parameters, contents, *merged))
        else:
            merged = (_merged_segment(contents),)
            index.contents = replace(contents, segments=merged, deleted=None)


def keep_setting(index, setting):
    """Stores the search setting of `Index.tune`, in the folder if there is one."""
    with _writing(index) as contents:
        _commit(index, replace(contents, setting=setting))


def refresh(index):
    """Reads what others have written to the folder; returns whether they have.

    Raises:
        ValueError: the folder holds an index of other parameters now.
        IndexCorruptError: as `open_index`.

    >>> import tempfile
    >>> from ehi.index import build_index, open_index, save_index
    >>> path = f"{tempfile.mkdtemp()}/index"
    >>> save_index(build_index(np.eye(3), ["a", "b", "c"], tree=None), path)
    >>> reader, writer = open_index(path), open_index(path)
    >>> writer.delete(["a"])
    1
    >>> reader.num_documents, reader.refresh(), reader.num_documents
    (3, True, 2)
    """
    old = index.contents
    if old.folder is None:
        return False
    new = store.read_newer(index.parameters, old)
    _swap(index, new)
    return new is not old


def _incoming(index, embeddings, ids, documents, metadata, encoder):
    """Checks new documents before anything is locked.

    Returns:
        Their ids, and a function that makes their segment and its squares.

    Raises:
        ValueError: they do not fit the index.
    """
    embeddings = check.check_embeddings(embeddings)
    if embeddings.shape[1] != index.width:
        raise ValueError(
            f"embeddings have width {embeddings.shape[1]}, the index {index.width}"
        )
    check_unit(index.parameters, embeddings)
    if encoder is not None:
        check.check_same_encoder(index.encoder or {}, encoder)
    ids = check_ids(ids, len(embeddings))
    first = index.contents.segments[0]
    if (documents is None) != (first.documents is None):
        has, got = ("no", "some") if first.documents is None else ("its", "no")
        raise ValueError(f"the index stores {has} documents to show, got {got}")
    if documents is not None:
        documents = list(documents)
        if len(documents) != len(embeddings):
            raise ValueError(
                f"{len(documents)} documents to show for {len(embeddings)} embeddings"
            )
        StoredDocuments.of(documents)  # refuses values that are not JSON
    metadata = _metadata(index.contents.fields, metadata, len(embeddings))

    def make():
        return make_segment(
            index.parameters, embeddings, ids, documents=documents, metadata=metadata,
            leaf_dtype="float32" if first.vectors is None else first.vectors.dtype.name,
            rerank_vectors=first.rerank_vectors is not None,
        )  # fmt: skip

    return ids, make


def _metadata(fields, metadata, num):
    """The Metadata of new documents, or None.

    Args:
        fields: of the index: field -> kind, or None.
        metadata: a dict for each document, or None.
        num: of the documents.

    Raises:
        ValueError: they do not fit the fields.
    """
    if (metadata is None) != (fields is None):
        if fields is None:
            raise ValueError("the index stores no metadata, got some")
        known = ", ".join(map(repr, fields)) or "no field"
        raise ValueError(f"the index stores metadata ({known}), got none")
    return None if fields is None else metadata_of(metadata, num, fields)


@contextlib.contextmanager
def _writing(index):
    """Locks the index and yields its newest contents."""
    if index.contents.folder is None:
        with _IN_MEMORY:
            yield index.contents
        return
    with writer_lock(index.contents.folder.path):
        refresh(index)
        yield index.contents


def _commit(index, contents):
    if contents.num_rows > MAX_NUMBER:
        raise ValueError(
            f"{contents.num_rows} documents, deleted ones included, are more than the "
            f"{MAX_NUMBER} of one index; compact it first"
        )
    if contents.folder is None:
        index.contents = contents
    else:
        _swap(index, store.write_update(index.parameters, contents))


def _swap(index, contents):
    """Makes an index see other contents, unless it sees newer ones already.

    Two threads may read the folder and come back in the other order.
    """
    with _SWAPPING:
        there, new = index.contents.folder, contents.folder
        if there and new.manifest["generation"] < there.manifest["generation"]:
            return
        index.contents = contents


def _rows(contents, ids, missing):
    """Rows of the ids that are there, each once."""
    rows = contents.find(ids)
    absent = np.flatnonzero(rows < 0)
    if len(absent) and missing == "raise":
        raise LookupError(
            f"{len(absent)} ids are not in the index, first {_named(ids, absent[0])}"
        )
    return np.unique(rows[rows >= 0])


def _named(ids, position):
    if isinstance(ids, np.ndarray):
        return int(ids[position])
    return repr(ids.take(np.array([position]))[0])


def merged_arrays(contents, metadata=None):
    """The arrays of one segment with all documents that are not deleted.

    Copies are sorted by leaf again. Documents keep the order of their rows, so ties are
    broken as before. Memory: a block of 2^14 copies or the fullest leaf; 5 bytes a row;
    5 bytes a copy while leaves are counted; the metadata.

    Args:
        contents: the documents.
        metadata: dicts to store instead of the metadata that are there, or None.

    Returns:
        name -> array or Stream; field -> kind of the metadata, or None.

    Raises:
        ValueError: there are more or fewer metadata than documents, or they are of
            mixed kinds.
        IndexCorruptError: an array points outside another.
    """
    for segment in contents.segments:
        segment.check_layout()
    if metadata is not None:
        metadata = metadata_of(metadata, contents.num_documents)
    elif contents.fields is not None:
        parts = [(segment.metadata, mask) for segment, mask in _masks(contents)]
        metadata = Metadata.merged(parts)
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
    for name in ("vectors", "codes", "factors"):
        example = getattr(first, name)
        if example is not None:
            blocks = _blocks(contents, live, _part_of(name))
            shape = (copies, *example.shape[1:])
            arrays[name] = Stream(example.dtype.name, shape, blocks)
    if first.rerank_vectors is not None:
        shape = (contents.num_documents, first.rerank_vectors.shape[1])
        blocks = _rows_of_all(contents, "rerank_vectors")
        arrays["rerank_vectors"] = Stream("float16", shape, blocks)
    arrays |= _ids(contents)
    if metadata is None:
        return arrays, None
    return arrays | metadata.arrays(), metadata.fields


def merged_texts(contents, documents=None):
    """The values to show of the documents that are not deleted.

    Args:
        contents: the documents.
        documents: JSON values to show instead of those that are stored, or None.

    Returns:
        'documents' -> parts of bytes; or nothing if there is nothing to show.

    Raises:
        ValueError: there are more or fewer values than documents, or one is not JSON.
    """
    if documents is not None:
        documents = list(documents)
        if len(documents) != contents.num_documents:
            raise ValueError(
                f"{len(documents)} documents to show for an index of "
                f"{contents.num_documents}"
            )
        return {"documents": [StoredDocuments.of(documents).text]}
    if contents.segments[0].documents is None:
        return {}
    return {"documents": (s.documents.keep(mask) for s, mask in _masks(contents))}


def _merged_segment(contents):
    """The merged arrays as a Segment in memory."""
    merged, fields = merged_arrays(contents)
    arrays = {
        name: value.array() if isinstance(value, Stream) else value
        for name, value in merged.items()
    }
    ids = arrays.pop("ids", None)
    if ids is None:
        ids = StringIds(arrays.pop("id_offsets"), arrays.pop("id_text"))
    documents = metadata = None
    for parts in merged_texts(contents).values():
        documents = StoredDocuments(np.concatenate(list(parts)))
    if fields is not None:
        names = [name for name in arrays if name.startswith("metadata.")]
        stored = {name: arrays.pop(name) for name in names}
        metadata = Metadata.from_arrays(fields, stored, contents.num_documents)
    return Segment(ids=ids, documents=documents, metadata=metadata, **arrays)


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
