"""Shards of embeddings to an index folder, in memory that does not grow with them.

    route, count -> prefix sums -> encode, scatter into bands of leaves -> sort, write

Every shard is read twice, in blocks of R <= 8192 rows and R D <= 2^22 values. The first
reading routes documents and counts the copies in every leaf. The prefix sums of these
counts divide a scratch file into bands: consecutive leaves with at most 2^25 bytes of
copies, or one leaf of any size. The second reading encodes copies and appends each to
its band. When a band is written to the index, its copies are sorted by leaf.

Beside the parameters and the shards' own memory, the bytes in memory are at most

    (threads + 2) (s + 3) 4 R D      blocks, their copies and what encodes them
    + threads 2^27                   scores of routing, 2^23 of them at once
    + 2^28                           copies on their way to a band, a band, ids
    + 32 P + N / 1024                counts of the leaves; a sum for every block
    + 16 N for each field            of metadata, and their distinct texts

The scratch files take as much disk as the leaves and the re-rank vectors of the index,
and for each document 4 s bytes for its leaves, 8 s for its copies and 24 for its id.
They are in one folder `.NAME.*` beside the index, which is removed at the end and after
any error. A process that is killed leaves it behind, and the old index is unchanged.
"""

import collections
import contextlib
import errno
import operator
import os
import tempfile
import zlib
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.index import check
from ehi.index.build import first_history, make_leaves
from ehi.index.commit import TowerFiles, check_replaceable, is_free, write_folder
from ehi.index.folder import Stream, writer_lock
from ehi.index.parameters import Parameters, make_parameters
from ehi.index.search.blas import one_blas_thread
from ehi.index.search.routing import assign_leaves, check_beam_of_documents
from ehi.index.store import manifest_header
from ehi.index.stream.shards import (
    block_rows,
    changed,
    finite_block,
    open_shards,
    readings,
    width_and_dtype,
)
from ehi.index.stream.sorting import (
    Copies,
    read_blocks,
    stored_ids,
    stored_metadata,
    stored_texts,
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_folder(
    path,
    shards,
    *,
    leaf_dtype="float32",
    rerank_vectors=False,
    beam=None,
    threads=1,
    tower=None,
    progress=None,
    **arguments,
):
    """Builds an index folder from shards: `save_index(build_index(...))` of them all.

    The files are the same byte for byte, except for documents whose two best leaves or
    codewords are equal up to rounding, or whose factor is half-way between two bytes:
    products of other shapes round differently. An old index is replaced; if anything
    fails, it is unchanged.

    Args:
        path: the folder, made if needed.
        shards: the Shards. If the first has documents to show, or metadata, all must
            have them.
        leaf_dtype, rerank_vectors: as of `build_index`.
        beam: None routes documents exactly, which scores all P leaves. For tall trees,
            a number of nodes kept at each level: see `assign_leaves`.
        threads: Python threads over blocks of documents.
        tower: folder of the text tower that the index carries, or None.
        progress: called with the number of documents of every block that is done, or
            None. Each document is counted twice, once for each reading.
        **arguments: `tree` and all other arguments of `build_index`.

    Raises:
        ValueError: an argument that does not fit; a shard that is missing, unlike the
            first, not finite or not the same when read again; ids that repeat.
        FileNotFoundError: the file of a shard is missing.
        FileExistsError: `path` is there and is not an index.
        IndexLockedError: somebody else writes to it.
        OSError: the disk is full.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from ehi.index import Shard, open_index
        >>> shards = [Shard(np.eye(2), ["a", "b"]), Shard(-np.eye(2), ["x", "y"])]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     build_folder(f"{folder}/index", shards, tree=None)
        ...     index = open_index(f"{folder}/index", mmap=False)
        >>> index.search(np.array([[0.0, -1.0]]), k=1).ids.tolist()
        [['y']]
    """
    path = Path(path).absolute()  # a shard may change the current folder
    sources = open_shards(shards)
    num = sum(len(source) for source in sources)
    width, dtype = width_and_dtype(sources)
    parameters = make_parameters(width, num, **arguments)
    check.check_choice("leaf_dtype", leaf_dtype, ("float32", "float16"))
    beam = check_beam_of_documents(beam, parameters.spill)
    threads = check.check_count("threads", threads)
    check_replaceable(path)
    if not is_free(path):
        with writer_lock(path):
            pass  # find out before the work, not after it, whether somebody else writes
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", dir=path.parent
        ) as scratch:
            arrays = stored_ids(sources, Path(scratch))
            metadata = stored_metadata(sources)
            build = _Build(
                parameters, sources, dtype, leaf_dtype, rerank_vectors, beam, threads,
                Path(scratch), progress or (lambda documents: None),
            )  # fmt: skip
            documents, squares = _documents(build)
            arrays = {**parameters.arrays(), **documents, **arrays}
            arrays |= {} if metadata is None else metadata.arrays()
            history = first_history(num, squares)
            fields = None if metadata is None else metadata.fields
            header = manifest_header(parameters, [("", num)], None, history, fields)
            carried = None if tower is None else TowerFiles.at(tower)
            write_folder(path, header, arrays, stored_texts(sources), tower=carried)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        message = f"{os.strerror(error.errno)}; {path} is as it was"
        raise OSError(error.errno, message) from error


