"""Adds, deletes and replaces documents of an index, and merges its segments.

It also says how far this has moved the index since it was built. Contents keep a
history for that, a dict of

    documents, distortion        those of the build; |x - x^|^2, mean over copies
    added, added_distortion      the same of all documents that were added since
    leaf_sizes                   (P,) of the build, once its segment was merged

where a distortion is None for vectors, or if it is not known.

Each function makes new Contents and gives them to the index as one object; a search
that runs meanwhile continues with the old ones. An index that was opened from a folder
writes there first, under the writer's lock. When a call returns, its work survives a
crash.
"""

import contextlib
import threading
from dataclasses import dataclass, replace

import numpy as np

from ehi.index import check, store
from ehi.index.build import check_unit, make_segment, mean_square
from ehi.index.contents import (
    Segment,
    StoredDocuments,
    StringIds,
    as_ids,
    check_ids,
)
from ehi.index.folder import Stream, writer_lock
from ehi.index.search.search import as_queries, chosen_setting, routed
from ehi.index.search.topk import MAX_NUMBER

_IN_MEMORY = threading.Lock()  # protects all indexes that have no folder to lock
_SWAPPING = threading.Lock()
_BLOCK_COPIES = 2**14  # copies of documents merged at once


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
        _commit(index, _grown(contents, *make()))


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
        _commit(index, _grown(contents.without(rows), *make()))
    return len(rows)


def compact(index):
    """Merges all segments and drops deleted documents: see `Index.compact`."""
    with _writing(index) as contents:
        if len(contents.segments) == 1 and contents.deleted is None:
            return
        contents = remembering(contents)
        if contents.folder is not None:
            merged = merged_arrays(contents), merged_texts(contents)
            _swap(index, store.write_compacted(index.parameters, contents, *merged))
        else:
            merged = (_merged_segment(contents),)
            index.contents = replace(contents, segments=merged, deleted=None)


def keep_setting(index, setting):
    """Stores the search setting of `Index.tune`, in the folder if there is one."""
    with _writing(index) as contents:
        _commit(index, replace(contents, setting=setting))


@dataclass(frozen=True)
class Drift:
    """How far an index has moved since it was built. `print` explains it.

    Shares are of the documents at that time; None where something is not known.

    Attributes:
        documents_built, documents_now: their numbers.
        documents_added: all that were added since, also if they are deleted by now.
        visited_built, visited_now: mean share of the documents that the given queries
            visit: in the leaves as they were built, and as they are.
        visited_tuned: the share that the queries of `Index.tune` visited then.
        distortion_built, distortion_added: mean |x - x^|^2 of a document x and its code
            x^, of the documents of the build and of those added since. None for
            vectors.
        imbalance_built, imbalance_now: standard deviation of the leaf sizes over their
            mean; 0 is balanced.

    Example:
        >>> print(Drift(1000, 1100, 150, 0.1, 0.12, None, 0.2, 0.31, 0.4, 0.52))
        documents: 1,000 built, 1,100 now, 150 added since
        visited: 10% built, 12% now
        distortion of codes: 0.2 built, 0.31 added
        imbalance of leaves: 0.4 built, 0.52 now
    """

    documents_built: int
    documents_now: int
    documents_added: int
    visited_built: float | None
    visited_now: float | None
    visited_tuned: float | None
    distortion_built: float | None
    distortion_added: float | None
    imbalance_built: float
    imbalance_now: float

    def __str__(self):
        lines = [
            f"documents: {self.documents_built:,} built, {self.documents_now:,} now, "
            f"{self.documents_added:,} added since"
        ]
        if self.visited_now is not None:
            line = (
                f"visited: {100 * self.visited_built:.3g}% built, "
                f"{100 * self.visited_now:.3g}% now"
            )
            if self.visited_tuned is not None:
                line += f", {100 * self.visited_tuned:.3g}% of other queries when tuned"
            lines.append(line)
        known = self.distortion_built, self.distortion_added
        if known != (None, None):
            built, added = ("unknown" if x is None else f"{x:.3g}" for x in known)
            if not self.documents_added:
                added = "nothing"
            lines.append(f"distortion of codes: {built} built, {added} added")
        lines.append(
            f"imbalance of leaves: {self.imbalance_built:.3g} built, "
            f"{self.imbalance_now:.3g} now"
        )
        return "\n".join(lines)


