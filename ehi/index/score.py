"""Scores of the documents in leaves.

Raw leaves hold vectors d and score q.d. PQ leaves hold codes and score
(q R).decode(codes) + q.centroid(leaf), the last term where codes are of residuals
(Jegou et al., Product quantization for nearest neighbor search, 2011, section IV).
Sixteen-codeword codes stand two in a byte. A byte of them is a code of a quantiser
with M / 2 sub-spaces and 256 codewords, all pairs of the old ones, so everything here
sees one code a byte.
"""

import functools

import numpy as np

# Rows of codes that one call looks up: 3,500 at once take 107 us, 256 at a time 148.
_GATHER_ROWS = 4096
_DECODED_ROWS = 1024  # decoded at once, near the cache; 512 take 3% longer
_SMALL_PRODUCT, _SMALL_ROWS = 10**6, 32  # see `_multiply`
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
    """Room for what `score_block` decodes at once: (rows, D) float32."""
    return np.empty((_DECODED_ROWS, index.width), np.float32)


def score_block(index, segment, leaf, copies, queries, rotated, buffer):
    """Scores of documents of one leaf for many queries.

    Codes are decoded into one buffer over and over, which stays in the cache. A cache
    of decoded leaves was tried (200,000 x 384, batches of 32 and 128): 10 to 25%
    slower, as it reads 32 times the bytes of the codes, and 20% faster only where all
    batches fell into the same 70 leaves.

    Args:
        index, segment: the Index, and the Segment that holds the documents.
        leaf: leaf number.
        copies: which copies of documents to score, a slice or numbers (m,).
        queries: (n, D) float32.
        rotated: (n, D), the queries times the rotation.
        buffer: of `new_buffer`, overwritten.

    Returns:
        (m, n) float32.
    """
    stored = (segment.vectors if segment.codes is None else segment.codes)[copies]
    columns = (queries if segment.codes is None else rotated).T
    if columns.size <= _SMALL_PRODUCT // _SMALL_ROWS:
        columns = np.ascontiguousarray(columns)
    scores = np.empty((len(stored), len(queries)), np.float32)
    if stored.dtype == np.float32:
        _multiply(stored, columns, scores)
        return scores
    for start in range(0, len(stored), len(buffer)):
        rows = slice(start, start + len(buffer))
        vectors = buffer[: len(stored) - start]
        if segment.codes is None:
            vectors[:] = stored[rows]
        else:
            decode(stored[rows], index.byte_codebooks, vectors)
        _multiply(vectors, columns, scores[rows])
    if index.leaf_centroids is not None:
        scores += queries @ index.leaf_centroids[leaf]
    return scores


def score_leaves(index, contents, query, rotated, leaves):
    """Scores of one query against whole leaves, segment by segment, leaf by leaf.

    Args:
        index, contents: the Index, and its documents.
        query, rotated: (D,) float32, before and after the rotation.
        leaves: (b,) leaf numbers.

    Returns:
        (m,) float32 scores and (m,) document rows.
    """
    parts, rows = [], []
    for segment in contents.segments:
        stored = segment.vectors if segment.codes is None else segment.codes
        starts = segment.leaf_offsets[leaves].tolist()
        stops = segment.leaf_offsets[leaves + 1].tolist()
        parts += [stored[i:j] for i, j in zip(starts, stops, strict=True)]
        rows += segment.rows_of(starts, stops)
    rows = np.concatenate(rows)
    scores = np.empty(len(rows), np.float32)
    if index.codebooks is None:
        first = contents.segments[0].vectors
        streams = len(query) >= _STREAMED_WIDTH and first.nbytes >= _STREAMED_BYTES
        _multiply_all(parts, query, scores, np.vecdot if streams else np.dot)
    else:
        _sum_table(query_table(index.byte_codebooks, rotated), parts, scores)
    if index.leaf_centroids is not None:
        shifts = np.tile(index.leaf_centroids[leaves] @ query, len(contents.segments))
        scores += np.repeat(shifts, [len(part) for part in parts])
    return scores, rows


def look_up(codes, codebooks, rotated):
    """Inner products of one query with coded documents, from a table (M, K).

    score = sum_m table[m, code_m], table[m, j] = query_m . codeword_mj

    Args:
        codes: (m, M) uint8.
        codebooks: (M, K, S) byte codebooks.
        rotated: (D,) float32.
    """
    scores = np.empty(len(codes), np.float32)
    _sum_table(query_table(codebooks, rotated), [codes], scores)
    return scores


def query_table(codebooks, rotated):
    """table[m, j] = query_m . codeword_mj: (M, K)."""
    num_subspaces, _, width = codebooks.shape
    return np.matmul(codebooks, rotated.reshape(num_subspaces, width, 1))[:, :, 0]


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


def _multiply(vectors, columns, out):
    """out (m, n) = the inner products of documents (m, D) and queries (D, n).

    OpenBLAS copies its arguments into an order of its own before it multiplies, except
    where m n D is at most a million. For few queries, a leaf cut into such products
    takes a third less time.
    """
    num, width = vectors.shape
    rows = _SMALL_PRODUCT // columns.size // 16 * 16
    if not _SMALL_ROWS <= rows < num:
        np.matmul(vectors, columns, out=out)
        return
    whole = num // rows * rows
    np.matmul(
        vectors[:whole].reshape(-1, rows, width),
        columns,
        out=out[:whole].reshape(-1, rows, columns.shape[1]),
    )
    np.matmul(vectors[whole:], columns, out=out[whole:])
