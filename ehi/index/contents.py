"""The documents of an index: segments of vectors or codes, ids, and what to show.

A Segment holds documents that were added together. Contents are all segments of an
index at one moment, and which of their documents are deleted.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ehi.index.check import IndexCorruptError
from ehi.index.columns import Metadata, StoredDocuments, StringIds
from ehi.index.folder import Folder
from ehi.index.where import compile_condition

# Arrays that a segment stores besides its ids and the documents to show.
SEGMENT_ARRAYS = (
    "leaf_offsets",
    "leaf_rows",
    "vectors",
    "codes",
    "factors",
    "rerank_vectors",
)
_LARGEST_ID = 2**63 - 1  # largest integer id


def check_ids(doc_ids, num):
    """External ids as (N,) int64 or StringIds, all distinct.

    Raises:
        ValueError: there are not `num` ids, they are of several kinds, or one repeats.
    """
    ids = doc_ids if isinstance(doc_ids, np.ndarray) else _listed(doc_ids)
    kept = as_ids(ids)
    if len(kept) != num:
        raise ValueError(f"{len(kept)} doc_ids for {num} embeddings")
    if len(set(ids)) < num:
        seen = set()
        twice = next(value for value in ids if value in seen or seen.add(value))
        raise ValueError(f"doc_ids repeat: {twice!r} is there twice")
    return kept


def as_ids(ids):
    """Ids as (N,) int64 or StringIds.

    Raises:
        ValueError: one id instead of several, or ids that are neither all strings nor
            all integers from 0 to 2^63 - 1.
    """
    if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
        for value in (ids.min(), ids.max()) if ids.size else ():
            if not 0 <= value <= _LARGEST_ID:
                raise ValueError(f"integer ids are from 0 to 2^63 - 1, got {value}")
        return ids.astype(np.int64)
    ids = _listed(ids)
    if ids and all(isinstance(value, str) for value in ids):
        return StringIds.of(ids)
    for value in ids:
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not (whole and 0 <= value <= _LARGEST_ID):
            raise ValueError(
                "ids must be all strings or all integers from 0 to 2^63 - 1, got "
                f"{value!r} among {len(ids)}"
            )
    return np.array(ids, np.int64)


def _listed(ids):
    """A list of ids; a single id, even a string of several letters, is refused."""
    one = isinstance(ids, str | bytes) or not isinstance(ids, Iterable)
    if one or getattr(ids, "ndim", 1) != 1:
        raise ValueError(f"ids must be several in a row, as [1, 2]; got {ids!r}")
    return list(ids)


def rows_of(ids, order, wanted):
    """The row of each wanted id: (n,) int64, -1 for ids that are not there.

    Args:
        ids: (N,) int64 or StringIds.
        order: their argsort, or `StringIds.row_of_string()`.
        wanted: n ids of the same kind, as `as_ids` makes them.

    Raises:
        ValueError: ids of another kind.
    """
    strings = isinstance(ids, StringIds)
    if len(wanted) and strings != isinstance(wanted, StringIds):
        kinds = ("strings", "integers") if strings else ("integers", "strings")
        raise ValueError(f"the ids of this index are {kinds[0]}, got {kinds[1]}")
    if not len(wanted) or not len(ids):
        return np.full(len(wanted), -1, np.int64)
    if strings:
        text, offsets = wanted.text.tobytes(), wanted.offsets.tolist()
        rows = (order.get(text[a:b], -1) for a, b in itertools.pairwise(offsets))
        return np.fromiter(rows, np.int64, len(wanted))
    place = np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)
    rows = order[place]
    return np.where(ids[rows] == wanted, rows, -1)


@dataclass(frozen=True, eq=False)
class Segment:
    """Documents added together. Their copies are sorted by leaf, then by row.

    The copies in leaf p are leaf_offsets[p] .. leaf_offsets[p + 1]. There are C >= N
    copies: a document that is spilled to s leaves has s. Arrays may be memory-mapped
    and must not be written to.

    Attributes:
        leaf_offsets: (P + 1,) int64.
        leaf_rows: (C,) uint32 rows of documents, counted from the segment's first.
        ids: external ids by row, (N,) int64 or StringIds.
        vectors: (C, D) float32 or float16 in raw leaves, else None.
        codes: (C, M) uint8 in PQ leaves, (C, M / 2) if K = 16, else None.
        factors: (C,) uint8 if the score needs them, see `ehi.index.search.codes`, or
            None.
        rerank_vectors: (N, D) float16 by row, or None.
        documents: what to show of each document, or None.
        metadata: what a search may filter by, or None.
        first_row: row of its first document in the index.
        source: the sha256 sums of its files, or None if it was never stored.
    """

    leaf_offsets: np.ndarray
    leaf_rows: np.ndarray
    ids: np.ndarray | StringIds
    vectors: np.ndarray | None = None
    codes: np.ndarray | None = None
    factors: np.ndarray | None = None
    rerank_vectors: np.ndarray | None = None
    documents: StoredDocuments | None = None
    metadata: Metadata | None = None
    first_row: int = 0
    source: tuple[str, ...] | None = None

    def __len__(self):
        return len(self.ids)

    @property
    def num_copies(self):
        return len(self.leaf_rows)

    @property
    def code_bytes(self):
        """Bytes of codes or vectors, every copy."""
        return (self.vectors if self.codes is None else self.codes).nbytes

    @property
    def leaf_bytes(self):
        """Bytes of codes or vectors and factors, every copy, and re-rank vectors."""
        others = (self.factors, self.rerank_vectors)
        others = sum(array.nbytes for array in others if array is not None)
        return self.code_bytes + others

    def rows(self, start, stop):
        """Index rows of the copies start .. stop: (m,)."""
        return self.rows_at(slice(start, stop))

    def rows_at(self, copies):
        """Index rows of copies, given as a slice or as numbers (m,): (m,)."""
        rows = self.leaf_rows[copies]
        return rows + np.int64(self.first_row) if self.first_row else rows

    def leaf_sizes(self, deleted=None):
        """Copies in each leaf, without those that a mask (R,) deletes: (P,) int64.

        Memory: 5 bytes a copy if there is a mask.
        """
        if deleted is None:
            return np.diff(self.leaf_offsets)
        here = deleted[self.first_row : self.first_row + len(self)]
        gone = np.zeros(self.num_copies + 1, np.uint32)  # up to each copy
        try:
            np.cumsum(here[self.leaf_rows], dtype=np.uint32, out=gone[1:])
        except IndexError as error:
            raise IndexCorruptError(f"leaf_rows points outside: {error}") from None
        return np.diff(self.leaf_offsets - gone[self.leaf_offsets])

    def arrays(self):
        """Every array under its name in the manifest of a folder."""
        arrays = {name: getattr(self, name) for name in SEGMENT_ARRAYS}
        if isinstance(self.ids, StringIds):
            arrays |= {"id_offsets": self.ids.offsets, "id_text": self.ids.text}
        else:
            arrays["ids"] = self.ids
        if self.metadata is not None:
            arrays |= self.metadata.arrays()
        return {name: array for name, array in arrays.items() if array is not None}

    @functools.cached_property
    def order(self):
        """The lookup table of `rows_of`: the argsort of ids, or each string's row."""
        if isinstance(self.ids, StringIds):
            return self.ids.row_of_string()
        return np.argsort(self.ids)

    def check_layout(self):
        """Checks that no array points outside another. Reads all rows and lines.

        Raises:
            IndexCorruptError: naming the array.
        """
        num = len(self)
        if self.num_copies and self.leaf_rows.max() >= num:
            raise IndexCorruptError(
                f"leaf_rows points at row {self.leaf_rows.max()} of {num} documents"
            )
        if isinstance(self.ids, StringIds):
            offsets = self.ids.offsets
            if (offsets[1:] < offsets[:-1]).any():  # a difference may overflow
                raise IndexCorruptError("id_offsets descend")
        if self.documents is not None and len(self.documents) != num:
            raise IndexCorruptError(
                f"{len(self.documents)} documents to show for {num} ids"
            )
        if self.metadata is not None:
            self.metadata.check()

    def check_addresses(self):
        """Runs `check_layout`, and checks that ids are not negative and do not repeat.

        Raises:
            IndexCorruptError: naming the array.
        """
        self.check_layout()
        if isinstance(self.ids, StringIds):
            repeat = len(self.order) < len(self)
        else:
            ids = self.ids[self.order]
            _refuse_negative(ids[:1])
            repeat = (ids[1:] == ids[:-1]).any()
        if repeat:
            raise IndexCorruptError("ids repeat within a segment")


