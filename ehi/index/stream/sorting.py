"""Sorting in scratch files, of arrays that are too large for memory.

Copies of documents are sorted by leaf, in bands of leaves. Ids are sorted by hash, to
find equal ones. Ids and documents to show are then written in their order.
"""

import itertools
import zlib
from array import array

import numpy as np

from ehi.index.columns import Collected, StoredDocuments, StringIds
from ehi.index.contents import as_ids
from ehi.index.folder import Stream

_BAND_BYTES = 2**25  # bytes of copies that are sorted in memory
_SOME_IDS = 2**16  # ids, or lines to show, handled at once
_REGION_IDS = 2**20  # hashes of ids that are sorted in memory


class Copies:
    """Copies of documents that are sorted by leaf, and by row within a leaf.

    Their keys are leaf << 32 | row.
    """

    def __init__(self, build, offsets):
        parameters = build.parameters
        if parameters.codebooks is None:
            dtype, width = build.leaf_dtype, parameters.width
        else:
            dtype, width = np.uint8, parameters.code_bytes + parameters.has_factors
        self.parameters = parameters
        record = np.dtype(dtype).itemsize * width
        self.most = max(1, _BAND_BYTES // max(record, 8))  # copies sorted at once
        self.leaves = _band_starts(offsets, self.most)
        starts = offsets[self.leaves]
        self.keys = Regions(build.scratch / "keys", starts, np.int64, 1)
        self.stored = Regions(build.scratch / "stored", starts, dtype, width)
        self._waiting, self._num = [], 0

    def add(self, keys, values):
        """Adds the keys (n,) and the vectors or codes (n, width) of a block.

        A factor follows its code as the last byte.
        """
        self._waiting.append((keys, values))
        self._num += len(keys)
        if self._num >= self.most:
            self.flush()

    def flush(self):
        """Writes to the bands what was added."""
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

    def streams(self, num):
        """Vectors, or codes and factors, of all copies, `num`: name -> Stream.

        They are written in this order: the last one removes the scratch file.
        """
        dtype, width = self.stored.dtype.name, self.stored.width
        if self.parameters.codebooks is None:
            return {"vectors": Stream(dtype, (num, width), self._values(last=True))}
        if not self.parameters.has_factors:
            return {"codes": Stream(dtype, (num, width), self._values(last=True))}
        codes = (values[:, :-1] for values in self._values())
        factors = (values[:, -1] for values in self._values(last=True))
        return {
            "codes": Stream(dtype, (num, width - 1), codes),
            "factors": Stream(dtype, (num,), factors),
        }

    def _values(self, last=False):
        """Records of the copies in leaf order, a band at a time."""
        windows = zip(
            self.keys.windows(self.most), self.stored.windows(self.most), strict=True
        )
        for keys, values in windows:
            # A band of several windows is one leaf, whose copies are in order already.
            yield values[np.argsort(keys[:, 0])]
        if last:
            self.stored.path.unlink()  # makes room for the next file


def _band_starts(offsets, most):
    """First leaves of bands of at most `most` copies, or of one leaf; then P."""
    starts, num_leaves = [0], len(offsets) - 1
    while starts[-1] < num_leaves:
        room = offsets[starts[-1]] + most
        last = int(np.searchsorted(offsets, room, side="right")) - 1
        starts.append(max(last, starts[-1] + 1))
    return np.array(starts)


def stored_ids(sources, scratch):
    """The ids of all documents as the folder stores them, if no two are equal."""
    num = sum(len(source) for source in sources)
    sums = array("L")
    strings, text_bytes = _refuse_twice(sources, num, scratch, sums)
    if not strings:
        return {"ids": Stream("int64", (num,), _same_ids(sources, sums))}
    texts = (ids.text for ids in _same_ids(sources, sums))
    return {
        "id_offsets": Stream("int64", (num + 1,), _id_offsets(sources, sums)),
        "id_text": Stream("uint8", (text_bytes,), texts),
    }


def _id_blocks(sources):
    """The ids of all shards, as (n,) int64 or StringIds, some at a time."""
    kind = None
    for source in sources:
        for start in range(0, len(source), _SOME_IDS):
            some = source.ids[start : start + _SOME_IDS]
            try:
                ids = as_ids(np.array(some, int) if isinstance(some, range) else some)
            except ValueError as error:
                raise ValueError(f"{source.label}: {error}") from None
            kind = kind or type(ids)
            if type(ids) is not kind:
                kinds = ("strings", "integers")
                got, had = kinds if isinstance(ids, StringIds) else kinds[::-1]
                raise ValueError(
                    f"the ids of {source.label} are {got}, those before it {had}"
                )
            yield ids


def _same_ids(sources, sums):
    """`_id_blocks`, checked against the checksums of the first reading."""
    for ids, expected in zip(_id_blocks(sources), sums, strict=True):
        if _id_sum(ids) != expected:
            raise ValueError("the ids of a shard changed while the index was built")
        yield ids


def _id_sum(ids):
    if isinstance(ids, StringIds):
        return zlib.crc32(ids.text, zlib.crc32(ids.offsets))
    return zlib.crc32(ids)


def _id_offsets(sources, sums):
    yield np.zeros(1, np.int64)
    end = 0
    for ids in _same_ids(sources, sums):
        yield ids.offsets[1:] + end
        end += int(ids.offsets[-1])


def _refuse_twice(sources, num, scratch, sums):
    """Refuses equal ids. Their hashes are sorted, a region of them at a time.

    It adds the checksum of every block of ids to `sums`, for the next reading.

    Returns:
        Whether the ids are strings, and their bytes of text.
    """
    bits = max(0, (num - 1) // _REGION_IDS).bit_length()
    counts = np.zeros(2**bits, np.int64)
    text_bytes = 0

    def region(hashes):
        return (hashes >> np.uint64(63 - bits) >> np.uint64(1)).astype(np.int64)

    with (scratch / "hashes").open("wb") as file:
        for ids in _id_blocks(sources):
            hashes = _hash(ids)
            sums.append(_id_sum(ids))
            counts += np.bincount(region(hashes), minlength=len(counts))
            text_bytes += len(ids.text) if isinstance(ids, StringIds) else 0
            file.write(hashes)
    starts = np.concatenate([[0], np.cumsum(counts)])
    hashed = Regions(scratch / "regions", starts, np.uint64, 2)
    first = 0
    for hashes in read_blocks(scratch / "hashes", np.uint64, (num, 1), _REGION_IDS):
        rows = np.arange(first, first + len(hashes), dtype=np.uint64)
        regions = region(hashes[:, 0])
        order = np.argsort(regions, kind="stable")
        records = np.column_stack([hashes[:, 0], rows])
        hashed.append(regions[order], records[order])
        first += len(hashes)
    for records in hashed.windows(num):
        _refuse_equal(sources, records)
    (scratch / "hashes").unlink()
    (scratch / "regions").unlink()
    return isinstance(ids, StringIds), text_bytes


def _hash(ids):
    """64-bit hashes (n,) of ids; different integers have different hashes."""
    if isinstance(ids, StringIds):
        hashes = np.array([hash(value) for value in ids.tolist()], np.int64)
        return hashes.view(np.uint64)
    return ids.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # odd: a bijection


def _refuse_equal(sources, records):
    """Refuses equal ids among records (n, 2) of hashes and rows."""
    # Rows ascend already, and a stable sort keeps the order of equal hashes.
    records = records[np.argsort(records[:, 0], kind="stable")]
    same = np.flatnonzero(records[1:, 0] == records[:-1, 0])
    if not len(same):
        return
    seen = {}
    for row in np.unique(records[[*same, *(same + 1)], 1]).tolist():
        source, position = _place(sources, row)
        value = next(iter(source.ids[position : position + 1]))
        if value in seen:
            other, there = seen[value]
            shown = repr(str(value)) if isinstance(value, str) else int(value)
            raise ValueError(
                f"doc_ids repeat: {shown} is in row {there} of {other.label} and in "
                f"row {position} of {source.label}"
            )
        seen[value] = source, position


def _place(sources, row):
    """The shard of a document, and its row there."""
    firsts = [source.first_row for source in sources]
    # It is the last shard that starts at or before the row: an empty shard starts where
    # the next one does.
    source = sources[int(np.searchsorted(firsts, row, side="right")) - 1]
    return source, row - source.first_row


def stored_texts(sources):
    """The documents to show as the folder stores them: name -> blocks of bytes."""
    return {"documents": _lines(sources)} if sources[0].documents is not None else {}


def _lines(sources):
    for source in sources:
        values = source.documents
        values, num = iter(values() if callable(values) else values), 0
        while some := list(itertools.islice(values, _SOME_IDS)):
            num += len(some)
            try:
                yield StoredDocuments.of(some).text
            except ValueError as error:
                raise ValueError(f"{source.label}: {error}") from None
        if num != len(source):
            raise ValueError(
                f"{source.label} has {num} documents to show for {len(source)} ids"
            )


def stored_metadata(sources):
    """The Metadata of all shards, or None."""
    if sources[0].metadata is None:
        return None
    collected = Collected()
    for source in sources:
        values = source.metadata
        try:
            for record in values() if callable(values) else values:
                collected.add(record)
        except ValueError as error:
            raise ValueError(f"{source.label}: {error}") from None
        num = collected.num - source.first_row
        if num != len(source):
            raise ValueError(f"{source.label} has {num} metadata for {len(source)} ids")
    return collected.metadata()


class Regions:
    """A scratch file of regions with known sizes; each is filled from its start.

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
        """Adds records (n, width) to their regions (n,), which must ascend."""
        cuts = np.flatnonzero(np.diff(regions)) + 1
        with self.path.open("r+b") as file:
            for part in itertools.pairwise([0, *cuts.tolist(), len(regions)]):
                region = regions[part[0]]
                file.seek(int(self.free[region]) * self.record)
                file.write(records[slice(*part)])
                self.free[region] += part[1] - part[0]

    def windows(self, most):
        """Records (n, width), region by region, at most `most` at once."""
        for start, stop in itertools.pairwise(self.offsets.tolist()):
            for first in range(start, stop, most):
                yield self.read(first, min(most, stop - first))

    def read(self, start, num):
        """Records start .. start + num: (num, width)."""
        with self.path.open("rb") as file:
            file.seek(start * self.record)
            values = np.fromfile(file, self.dtype, num * self.width)
        return values.reshape(num, self.width)


def read_blocks(path, dtype, shape, rows):
    """The rows of an array in a file, some rows at a time."""
    with path.open("rb") as file:
        for start in range(0, shape[0], rows):
            num = min(rows, shape[0] - start)
            yield np.fromfile(file, dtype, num * shape[1]).reshape(num, shape[1])
