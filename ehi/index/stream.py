"""Shards of embeddings to an index folder, in memory that does not grow with them.

    route, count -> prefix sums -> encode, scatter into bands of leaves -> sort, write

Every shard is read twice, in blocks of R <= 8192 rows and R D <= 2^22 values. The first
reading routes documents and counts the copies of every leaf. Their prefix sums place
bands in a scratch file: consecutive leaves with at most 2^25 bytes of copies, or one
leaf of any size. The second reading encodes copies and appends each to its band, and
a band is put in the order of its leaves when it is written out.

Beside the parameters and what the shards themselves keep in memory, bytes are at most

    (threads + 2) (s + 3) 4 R D      blocks, their copies and what encodes them
    + threads 2^27                   scores of routing, 2^23 of them at once
    + 2^28                           copies on their way to a band, a band, ids
    + 32 P + N / 1024                counts of the leaves; a sum for every block

and on disk, beside the index, once more the size of its leaves and of its re-rank
vectors, 4 s bytes a document for its leaves, 8 s for its copies and 24 for its id.
Scratch files are in one folder `.NAME.*` beside the index, which goes with success and
with any error; a process that is killed leaves it behind, and the old index as it was.
"""

import collections
import contextlib
import errno
import itertools
import os
import tempfile
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.index import check, store
from ehi.index.atomic import Stream
from ehi.index.build import make_parameters
from ehi.index.commit import write_folder
from ehi.index.documents import Documents, StringIds, as_ids
from ehi.index.folder import IndexCorruptError, read_folder
from ehi.index.leaves import make_leaves
from ehi.index.lock import writer_lock
from ehi.index.route import assign_leaves, check_beam_of_documents
from ehi.index.threads import one_blas_thread

_BLOCK_ROWS, _BLOCK_VALUES = 2**13, 2**22  # documents handled at once
_BAND_BYTES = 2**25  # of copies that are sorted in memory
_SOME_IDS = 2**16  # ids, or lines to show, handled at once
_REGION_IDS = 2**20  # hashes of ids that are sorted in memory
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, eq=False)
class Shard:
    """Documents of an index to be built, read twice and a block at a time.

    Attributes:
        embeddings: (n, D) floats; or the path of a .npy file, of which nothing stays in
            memory; or a function without arguments that returns an iterable of blocks
            (any number, D), the same blocks whenever it is called.
        ids: n integers >= 0 or strings, as an array or a sequence that can be sliced
            (a range takes no memory); or the path of a .npy file.
        name: a string or a number, or None. Documents are numbered in the order of the
            names, so shards with names make the same index however they are ordered.
            Numbers count from 0 and none may be missing. Without names, documents are
            numbered in the order of the shards given.
        documents: n JSON values to show, or a function that returns an iterable of
            them, or None; read once.
    """

    embeddings: object
    ids: object
    name: str | int | None = None
    documents: object = None


def build_folder(
    path,
    shards,
    *,
    tree,
    query_tree=None,
    rotation=None,
    codebooks=None,
    assign_codebooks=None,
    leaf_centroids=None,
    spill=1,
    leaf_dtype="float32",
    rerank_vectors=False,
    encoder=None,
    config=None,
    query_head=None,
    beam=None,
    threads=1,
):
    """Builds an index folder from shards: `save_index(build_index(...))` of them all.

    The files are the same byte for byte, but for documents whose two best leaves or
    codewords differ by rounding: products of other shapes round differently. An index
    that is there already is replaced, and stays what it was if anything fails.

    Args:
        path: the folder, made if needed.
        shards: the Shards. Where the first has documents to show, all must.
        tree ... query_head: as of `build_index`.
        beam: None routes documents exactly, scoring all P leaves; a number of nodes
            kept at each level is for tall trees: see `assign_leaves`.
        threads: Python threads over blocks of documents.

    Raises:
        ValueError: an argument that does not fit; a shard that is missing, unlike the
            first, not finite or not the same when read again; ids that repeat.
        FileNotFoundError: the file of a shard is missing.
        FileExistsError: `path` is there and is not an index.
        IndexLockedError: somebody else writes to it.
        OSError: the disk is full.
    """
    path = Path(path)
    sources = _open_shards(shards)
    num = sum(len(source) for source in sources)
    width, dtype = _width_and_dtype(sources)
    index = make_parameters(
        width, num,
        tree=tree, query_tree=query_tree, rotation=rotation, codebooks=codebooks,
        assign_codebooks=assign_codebooks, leaf_centroids=leaf_centroids, spill=spill,
        encoder=encoder, config=config, query_head=query_head,
    )  # fmt: skip
    check.check_choice("leaf_dtype", leaf_dtype, ("float32", "float16"))
    beam = check_beam_of_documents(beam, index.spill)
    threads = check.check_count("threads", threads)
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", dir=path.parent
        ) as scratch:
            arrays = _ids(sources, Path(scratch))
            job = _Job(
                index, sources, dtype, leaf_dtype, rerank_vectors, beam, threads,
                Path(scratch),
            )  # fmt: skip
            arrays = {**index.parameter_arrays(), **_documents(job), **arrays}
            header = store._header(index, [("", num)])
            write_folder(path, header, arrays, _texts(sources))
    except OSError as error:
        if error.errno not in _FULL:
            raise
        message = f"{os.strerror(error.errno)}; {path} is as it was"
        raise OSError(error.errno, message) from error