def drift(index, queries=None, *, beam=None, min_prob=None):
    """Says how far documents and leaves have moved since the index was built: Drift.

    Queries that visit a larger share than they did search slower; added documents of
    higher distortion have codes that do not suit them. Both, and growing imbalance,
    call for training the index anew.

    A folder that was written before this was kept, or by `from_faiss`, does not know
    its build: its first segment stands for it, and distortions are None.

    Args:
        queries: (N, D) floats, or N texts if the index names its text encoder; None
            leaves visited shares out. They are routed, and nothing is scored.
        beam, min_prob: as of `Index.search`; by default the stored setting.

    Returns:
        Drift.

    Raises:
        ValueError: queries, beam or min_prob do not fit, as in `Index.search`; an empty
            list of queries.

    Example:
        >>> import numpy as np
        >>> from ehi.index import build_index
        >>> tree = {"kind": "per_node", "nodes": [np.eye(2)[None]], "scale": 1.0}
        >>> index = build_index(np.eye(2), range(2), tree=tree)
        >>> index.add(np.eye(2)[[0, 0]], [2, 3])
        >>> drift = index.drift(np.eye(2)[:1], beam=1)
        >>> drift.visited_built, drift.visited_now, drift.imbalance_now
        (0.5, 0.75, 0.5)
    """
    parameters, contents = index.parameters, index.contents
    history = _history_of(contents)
    then, now = _sizes_built(contents), contents.leaf_sizes
    visited = None, None
    if queries is not None:
        queries = as_queries(index, queries)
        setting = chosen_setting(parameters, contents, 1, beam, min_prob, 0)
        counts = np.zeros(2)
        for _, routes in routed(
            parameters, queries, setting["beam"], setting["min_prob"]
        ):
            leaves = routes.leaves[routes.leaves >= 0]
            counts += then[leaves].sum(), now[leaves].sum()
        numbers = history["documents"], contents.num_documents
        shares = counts / np.maximum(numbers, 1) / len(queries)
        visited = shares.tolist()
    return Drift(
        documents_built=history["documents"], documents_now=contents.num_documents,
        documents_added=history["added"],
        visited_built=visited[0], visited_now=visited[1],
        visited_tuned=(contents.setting or {}).get("visited"),
        distortion_built=history["distortion"],
        distortion_added=history["added_distortion"],
        imbalance_built=imbalance(then), imbalance_now=imbalance(now),
    )  # fmt: skip


def imbalance(sizes):
    """Standard deviation of leaf sizes (P,) over their mean; 0 is balanced."""
    return float(sizes.std() / sizes.mean()) if sizes.any() else 0.0


def _history_of(contents):
    """The history; if there is none, what the first segment says of it."""
    if contents.history is not None:
        return contents.history
    first, *others = map(len, contents.segments)
    return {"documents": first, "distortion": None, "added": sum(others),
            "added_distortion": None}  # fmt: skip


def _sizes_built(contents):
    """Copies in each leaf when the index was built: (P,) int64."""
    sizes = _history_of(contents).get("leaf_sizes")
    return contents.segments[0].leaf_sizes() if sizes is None else sizes


def remembering(contents):
    """Contents whose history has what a merge of their segments would lose."""
    if len(contents.segments) == 1 and contents.deleted is None:
        return contents
    sizes = _sizes_built(contents)
    history = {**_history_of(contents), "leaf_sizes": sizes}
    return replace(contents, history=history)


def _grown(contents, segment, squares):
    """Contents with another segment, of documents with these squares."""
    old, num = _history_of(contents), len(segment)
    total, distortion = old["added"] + num, mean_square(squares)
    if old["added_distortion"] is not None:
        share = num / total
        distortion = share * distortion + (1 - share) * old["added_distortion"]
    history = {**old, "added": total, "added_distortion": distortion}
    return replace(contents.with_segment(segment), history=history)


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
    return arrays | _ids(contents)


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
    arrays = {
        name: value.array() if isinstance(value, Stream) else value
        for name, value in merged_arrays(contents).items()
    }
    ids = arrays.pop("ids", None)
    if ids is None:
        ids = StringIds(arrays.pop("id_offsets"), arrays.pop("id_text"))
    documents = None
    for parts in merged_texts(contents).values():
        documents = StoredDocuments(np.concatenate(list(parts)))
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
