"""Tables of rows that are not in memory: joined, counted, or made when asked for.

Each has `shape`, `len`, and rows by number, as an array has; `np.asarray` makes the
whole of it. So a step, a search or a test takes them for arrays.
"""

from collections.abc import Sequence

import numpy as np

# Rows that are made at once where all of a table is asked for.
CHUNK = 2**14


class Rows:
    """A table (rows, width) float32; a subclass has `shape` and `take`."""

    shape: tuple[int, int]
    dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole table, were it in memory."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n, width) float32, by their numbers (n,) int64, in any order."""
        raise NotImplementedError

    def __getitem__(self, rows) -> np.ndarray:
        if isinstance(rows, slice):
            return self.take(np.arange(*rows.indices(len(self))))
        rows = np.asarray(rows, np.int64)
        return self.take(rows) if rows.ndim else self.take(rows[None])[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if copy is False:
            raise ValueError("the rows of this table are made, which needs a copy")
        whole = np.empty(self.shape, dtype or self.dtype)
        for start in range(0, len(self), CHUNK):
            whole[start : start + CHUNK] = self[start : start + CHUNK]
        return whole


class JoinedRows(Rows):
    """Tables one after the other, none of which is copied.

    >>> table = JoinedRows([np.zeros((2, 3), np.float32), np.ones((2, 3), np.float16)])
    >>> table[[3, 0]].tolist()
    [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]

    Args:
        tables: arrays, memory maps or other tables of one width.
    """

    def __init__(self, tables: Sequence):
        self._tables = [table for table in tables if len(table)]
        sizes = [len(table) for table in self._tables]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.shape = (int(self._starts[-1]), tables[0].shape[1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n, width) float32, by their numbers (n,) int64, in any order."""
        found = np.empty((len(rows), self.shape[1]), self.dtype)
        bad = rows[(rows < 0) | (rows >= len(self))]
        if len(bad):
            raise IndexError(f"row {bad[0]} of {len(self)} rows")
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for number, table in enumerate(self._tables):
            here = np.flatnonzero(owner == number)
            if len(here):
                found[here] = table[rows[here] - self._starts[number]]
        return found


class SomeRows(Rows):
    """The values of some rows of a larger table; other rows are an error.

    Args:
        rows: (n,) their numbers, ascending.
        values: (n, width).
    """

    def __init__(self, rows: np.ndarray, values: np.ndarray):
        if len(rows) != len(values):
            raise ValueError(f"{len(values)} values for {len(rows)} rows")
        self.rows, self.values = np.asarray(rows, np.int64), values
        self.shape, self.dtype = values.shape, values.dtype

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Values (n, width), by the numbers of their rows in the larger table."""
        place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        bad = rows[self.rows[place] != rows] if len(self.rows) else rows
        if len(bad):
            raise IndexError(f"row {bad[0]} is not among the {len(self.rows)} rows")
        return self.values[place]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.values, dtype)


class Counted:
    """The numbers ``start + i mod period`` for i from 0 to size - 1, without memory.

    >>> np.asarray(Counted(10, 5, period=2)).tolist()
    [10, 11, 10, 11, 10]
    """

    def __init__(self, start: int, size: int, period: int | None = None):
        self.start, self.size, self.period = start, size, period or max(size, 1)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, rows):
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self.size))
        return self.start + np.asarray(rows, np.int64) % self.period

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or np.int64)
