"""Adds, deletes and replaces documents of an index, and merges its segments.

Each function makes new Contents and gives them to the index as one object; a search
that runs meanwhile continues with the old ones. An index that was opened from a folder
writes there first, under the writer's lock. When a call returns, its work survives a
crash.
"""

import contextlib
import threading

import numpy as np

from ehi.index import check, store
from ehi.index.build import make_segment
from ehi.index.compact import merged_segment
from ehi.index.contents import Contents, Documents, as_ids, check_ids
from ehi.index.folder import writer_lock
from ehi.index.search.topk import MAX_NUMBER

_IN_MEMORY = threading.Lock()  # protects all indexes that have no folder to lock
_SWAPPING = threading.Lock()


def add(index, embeddings, ids, *, documents=None, encoder=None):
    """Adds documents as one segment: see `Index.add`."""
    ids, make = _incoming(index, embeddings, ids, documents, encoder)
    with _writing(index) as contents:
        there = np.flatnonzero(contents.find(ids) >= 0)
        if len(there):
            raise ValueError(
                f"{len(there)} ids are in the index already, first "
                f"{_named(ids, there[0])}; update() replaces documents"
            )
        _commit(index, contents.with_segment(make()))


def delete(index, ids, *, missing="raise"):
    """Deletes documents: see `Index.delete`."""
    check.check_choice("missing", missing, ("raise", "ignore"))
    ids = as_ids(ids)
    with _writing(index) as contents:
        rows = _rows(contents, ids, missing)
        if len(rows):
            _commit(index, contents.without(rows))
    return len(rows)


def update(index, embeddings, ids, *, documents=None, encoder=None, missing="raise"):
    """Replaces documents, all or none of them: see `Index.update`."""
    check.check_choice("missing", missing, ("raise", "add"))
    ids, make = _incoming(index, embeddings, ids, documents, encoder)
    with _writing(index) as contents:
        rows = _rows(contents, ids, missing)
        _commit(index, contents.without(rows).with_segment(make()))
    return len(rows)


def compact(index):
    """Merges all segments and drops deleted documents: see `Index.compact`."""
    with _writing(index) as contents:
        if len(contents.segments) == 1 and contents.deleted is None:
            return
        if contents.folder is not None:
            _swap(index, store.write_compacted(index.parameters, contents))
        else:
            index.contents = Contents((merged_segment(contents),))


def refresh(index):
    """Reads what others wrote since then: see `Index.refresh`."""
    old = index.contents
    if old.folder is None:
        return False
    new = store.read_newer(index.parameters, old)
    _swap(index, new)
    return new is not old


def _incoming(index, embeddings, ids, documents, encoder):
    """Checks new documents before anything is locked.

    Returns:
        Their ids, and a function that makes their segment.

    Raises:
        ValueError: they do not fit the index.
    """
    embeddings = check.check_embeddings(embeddings)
    if embeddings.shape[1] != index.width:
        raise ValueError(
            f"embeddings have width {embeddings.shape[1]}, the index {index.width}"
        )
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
        Documents.of(documents)  # refuses values that are not JSON

    def make():
        return make_segment(
            index.parameters, embeddings, ids, documents=documents,
            leaf_dtype="float32" if first.vectors is None else first.vectors.dtype.name,
            rerank_vectors=first.rerank_vectors is not None,
        )  # fmt: skip

    return ids, make


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
