"""What belongs to document rows besides vectors: string ids, and lines to show."""

import functools
import json
from dataclasses import dataclass

import numpy as np

from ehi.index.folder import IndexCorruptError


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


@dataclass(frozen=True)
class Documents:
    """JSON lines, one object for each document row, read on demand.

    Attributes:
        text: (bytes,) uint8, usually a memory-mapped file.
    """

    text: np.ndarray

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