@dataclass(frozen=True, eq=False)
class _Job:
    """What all steps of one build share."""

    index: object
    sources: list
    dtype: np.dtype
    leaf_dtype: str
    rerank_vectors: bool
    beam: int | None
    threads: int
    scratch: Path

    @property
    def half(self):
        """Whether embeddings are stored as float16 somewhere."""
        raw = self.index.codebooks is None
        return self.rerank_vectors or (raw and self.leaf_dtype == "float16")


def _documents(job):
    """Everything stored of the documents but their ids: name -> array or Stream."""
    with one_blas_thread(), ThreadPoolExecutor(job.threads) as pool:
        counts, sums = _route_and_count(job, pool)
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        copies = _encode_and_scatter(job, pool, offsets, sums)
    total = int(offsets[-1])
    arrays = {
        "leaf_offsets": offsets,
        "leaf_rows": Stream("uint32", (total,), copies.rows()),
    }
    name = "vectors" if job.index.codebooks is None else "codes"
    stored = copies.stored
    shape = (total, stored.width)
    arrays[name] = Stream(stored.dtype.name, shape, copies.values())
    if job.rerank_vectors:
        shape = (sum(len(source) for source in job.sources), job.index.width)
        blocks = _read_blocks(
            job.scratch / "rerank", np.float16, shape, _block_rows(job.index.width)
        )
        arrays["rerank_vectors"] = Stream("float16", shape, blocks)
    return arrays


def _route_and_count(job, pool):
    """The first reading: copies in each leaf (P,) int64, and a sum of every block.

    The leaves of all documents, (N, s) uint32, go to a scratch file.
    """

    def route(source, start, raw):
        block = _finite_block(job, source, start, raw)
        leaves = assign_leaves(block, job.index.tree, job.index.spill, beam=job.beam)
        return leaves.astype(np.uint32), zlib.crc32(raw)

    counts = np.zeros(job.index.num_leaves, np.int64)
    sums = array("L")
    with (job.scratch / "leaves").open("wb") as file:
        readings = _readings(job)
        for leaves, crc in _in_order(pool, job.threads, route, readings):
            file.write(leaves)
            np.add.at(counts, leaves.ravel(), 1)
            sums.append(crc)
    return counts, sums


def _encode_and_scatter(job, pool, offsets, sums):
    """The second reading: the copies of all documents, in bands of leaves."""
    index = job.index

    def encode(source, start, raw, expected, leaves):
        if zlib.crc32(raw) != expected:
            raise ValueError(_changed(source, start, len(raw)))
        block = np.ascontiguousarray(raw, np.float32)
        order = np.argsort(leaves, kind="stable")
        rows, leaves = order // index.spill, leaves[order].astype(np.int64)
        stored = make_leaves(index, block, rows, leaves, job.leaf_dtype)
        keys = leaves << 32 | (source.first_row + start + rows)
        half = block.astype(np.float16) if job.rerank_vectors else None
        return keys, *stored.values(), half

    def blocks(leaves):
        readings = _readings(job, again=True)
        for (source, start, raw), expected in zip(readings, sums, strict=False):
            num = len(raw) * index.spill
            yield source, start, raw, expected, np.fromfile(leaves, np.uint32, num)

    copies = _Copies(job, offsets)
    with contextlib.ExitStack() as files:
        leaves = files.enter_context((job.scratch / "leaves").open("rb"))
        if job.rerank_vectors:
            rerank = files.enter_context((job.scratch / "rerank").open("wb"))
        results = _in_order(pool, job.threads, encode, blocks(leaves))
        for keys, values, half in results:
            copies.add(keys, values)
            if half is not None:
                rerank.write(half)
    copies.flush()
    (job.scratch / "leaves").unlink()
    return copies


def _in_order(pool, threads, work, items):
    """`work` of every item, in their order, no more than threads + 1 of them ahead."""
    ahead = collections.deque()
    for item in items:
        ahead.append(pool.submit(work, *item))
        if len(ahead) > threads:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


