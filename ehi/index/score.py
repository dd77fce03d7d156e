"""Scores of the documents in leaves.

Raw leaves hold vectors d and score q.d. PQ leaves hold codes and score
(q R).decode(codes) + q.centroid(leaf), the last term where codes are of residuals
(Jegou et al., Product quantization for nearest neighbor search, 2011, section IV).
Sixteen-codeword codes stand two in a byte. A byte of them is a code of a quantiser
with M / 2 sub-spaces and 256 codewords, all pairs of the old ones, so everything here
sees one code a byte.
"""

import functools
from typing import NamedTuple

import numpy as np

from ehi.index.aligned import aligned_row
from ehi.index.threads import blas_architecture

# Rows of codes that one call looks up: 3,500 at once take 107 us, 256 at a time 148.
_GATHER_ROWS = 4096
_DECODED_ROWS = 1024  # decoded at once, near the cache; 512 take 3% longer
_SMALL_PRODUCT, _SMALL_ROWS = 10**6, 32  # see `_steps`
_FEW = 3
_SMALL_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")  # see `scores_order`
# Vectors of one query's leaves, from where on a product for each row (`vecdot`) is
# faster than one of all: it reads memory 5 to 10% sooner, but of 2,000 x 384 in the
# cache it takes 1.3 times as long.
_STREAMED_WIDTH, _STREAMED_BYTES = 256, 2**26


def pack_codes(codes, num_codewords):
    """Codes (N, M) as stored: uint8 (N, M), or two a byte (N, M / 2), even M low."""
    codes = codes.astype(np.uint8)
    return codes if num_codewords == 256 else codes[:, ::2] | codes[:, 1::2] << 4