@dataclass(frozen=True, eq=False)
class Contents:
    """All documents of an index at one moment. An update makes a new object.

    Rows number the documents of all segments in the order they were added, deleted
    ones included: R in all.

    Attributes:
        segments: at least one, which may be empty.
        deleted: (R,) bool by row, or None if nothing is deleted.
        folder: the Folder that stores them, or None.
        setting: what `tune` stored, the search that names no setting; or None.
        history: what `drift` compares with: see `ehi.index.drift`; or None.
    """

    segments: tuple[Segment, ...]
    deleted: np.ndarray | None = None
    folder: Folder | None = None
    setting: dict | None = None
    history: dict | None = None

    @property
    def num_rows(self):
        return self.segments[-1].first_row + len(self.segments[-1])

    @functools.cached_property
    def num_documents(self):
        """Documents that a search can find."""
        dead = 0 if self.deleted is None else int(self.deleted.sum())
        return self.num_rows - dead

    @functools.cached_property
    def leaf_sizes(self):
        """Copies in each leaf of documents that are not deleted: (P,) int64."""
        return sum(segment.leaf_sizes(self.deleted) for segment in self.segments)

    @property
    def fields(self):
        """field -> kind of the metadata, or None if the index stores none."""
        metadata = self.segments[0].metadata
        return None if metadata is None else metadata.fields

    def where(self, condition):
        """The documents that meet a condition: (R,) bool, False for deleted ones.

        Raises:
            ValueError: there are no metadata, or as `ehi.index.where`.
        """
        if self.fields is None:
            raise ValueError(
                f"the filter {condition!r} needs metadata, and this index was built "
                "without: see build_index(metadata=)"
            )
        meets = compile_condition(condition, self.fields)
        mask = np.concatenate([meets(segment.metadata) for segment in self.segments])
        return mask if self.deleted is None else mask & ~self.deleted

    @functools.cached_property
    def vector_norm(self):
        """The largest norm of some of the vectors in raw leaves."""
        stored = [segment.vectors for segment in self.segments if segment.num_copies]
        some = [vectors[:: 1 + len(vectors) // 64] for vectors in stored]
        norms = [np.linalg.norm(part.astype(np.float32), axis=1) for part in some]
        return float(max((norm.max() for norm in norms), default=0))

    def rows_in_leaf(self, leaf):
        """Rows of the documents in a leaf, without deleted ones. They ascend."""
        parts = [
            segment.rows(*segment.leaf_offsets[leaf : leaf + 2])
            for segment in self.segments
        ]
        rows = np.concatenate(parts)
        return rows if self.deleted is None else rows[~self.deleted[rows]]

    def external_ids(self, rows):
        """External ids of rows of any shape that exist; row -1 gives -1 or None."""
        first = self.segments[0]
        strings = isinstance(first.ids, StringIds)
        if len(self.segments) == 1 and len(first):
            if strings:
                return first.ids.take(rows)
            ids = first.ids[rows]
            _refuse_negative(ids)
            if np.minimum.reduce(rows, axis=None, initial=0) < 0:
                ids[rows < 0] = -1
            return ids
        found = np.full(rows.shape, None if strings else -1, object if strings else int)
        for segment in self.segments:
            here = rows - segment.first_row
            inside = (here >= 0) & (here < len(segment)) & (rows >= 0)
            if not inside.any():
                continue
            ids = segment.ids
            chosen = here[inside]
            found[inside] = ids.take(chosen) if strings else ids[chosen]
            if not strings:
                _refuse_negative(found[inside])
        return found

    def find(self, ids):
        """Rows of the documents with these external ids, -1 if there is none.

        Raises:
            ValueError: ids of another kind than those of the index.
        """
        rows = np.full(len(ids), -1, np.int64)
        for segment in self.segments:
            here = rows_of(segment.ids, segment.order, ids)
            inside = np.flatnonzero(here >= 0)
            found = here[inside] + segment.first_row
            if self.deleted is not None:
                alive = ~self.deleted[found]
                inside, found = inside[alive], found[alive]
            rows[inside] = found
        return rows

    def rerank_vectors(self, rows):
        """The stored vectors of rows >= 0: (..., D) float32."""
        first = self.segments[0].rerank_vectors
        if len(self.segments) == 1 and len(first):
            return first[rows].astype(np.float32)
        found = np.zeros((*rows.shape, first.shape[1]), np.float32)
        for segment in self.segments:
            here = rows - segment.first_row
            inside = (here >= 0) & (here < len(segment))
            found[inside] = segment.rerank_vectors[here[inside]]
        return found

    def document(self, row):
        """The value stored to show a document: a dict.

        Raises:
            ValueError: the index was saved without documents.
            IndexError: no such row.
        """
        if self.segments[0].documents is None:
            raise ValueError("this index was saved without documents to show")
        segment, row = self._place(row)
        return segment.documents[row]

    def metadata(self, row):
        """The fields of a document that it does not lack: a dict.

        Raises:
            ValueError: the index was built without metadata.
            IndexError: no such row.
        """
        if self.fields is None:
            raise ValueError("this index was built without metadata")
        segment, row = self._place(row)
        return segment.metadata[row]

    def _place(self, row):
        """The segment of a row, and the row in it."""
        for segment in self.segments:
            if 0 <= row - segment.first_row < len(segment):
                return segment, row - segment.first_row
        raise self._outside(row)

    def check_rows(self, rows):
        """Rows as an array of integers, -1 or those of documents.

        Raises:
            ValueError: they are not integers.
            IndexError: no such row.
        """
        rows = np.asarray(rows)
        if rows.size and rows.dtype.kind not in "iu":
            raise ValueError(f"rows must be integers, got {rows.dtype}")
        bad = rows[(rows < -1) | (rows >= self.num_rows)]
        if bad.size:
            raise self._outside(bad[0])
        return rows.astype(np.int64)

    def _outside(self, row):
        return IndexError(
            f"row {row} is outside the {self.num_rows} rows of this index (deleted "
            "documents included)"
        )

    def check_addresses(self):
        """Checks that no array points outside another: see `Segment`."""
        for segment in self.segments:
            segment.check_addresses()

    def with_segment(self, segment):
        """These documents and those of another segment."""
        segment = replace(segment, first_row=self.num_rows)
        deleted = self.deleted
        if deleted is not None:
            deleted = np.concatenate([deleted, np.zeros(len(segment), bool)])
        return replace(self, segments=(*self.segments, segment), deleted=deleted)

    def without(self, rows):
        """These documents without those of `rows`."""
        if not len(rows):
            return self
        deleted = np.zeros(self.num_rows, bool)
        if self.deleted is not None:
            deleted[:] = self.deleted
        deleted[rows] = True
        return replace(self, deleted=deleted)


def _refuse_negative(ids):
    """Raises IndexCorruptError if an id is negative: -1 means no document."""
    if ids.size and np.minimum.reduce(ids, axis=None) < 0:
        raise IndexCorruptError(f"ids hold {ids.min()}, integer ids start from 0")