# Shards.


@dataclass(frozen=True, eq=False)
class _Source:
    """A Shard whose files are open, and where its documents stand.

    Attributes:
        label: what messages call it.
        embeddings, ids: as of the Shard; a file is a _Rows.
        documents: as of the Shard.
        first_row: row of its first document in the index.
    """

    label: str
    embeddings: object
    ids: object
    documents: object
    first_row: int

    def __len__(self):
        return len(self.ids)

    def blocks(self, rows):
        """Embeddings as they come, at most `rows` of them at once."""
        wholes = [self.embeddings]
        if callable(self.embeddings):
            wholes = map(np.asarray, self.embeddings())
        for whole in wholes:
            if len(whole.shape) != 2:
                raise ValueError(
                    f"{self.label} must hold blocks (any number, D) of embeddings, "
                    f"got the shape {whole.shape}"
                )
            for start in range(0, len(whole), rows):
                yield np.ascontiguousarray(whole[start : start + rows])


class _Rows:
    """Rows of a .npy file. Mapped for the moment of reading, they do not stay."""

    def __init__(self, label, path):
        self.label, self.path = label, Path(path)
        rows = self._open()
        self.shape, self.dtype = rows.shape, rows.dtype

    def __len__(self):
        return self.shape[0] if self.shape else 0

    def __getitem__(self, part):
        rows = self._open()
        if (rows.shape, rows.dtype) != (self.shape, self.dtype):
            raise ValueError(f"{self.label} changed while it was read: {self.path}")
        return np.array(rows[part])

    def _open(self):
        try:
            rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.label} is missing: {self.path} does not exist"
            ) from None
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{self.label} cannot be read: {self.path}: {error}"
            ) from None
        if not isinstance(rows, np.ndarray):
            raise ValueError(f"{self.label} is not one array: {self.path}")
        return rows


def _open_shards(shards):
    """The shards as _Sources, in the order of their names."""
    sources, first_row = [], 0
    for label, shard in _named(list(shards)):
        embeddings, ids = shard.embeddings, shard.ids
        if isinstance(embeddings, str | os.PathLike):
            embeddings = _Rows(label, embeddings)
        elif not callable(embeddings):
            embeddings = np.asarray(embeddings)
        if isinstance(ids, str | os.PathLike):
            ids = _Rows(label, ids)
        source = _Source(label, embeddings, ids, shard.documents, first_row)
        counts = {"embeddings": embeddings, "documents to show": shard.documents}
        for what, values in counts.items():
            if hasattr(values, "__len__") and len(values) != len(ids):
                raise ValueError(f"{label} has {len(values)} {what} for {len(ids)} ids")
        sources.append(source)
        first_row += len(source)
    with_text = [source.documents is not None for source in sources]
    if len(set(with_text)) > 1:
        label = sources[with_text.index(not with_text[0])].label
        has = "some" if with_text[0] else "no"
        raise ValueError(f"the first shard has {has} documents to show, unlike {label}")
    return sources


def _named(shards):
    """(label, shard) of every shard, in the order of the names."""
    names = [shard.name for shard in shards]
    if all(name is None for name in names):
        return [(f"shard {i}", shard) for i, shard in enumerate(shards)]
    numbers = all(isinstance(name, int) for name in names)
    if not numbers and not all(isinstance(name, str) for name in names):
        raise ValueError(
            "names of shards must be all strings or all numbers, or all None, "
            f"got {names[:10]}"
        )
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two shards have the name {twice[0]!r}")
    if numbers:
        gaps = (i for i, name in enumerate(sorted(names)) if name != i)
        missing = next(gaps, None)
        if missing is not None:
            raise ValueError(
                f"numbers of shards count from 0 on, and shard {missing} is missing: "
                f"got {len(names)} shards from {min(names)} to {max(names)}"
            )
    order = sorted(range(len(shards)), key=names.__getitem__)
    return [(f"shard {names[i]!r}", shards[i]) for i in order]


def _width_and_dtype(sources):
    """Width and dtype of all embeddings, which every block is compared with."""
    for source in sources:
        if not len(source):
            continue
        like = source.embeddings
        if callable(like):
            like = next(iter(source.blocks(1)), np.zeros(0))
        if len(like.shape) != 2 or not like.shape[1] or like.dtype.kind != "f":
            raise ValueError(
                f"{source.label} must hold floats of shape (n, D), "
                f"got {like.dtype} of shape {tuple(like.shape)}"
            )
        return like.shape[1], like.dtype
    raise ValueError(f"an empty corpus: no documents in {len(sources)} shards")