@dataclass(frozen=True, eq=False)
class _Build:
    """Values that all steps of one build share."""

    parameters: Parameters
    sources: list
    dtype: np.dtype
    leaf_dtype: str
    rerank_vectors: bool
    beam: int | None
    threads: int
    scratch: Path
    progress: Callable

    @property
    def half(self):
        """Whether embeddings are stored as float16 somewhere."""
        raw = self.parameters.codebooks is None
        return self.rerank_vectors or (raw and self.leaf_dtype == "float16")


def _documents(build):
    """All arrays of the documents except their ids, name -> array or Stream, and the
    squares of `make_leaves`."""
    with one_blas_thread(), ThreadPoolExecutor(build.threads) as pool:
        counts, sums = _route_and_count(build, pool)
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        copies, squares = _encode_and_scatter(build, pool, offsets, sums)
    total = int(offsets[-1])
    arrays = {
        "leaf_offsets": offsets,
        "leaf_rows": Stream("uint32", (total,), copies.rows()),
    }
    arrays |= copies.streams(total)
    if build.rerank_vectors:
        width = build.parameters.width
        shape = (sum(len(source) for source in build.sources), width)
        file = build.scratch / "rerank"
        blocks = read_blocks(file, np.float16, shape, block_rows(width))
        arrays["rerank_vectors"] = Stream("float16", shape, blocks)
    return arrays, squares


def _route_and_count(build, pool):
    """The first reading: copies in each leaf (P,) int64, and a checksum of every block.

    The leaves of all documents, (N, s) uint32, are written to a scratch file.
    """
    parameters = build.parameters

    def route(source, start, raw):
        block = finite_block(build, source, start, raw)
        leaves = assign_leaves(
            block, parameters.tree, parameters.spill, beam=build.beam
        )
        return leaves.astype(np.uint32), _checksum(raw)

    counts = np.zeros(parameters.num_leaves, np.int64)
    sums = array("L")
    with (build.scratch / "leaves").open("wb") as file:
        for leaves, crc in _in_order(pool, build.threads, route, readings(build)):
            file.write(leaves)
            np.add.at(counts, leaves.ravel(), 1)
            sums.append(crc)
            build.progress(len(leaves))
    return counts, sums


def _encode_and_scatter(build, pool, offsets, sums):
    """The second reading: the Copies of all documents, in bands of leaves, and their
    squares, as of `make_leaves`."""
    parameters = build.parameters

    def encode(source, start, raw, expected, leaves):
        if _checksum(raw) != expected:
            raise ValueError(changed(source, start, len(raw)))
        block = np.ascontiguousarray(raw, np.float32)
        order = np.argsort(leaves, kind="stable")
        rows, leaves = order // parameters.spill, leaves[order].astype(np.int64)
        stored, squares = make_leaves(parameters, block, rows, leaves, build.leaf_dtype)
        keys = leaves << 32 | (source.first_row + start + rows)
        half = block.astype(np.float16) if build.rerank_vectors else None
        values = stored.get("vectors", stored.get("codes"))
        if "factors" in stored:  # the last byte of a record
            values = np.column_stack([values, stored["factors"]])
        return keys, values, half, squares

    def with_leaves(leaves):
        blocks = readings(build, again=True)
        for (source, start, raw), expected in zip(blocks, sums, strict=False):
            num = len(raw) * parameters.spill
            yield source, start, raw, expected, np.fromfile(leaves, np.uint32, num)

    copies, total = Copies(build, offsets), None
    with contextlib.ExitStack() as files:
        leaves = files.enter_context((build.scratch / "leaves").open("rb"))
        if build.rerank_vectors:
            rerank = files.enter_context((build.scratch / "rerank").open("wb"))
        results = _in_order(pool, build.threads, encode, with_leaves(leaves))
        for keys, values, half, squares in results:
            copies.add(keys, values)
            if squares is not None:
                total = tuple(map(operator.add, total or (0.0, 0), squares))
            build.progress(len(keys) // parameters.spill)
            if half is not None:
                rerank.write(half)
    copies.flush()
    (build.scratch / "leaves").unlink()
    return copies, total


def _checksum(block):
    """A checksum of a block's bytes; bfloat16 has no buffer of its own."""
    return zlib.crc32(block.view(np.uint8))


def _in_order(pool, threads, work, items):
    """`work` of every item, in order; at most threads + 1 items are in progress."""
    ahead = collections.deque()
    for item in items:
        ahead.append(pool.submit(work, *item))
        if len(ahead) > threads:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
