"""What belongs to document rows besides vectors: external ids, and lines to show."""

import functools
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ehi.index.folder import IndexCorruptError

_LARGEST = 2**63 - 1  # of integer ids


@dataclass(frozen=True)
class StringIds:
    """Strings as one block of UTF-8 bytes: id i is text[offsets[i]:offsets[i + 1]].

    Attributes:
        offsets: (N + 1,) int64.
        text: (bytes,) uint8.
    """

    offsets: np.ndarray
    text: np.ndarray

    @classmethod
    def of(cls, strings):
        encoded = [string.encode() for string in strings]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(string) for string in encoded], out=offsets[1:])
        return cls(offsets, np.frombuffer(b"".join(encoded), np.uint8))

    def __len__(self):
        return len(self.offsets) - 1

    def take(self, rows):
        """Object array of the ids of `rows`, None where a row is negative."""
        ids = np.full(rows.shape, None, object)
        starts = self.offsets[np.maximum(rows, 0)].ravel()
        stops = self.offsets[np.maximum(rows, 0) + 1].ravel()
        for position in np.flatnonzero(rows >= 0):
            text = self.text[starts[position] : stops[position]]
            try:
                ids.flat[position] = text.tobytes().decode()
            except UnicodeDecodeError as error:
                raise IndexCorruptError(f"an id is not UTF-8: {error}") from None
        return ids

    def tolist(self):
        return self.take(np.arange(len(self))).tolist()

    def row_of_string(self):
        """{id in UTF-8: row} of all ids."""
        text, offsets = self.text.tobytes(), self.offsets.tolist()
        return {
            text[a:b]: row for row, (a, b) in enumerate(itertools.pairwise(offsets))
        }

    def keep(self, mask):
        """The lengths and the bytes of the ids that a mask (N,) keeps."""
        lengths = np.diff(self.offsets)
        return lengths[mask], self.text[np.repeat(mask, lengths)]


@dataclass(frozen=True)
class Documents:
    """JSON lines, one object for each document row, read on demand.

    Attributes:
        text: (bytes,) uint8, usually a memory-mapped file.
    """

    text: np.ndarray

    @classmethod
    def of(cls, values):
        lines = [json.dumps(value).encode() + b"\n" for value in values]
        return cls(np.frombuffer(b"".join(lines), np.uint8))

    @functools.cached_property
    def _line_ends(self):
        return np.flatnonzero(self.text == ord("\n"))

    def __len__(self):
        return len(self._line_ends)

    def __getitem__(self, row):
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside the {len(self)} stored documents")
        start = self._line_ends[row - 1] + 1 if row else 0
        return json.loads(self.text[start : self._line_ends[row]].tobytes())

    def keep(self, mask):
        """The bytes of the lines that a mask (N,) keeps."""
        lengths = np.diff(self._line_ends, prepend=-1)
        return self.text[np.repeat(mask, lengths)]


def check_ids(doc_ids, num):
    """External ids as (N,) int64 or StringIds, all distinct.

    Raises:
        ValueError: another number of ids, ids of mixed or other kinds, ids that repeat.
    """
    ids = doc_ids if isinstance(doc_ids, np.ndarray) else _listed(doc_ids)
    kept = as_ids(ids)
    if len(kept) != num:
        raise ValueError(f"{len(kept)} doc_ids for {num} embeddings")
    if len(set(ids)) < num:
        seen = set()
        twice = next(value for value in ids if value in seen or seen.add(value))
        raise ValueError(f"doc_ids repeat: {twice!r} stands twice")
    return kept


def as_ids(ids):
    """Ids as (N,) int64 or StringIds.

    Raises:
        ValueError: one id instead of several, ids that are neither all strings nor all
            integers from 0 to 2^63 - 1.
    """
    if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
        for value in (ids.min(), ids.max()) if ids.size else ():
            if not 0 <= value <= _LARGEST:
                raise ValueError(f"integer ids are from 0 to 2^63 - 1, got {value}")
        return ids.astype(np.int64)
    ids = _listed(ids)
    if ids and all(isinstance(value, str) for value in ids):
        return StringIds.of(ids)
    for value in ids:
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not (whole and 0 <= value <= _LARGEST):
            raise ValueError(
                "ids must be all strings or all integers from 0 to 2^63 - 1, got "
                f"{value!r} among {len(ids)}"
            )
    return np.array(ids, np.int64)


def _listed(ids):
    """A list of ids; one alone, even a string of several letters, is none."""
    one = isinstance(ids, str | bytes) or not isinstance(ids, Iterable)
    if one or getattr(ids, "ndim", 1) != 1:
        raise ValueError(f"ids must be several in a row, as [1, 2]; got {ids!r}")
    return list(ids)


def rows_of(ids, order, wanted):
    """Where each wanted id stands among `ids`: (n,) int64, -1 where it does not.

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