def _block_rows(width):
    return max(1, min(_BLOCK_ROWS, _BLOCK_VALUES // width))


def _readings(job, again=False):
    """(source, row in it, block as it comes) of all shards, each as long as its ids."""
    width = job.index.width

    def miscounted(source, start, found):
        if again:
            return ValueError(_changed(source, start, len(source) - start))
        return ValueError(
            f"{source.label} has {found} embeddings for {len(source)} ids"
        )

    for source in job.sources:
        start = 0
        for raw in source.blocks(_block_rows(width)):
            if (raw.shape[1], raw.dtype) != (width, job.dtype):
                raise ValueError(
                    f"{source.label} holds {raw.dtype} of width {raw.shape[1]}, "
                    f"the first shard {job.dtype} of width {width}"
                )
            if start + len(raw) > len(source):
                raise miscounted(source, start, "too many")
            yield source, start, raw
            start += len(raw)
        if start < len(source):
            raise miscounted(source, start, start)


def _finite_block(job, source, start, raw):
    """A block as float32, if all its values are finite, also as float16 if need be."""
    # From 65520 on, float16 rounds to infinity.
    most = np.float32(65520 if job.half else np.inf)
    with np.errstate(over="ignore"):
        block = np.ascontiguousarray(raw, np.float32)
    good = np.abs(block) < most  # not true of NaN
    if not good.all():
        row = int(np.flatnonzero(~good.all(axis=1))[0])
        finite = np.isfinite(block[row]).all()
        what = "a value too large for float16" if finite else "NaN or infinity"
        raise ValueError(f"{source.label} holds {what} in row {start + row}")
    return block


def _changed(source, start, num):
    return (
        f"{source.label} changed while the index was built: rows {start} to "
        f"{start + num - 1} are not what they were when they were read first"
    )


# Scratch files.


class _Regions:
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


class _Copies:
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
        self.keys = _Regions(job.scratch / "keys", starts, np.int64, 1)
        self.stored = _Regions(job.scratch / "stored", starts, dtype, width)
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


def _read_blocks(path, dtype, shape, rows):
    """A file of an array of this shape, some rows at a time."""
    with path.open("rb") as file:
        for start in range(0, shape[0], rows):
            num = min(rows, shape[0] - start)
            yield np.fromfile(file, dtype, num * shape[1]).reshape(num, shape[1])


# Ids, and lines to show.


def _ids(sources, scratch):
    """The ids of all documents as the folder stores them, if no two are the same."""
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
    """`_id_blocks`, whose sums must be those of the first time they were read."""
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
    """Refuses ids that stand twice; hashes are sorted, a region of them at a time.

    Adds to `sums` what the ids are known by when they are read again.

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
    hashed = _Regions(scratch / "regions", starts, np.uint64, 2)
    first = 0
    for hashes in _read_blocks(scratch / "hashes", np.uint64, (num, 1), _REGION_IDS):
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
    """64-bit hashes (n,) of ids; different integers have different ones."""
    if isinstance(ids, StringIds):
        hashes = np.array([hash(value) for value in ids.tolist()], np.int64)
        return hashes.view(np.uint64)
    return ids.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # odd: a bijection


def _refuse_equal(sources, records):
    """Refuses equal ids among records (n, 2): their hashes and rows."""
    # Rows ascend already, so that a stable sort keeps equal hashes in their order.
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
                f"doc_ids repeat: {shown} stands in row {there} of {other.label} "
                f"and in row {position} of {source.label}"
            )
        seen[value] = source, position


def _place(sources, row):
    """The shard of a document, and its row there."""
    firsts = [source.first_row for source in sources]
    # The last that starts at or before it: empty shards share their start with others.
    source = sources[int(np.searchsorted(firsts, row, side="right")) - 1]
    return source, row - source.first_row


def _texts(sources):
    return {"documents": _lines(sources)} if sources[0].documents is not None else {}


def _lines(sources):
    for source in sources:
        values = source.documents
        values, num = iter(values() if callable(values) else values), 0
        while some := list(itertools.islice(values, _SOME_IDS)):
            num += len(some)
            try:
                yield Documents.of(some).text
            except TypeError as error:
                raise ValueError(
                    f"documents to show of {source.label} must be JSON: {error}"
                ) from None
        if num != len(source):
            raise ValueError(
                f"{source.label} has {num} documents to show for {len(source)} ids"
            )


def _check_replaceable(path):
    """Refuses early what `write_folder` would refuse at the end."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    try:
        read_folder(path)
    except (FileNotFoundError, IndexCorruptError) as error:
        raise FileExistsError(
            f"{path} exists and is not an index that can be replaced: {error}"
        ) from None
    with writer_lock(path):
        pass
