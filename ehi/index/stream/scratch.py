"""Scratch files in which copies of documents find the order of their leaves."""

import itertools

import numpy as np

_BAND_BYTES = 2**25  # of copies that are sorted in memory


class Regions:
    """A scratch file of regions with known sizes, each filled from its start on.

    Args:
        path: the file.
        offsets: (regions + 1,) where each region starts, in records.
        dtype, width: a record is a row (width,) of this dtype.
    """

    def __init__(self, path, offsets, dtype, width):
        self.path, self.offsets = path, offsets
        self.dtype, self.width = np.dtype(dtype), width
        self.record = self.dtype.itemsize * width
        self.free = offsets[:-1].copy()
        path.touch()

    def append(self, regions, records):
        """Adds records (n, width), whose regions (n,) ascend."""
        cuts = np.flatnonzero(np.diff(regions)) + 1
        with self.path.open("r+b") as file:
            for part in itertools.pairwise([0, *cuts.tolist(), len(regions)]):
                region = regions[part[0]]
                file.seek(int(self.free[region]) * self.record)
                file.write(records[slice(*part)])
                self.free[region] += part[1] - part[0]

    def windows(self, most):
        """Records (n, width) of every region in turn, at most `most` at once."""
        for start, stop in itertools.pairwise(self.offsets.tolist()):
            for first in range(start, stop, most):
                yield self.read(first, min(most, stop - first))

    def read(self, start, num):
        """Records start .. start + num: (num, width)."""
        with self.path.open("rb") as file:
            file.seek(start * self.record)
            values = np.fromfile(file, self.dtype, num * self.width)
        return values.reshape(num, self.width)


class Copies:
    """Copies of documents on their way to leaf order.

    A key is leaf << 32 | row, so that ascending keys are leaf order, by row in a leaf.
    """

    def __init__(self, job, offsets):
        index = job.index
        if index.codebooks is None:
            dtype, width = job.leaf_dtype, index.width
        else:
            num_subspaces, num_codewords, _ = index.codebooks.shape
            dtype = np.uint8
            width = num_subspaces if num_codewords == 256 else num_subspaces // 2
        record = np.dtype(dtype).itemsize * width
        self.most = max(1, _BAND_BYTES // max(record, 8))  # copies sorted at once
        self.leaves = _band_starts(offsets, self.most)
        starts = offsets[self.leaves]
        self.keys = Regions(job.scratch / "keys", starts, np.int64, 1)
        self.stored = Regions(job.scratch / "stored", starts, dtype, width)
        self._waiting, self._num = [], 0

    def add(self, keys, values):
        """Takes in the keys (n,) and the vectors or codes (n, width) of a block."""
        self._waiting.append((keys, values))
        self._num += len(keys)
        if self._num >= self.most:
            self.flush()

    def flush(self):
        """Writes what was added to its bands."""
        if not self._waiting:
            return
        keys, values = map(np.concatenate, zip(*self._waiting, strict=True))
        self._waiting, self._num = [], 0
        bands = np.searchsorted(self.leaves, keys >> 32, side="right") - 1
        order = np.argsort(bands, kind="stable")  # keeps the order of the rows
        bands = bands[order]
        self.keys.append(bands, keys[order])
        self.stored.append(bands, values[order])

    def rows(self):
        """Documents of the copies in leaf order, uint32, a band at a time."""
        for keys in self.keys.windows(self.most):
            yield (np.sort(keys[:, 0]) & 0xFFFFFFFF).astype(np.uint32)

    def values(self):
        """Vectors or codes of the copies in leaf order, a band at a time."""
        windows = zip(
            self.keys.windows(self.most), self.stored.windows(self.most), strict=True
        )
        for keys, values in windows:
            # A band of several windows is one leaf, which stands by row already.
            yield values[np.argsort(keys[:, 0])]
        self.stored.path.unlink()  # before the next file needs the room


def _band_starts(offsets, most):
    """First leaves of bands of at most `most` copies, or of one leaf; P is last."""
    starts, num_leaves = [0], len(offsets) - 1
    while starts[-1] < num_leaves:
        room = offsets[starts[-1]] + most
        last = int(np.searchsorted(offsets, room, side="right")) - 1
        starts.append(max(last, starts[-1] + 1))
    return np.array(starts)


def read_blocks(path, dtype, shape, rows):
    """A file of an array of this shape, some rows at a time."""
    with path.open("rb") as file:
        for start in range(0, shape[0], rows):
            num = min(rows, shape[0] - start)
            yield np.fromfile(file, dtype, num * shape[1]).reshape(num, shape[1])