def byte_codebooks(codebooks):
    """The codebooks of stored bytes: (M, 256, S) as they are, (M, 16, S) paired.

    Returns:
        (M, 256, S), or (M / 2, 256, 2 S) where byte v means the codewords v % 16 and
        v // 16 of two neighbouring sub-spaces.
    """
    if codebooks.shape[1] == 256:
        return np.ascontiguousarray(codebooks, np.float32)
    byte = np.arange(256)
    pairs = [codebooks[::2, byte % 16], codebooks[1::2, byte // 16]]
    return np.concatenate(pairs, axis=2).astype(np.float32)


def decode(codes, codebooks, out=None):
    """Reconstructions (m, D) of stored codes (m, M), given byte codebooks.

    Args:
        out: (m, D) float32 to write to, or None for a new array.
    """
    num_subspaces, num_codewords, width = codebooks.shape
    words = codebooks.reshape(num_subspaces * num_codewords, width)
    starts = _table_starts(num_subspaces, num_codewords)
    if out is None:
        out = np.empty((len(codes), num_subspaces * width), np.float32)
    chosen = out.reshape(len(codes), num_subspaces, width)
    for start in range(0, len(codes), _GATHER_ROWS):
        part = codes[start : start + _GATHER_ROWS]
        positions = part + starts[: len(part)]
        # Every position is inside: 'wrap' only spares a slower check.
        words.take(positions, 0, chosen[start : start + len(part)], "wrap")
    return out


def new_buffer(index):
    """Room for what `multiply` decodes at once: (rows, D) float32."""
    return np.empty((_DECODED_ROWS, index.width), np.float32)


@functools.cache
def scores_order():
    """The memory order of scores (n, m) of queries and documents: 'C' or 'F'.

    OpenBLAS copies what it multiplies into an order of its own, which takes longer of
    what it gets second: documents, where it writes query by query. Its kernels for
    AVX-512 multiply small matrices as they are, fastest document by document: of 16
    queries and 448 documents of width 384, 41 us against 126, where those for AVX2 take
    96 and 79.
    """
    return "F" if blas_architecture() in _SMALL_KERNELS else "C"


class Products(NamedTuple):
    """What makes the scores of Blocks.

    Attributes:
        steps: (left, right, out) of matrix products; where left are codes or float16,
            these documents (m, .) have to be decoded, and right are queries (D, n).
        shifts: (out, shift) (n, m) and (n, 1), to be added where codes are of
            residuals.
    """

    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    shifts: list[tuple[np.ndarray, np.ndarray]]


def products_of(index, tasks, copies, blocks, queries, rotated):
    """The Products of documents and queries of some leaves.

    Args:
        index: the Index.
        tasks: of each leaf its `segment` and its number `leaf`.
        copies: which copies of documents of each, a slice or numbers (m,).
        blocks: the Blocks, in `scores_order`.
        queries: (sum n, D) float32, of all leaves.
        rotated: (sum n, D), the queries times the rotation.
    """
    coded, order = index.codebooks is not None, scores_order()
    asked = rotated if coded else queries
    products = Products([], [])
    for task, chosen, part, out in zip(
        tasks, copies, blocks.parts, blocks.scores, strict=True
    ):
        segment = task.segment
        stored = (segment.codes if coded else segment.vectors)[chosen]
        columns = asked[part].T  # (D, n)
        if order == "F" and columns.size <= _SMALL_PRODUCT // _SMALL_ROWS:
            columns = np.ascontiguousarray(columns)
        if stored.dtype == np.float32:
            products.steps.extend(_steps(columns, stored, out))
        else:
            products.steps.append((stored, columns, out))
        if index.leaf_centroids is not None:
            shift = queries[part] @ index.leaf_centroids[task.leaf]
            products.shifts.append((out, shift[:, None]))
    return products


def multiply(index, products, buffer):
    """Computes Products.

    Nothing else happens between the steps: each lets other threads run.

    Args:
        index, products: the Index, and its Products.
        buffer: of `new_buffer`, overwritten.
    """
    for left, right, out in products.steps:
        if left.dtype == np.float32:
            np.matmul(left, right, out=out)
        else:
            _decode_and_multiply(index, left, right, out, buffer)
    for out, shift in products.shifts:
        out += shift


def _decode_and_multiply(index, stored, columns, out, buffer):
    """Codes are decoded into one buffer over and over, which stays in the cache.

    A cache of decoded leaves was tried (200,000 x 384, batches of 32 and 128): 10 to
    25% slower, as it reads 32 times the bytes of the codes, and 20% faster only where
    all batches fell into the same 70 leaves.
    """
    for start in range(0, len(stored), len(buffer)):
        rows = slice(start, start + len(buffer))
        vectors = buffer[: len(stored) - start]
        if index.codebooks is None:
            vectors[:] = stored[rows]
        else:
            decode(stored[rows], index.byte_codebooks, vectors)
        for left, right, part in _steps(columns, vectors, out[:, rows]):
            np.matmul(left, right, out=part)


def score_leaves(index, contents, query, rotated, leaves):
    """Scores of one query against whole leaves, segment by segment, leaf by leaf.

    Args:
        index, contents: the Index, and its documents.
        query, rotated: (D,) float32, before and after the rotation.
        leaves: (b,) leaf numbers.

    Returns:
        (m,) float32 scores, and a function from positions among them, or from None
        for all, to document rows.
    """
    parts, spans = [], []
    for segment in contents.segments:
        stored = segment.vectors if segment.codes is None else segment.codes
        starts, stops = segment.leaf_offsets[leaves], segment.leaf_offsets[leaves + 1]
        spans.append((segment, starts, stops))
        bounds = zip(starts.tolist(), stops.tolist(), strict=True)
        parts += [stored[i:j] for i, j in bounds]
    scores = np.empty(sum(map(len, parts)), np.float32)
    if index.codebooks is None:
        first = contents.segments[0].vectors
        streams = len(query) >= _STREAMED_WIDTH and first.nbytes >= _STREAMED_BYTES
        if streams:
            _multiply_all(parts, aligned_row(query), scores, np.vecdot)
        else:
            _multiply_all(parts, query, scores, np.dot)
    else:
        _sum_table(query_table(index.codeword_columns, rotated), parts, scores)
    if index.leaf_centroids is not None:
        shifts = np.tile(index.leaf_centroids[leaves] @ query, len(contents.segments))
        scores += np.repeat(shifts, [len(part) for part in parts])
    return scores, functools.partial(_rows_of, spans)


def _rows_of(spans, positions=None):
    """Document rows of positions in spans (segment, starts, stops) of copies."""
    if positions is None or len(spans) > 1:
        rows = [
            rows
            for segment, starts, stops in spans
            for rows in segment.rows_of(starts.tolist(), stops.tolist())
        ]
        rows = np.concatenate(rows)
        return rows if positions is None else rows[positions]
    segment, starts, stops = spans[0]
    ends = (stops - starts).cumsum()
    leaf = ends.searchsorted(positions, side="right")
    return segment.rows_at(positions + (stops - ends)[leaf])


def look_up(codes, codebooks, rotated):
    """Inner products of one query with coded documents, from a table (M, K).

    score = sum_m table[m, code_m], table[m, j] = query_m . codeword_mj

    Args:
        codes: (m, M) uint8.
        codebooks: (M, K, S) byte codebooks.
        rotated: (D,) float32.
    """
    scores = np.empty(len(codes), np.float32)
    table = query_table(codeword_columns(codebooks), rotated)
    _sum_table(table, [codes], scores)
    return scores


def codeword_columns(codebooks):
    """Codebooks (M, K, S) as `query_table` multiplies them fastest: (M, S, K)."""
    return np.ascontiguousarray(codebooks.transpose(0, 2, 1))


def query_table(columns, rotated):
    """table[m, j] = query_m . codeword_mj: (M, K).

    Args:
        columns: (M, S, K) of `codeword_columns`; of 48 sub-spaces of 8 it takes 5 us,
            where codebooks as they are take up to 15.
        rotated: (D,) float32.
    """
    num_subspaces, width, _ = columns.shape
    return np.matmul(rotated.reshape(num_subspaces, 1, width), columns)[:, 0]


def _sum_table(table, parts, out):
    """out = sum_m table[m, codes_m], of arrays of codes (m, M), one after the other."""
    starts, ones = _table_starts(*table.shape), _ones(len(table))
    done = 0
    for codes in _gathered(parts, _GATHER_ROWS):
        values = table.take(codes + starts[: len(codes)], mode="wrap")  # as in `decode`
        # A product with ones sums short rows several times faster than sum(axis=1).
        np.matmul(values, ones, out=out[done : done + len(codes)])
        done += len(codes)


def _gathered(arrays, num):
    """The rows of all arrays, in arrays of `num` rows and a last, shorter one."""
    part, room = [], num
    for array in arrays:
        start = 0
        while start < len(array):
            part.append(array[start : start + room])
            start += len(part[-1])
            room -= len(part[-1])
            if not room:
                yield np.concatenate(part)
                part, room = [], num
    if part:
        yield np.concatenate(part)


def _multiply_all(parts, query, out, product):
    """out = inner products of a query (D,) with arrays (m, D), one after the other."""
    done = 0
    for vectors in parts:
        if vectors.dtype != np.float32:
            vectors = vectors.astype(np.float32)
        product(vectors, query, out=out[done : done + len(vectors)])
        done += len(vectors)


@functools.cache
def _table_starts(num_subspaces, num_codewords):
    """Where each sub-space's part of a flat table (M K) starts: (rows, M), rows alike.

    Sums with whole rows are twice as fast as with one row that is broadcast, and sums
    of bytes and 16-bit integers four times as fast as of 64-bit ones.
    """
    small = num_subspaces * num_codewords <= 2**16
    starts = np.arange(num_subspaces) * num_codewords
    starts = np.tile(starts.astype(np.uint16 if small else np.int64), (_GATHER_ROWS, 1))
    starts.flags.writeable = False
    return starts


@functools.cache
def _ones(num_subspaces):
    """As many float32 ones: making them takes longer than adding a short leaf up."""
    ones = np.ones(num_subspaces, np.float32)
    ones.flags.writeable = False
    return ones


def _steps(columns, vectors, out):
    """(left, right, out) of the products out (n, m) of (D, n) and documents (m, D).

    Where small products are multiplied as they are, they have at most a million terms:
    a leaf cut into such products takes a third less time. Where they are not, few
    queries are multiplied one by one: of 3 queries and 390 documents that is faster.
    """
    if scores_order() == "C":
        queries, step = columns.T, columns.shape[1] if columns.shape[1] > _FEW else 1
        rows = [slice(row, row + step) for row in range(0, len(queries), step)]
        return [(queries[row], vectors.T, out[row]) for row in rows]
    num, width = vectors.shape
    out = out.T  # (m, n)
    rows = _SMALL_PRODUCT // columns.size // 16 * 16
    if not _SMALL_ROWS <= rows < num:
        return [(vectors, columns, out)]
    whole = num // rows * rows
    cut = vectors[:whole].reshape(-1, rows, width)
    out_cut = out[:whole].reshape(-1, rows, columns.shape[1])
    return [(cut, columns, out_cut), (vectors[whole:], columns, out[whole:])]
