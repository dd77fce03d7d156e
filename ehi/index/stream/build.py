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
import os
import tempfile
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.index import check
from ehi.index.build import make_leaves
from ehi.index.commit import check_replaceable, is_free, write_folder
from ehi.index.folder import Stream, writer_lock
from ehi.index.parameters import make_parameters
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
from ehi.index.stream.sorting import Copies, read_blocks, stored_ids, stored_texts

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_folder(
    path,
    shards,
    *,
    leaf_dtype="float32",
    rerank_vectors=False,
    beam=None,
    threads=1,
    **parameters,
):
    """Builds an index folder from shards: `save_index(build_index(...))` of them all.

    The files are the same byte for byte, but for documents whose two best leaves or
    codewords differ by rounding: products of other shapes round differently. An index
    that is there already is replaced, and stays what it was if anything fails.

    Args:
        path: the folder, made if needed.
        shards: the Shards. Where the first has documents to show, all must.
        leaf_dtype, rerank_vectors: as of `build_index`.
        beam: None routes documents exactly, scoring all P leaves; a number of nodes
            kept at each level is for tall trees: see `assign_leaves`.
        threads: Python threads over blocks of documents.
        **parameters: `tree` and all others of `build_index`.

    Raises:
        ValueError: an argument that does not fit; a shard that is missing, unlike the
            first, not finite or not the same when read again; ids that repeat.
        FileNotFoundError: the file of a shard is missing.
        FileExistsError: `path` is there and is not an index.
        IndexLockedError: somebody else writes to it.
        OSError: the disk is full.
    """
    path = Path(path)
    sources = open_shards(shards)
    num = sum(len(source) for source in sources)
    width, dtype = width_and_dtype(sources)
    index = make_parameters(width, num, **parameters)
    check.check_choice("leaf_dtype", leaf_dtype, ("float32", "float16"))
    beam = check_beam_of_documents(beam, index.spill)
    threads = check.check_count("threads", threads)
    check_replaceable(path)
    if not is_free(path):
        with writer_lock(path):
            pass  # nobody else writes: better known before the work than after it
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", dir=path.parent
        ) as scratch:
            arrays = stored_ids(sources, Path(scratch))
            job = _Job(
                index, sources, dtype, leaf_dtype, rerank_vectors, beam, threads,
                Path(scratch),
            )  # fmt: skip
            arrays = {**index.arrays(), **_documents(job), **arrays}
            header = manifest_header(index, [("", num)])
            write_folder(path, header, arrays, stored_texts(sources))
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
        blocks = read_blocks(
            job.scratch / "rerank", np.float16, shape, block_rows(job.index.width)
        )
        arrays["rerank_vectors"] = Stream("float16", shape, blocks)
    return arrays


def _route_and_count(job, pool):
    """The first reading: copies in each leaf (P,) int64, and a sum of every block.

    The leaves of all documents, (N, s) uint32, go to a scratch file.
    """

    def route(source, start, raw):
        block = finite_block(job, source, start, raw)
        leaves = assign_leaves(block, job.index.tree, job.index.spill, beam=job.beam)
        return leaves.astype(np.uint32), zlib.crc32(raw)

    counts = np.zeros(job.index.num_leaves, np.int64)
    sums = array("L")
    with (job.scratch / "leaves").open("wb") as file:
        for leaves, crc in _in_order(pool, job.threads, route, readings(job)):
            file.write(leaves)
            np.add.at(counts, leaves.ravel(), 1)
            sums.append(crc)
    return counts, sums


def _encode_and_scatter(job, pool, offsets, sums):
    """The second reading: the copies of all documents, in bands of leaves."""
    index = job.index

    def encode(source, start, raw, expected, leaves):
        if zlib.crc32(raw) != expected:
            raise ValueError(changed(source, start, len(raw)))
        block = np.ascontiguousarray(raw, np.float32)
        order = np.argsort(leaves, kind="stable")
        rows, leaves = order // index.spill, leaves[order].astype(np.int64)
        stored = make_leaves(index, block, rows, leaves, job.leaf_dtype)
        keys = leaves << 32 | (source.first_row + start + rows)
        half = block.astype(np.float16) if job.rerank_vectors else None
        return keys, *stored.values(), half

    def with_leaves(leaves):
        blocks = readings(job, again=True)
        for (source, start, raw), expected in zip(blocks, sums, strict=False):
            num = len(raw) * index.spill
            yield source, start, raw, expected, np.fromfile(leaves, np.uint32, num)

    copies = Copies(job, offsets)
    with contextlib.ExitStack() as files:
        leaves = files.enter_context((job.scratch / "leaves").open("rb"))
        if job.rerank_vectors:
            rerank = files.enter_context((job.scratch / "rerank").open("wb"))
        results = _in_order(pool, job.threads, encode, with_leaves(leaves))
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
