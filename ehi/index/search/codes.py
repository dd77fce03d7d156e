"""Codes of PQ leaves: how they are stored, decoded and looked up in a table.

Codes of 16 codewords are stored two in a byte. Such a byte is a code of another
quantiser, with M / 2 sub-spaces and 256 codewords: all pairs of the old codewords. So
everything here reads one code per byte.

A score says how a query q is scored against the reconstruction x^ of a document x:

    ip         q . x^
    l2         q . x^ + (1 - |x^|^2) / 2, which is 1 - |q - x^|^2 / 2 for a unit q
    cosine     q . x^ / |x^|
    corrected  q . x^ / <x^, x>  (RaBitQ's unbiased estimate, arXiv 2405.12497)

The last two multiply by a factor of the document, which is stored in one byte.
"""

import functools

import numpy as np

# Rows of codes that one call looks up. 3,500 rows take 107 us in one call, 148 us in
# calls of 256.
_GATHER_ROWS = 4096
SCORES = ("ip", "l2", "cosine", "corrected")
FACTORED = ("cosine", "corrected")  # the scores that need a stored factor
# The byte of the factor 1, and bytes for each doubling. Factors are 0.5 to 7.9, within
# 0.54%: 1 / <x^, x> is 2 where a code keeps half of a document's square.
_ONE_BYTE, _DOUBLING_BYTES = 64, 64


def pack_codes(codes, num_codewords):
    """Codes (N, M) as stored, uint8: (N, M), or two per byte (N, M / 2), even m low."""
    codes = codes.astype(np.uint8)
    return codes if num_codewords == 256 else codes[:, ::2] | codes[:, 1::2] << 4


def factors_of(score, known, embeddings):
    """The factors of documents: (N,) float32, infinite where there is none.

    Args:
        score: 'cosine' or 'corrected'.
        known: (N, D) float32 reconstructions x^.
        embeddings: (N, D) float32 documents x.
    """
    if score == "cosine":
        products = np.sqrt(np.vecdot(known, known))
    else:
        products = np.maximum(np.vecdot(known, embeddings), 0)
    with np.errstate(divide="ignore"):
        return 1 / products


def factor_bytes(factors):
    """Factors (...) >= 0 as bytes b, uint8: the nearest of 2^((b - 64) / 64)."""
    with np.errstate(divide="ignore"):
        steps = np.log2(factors) * _DOUBLING_BYTES + _ONE_BYTE
    return np.rint(steps.clip(0, 255)).astype(np.uint8)


@functools.cache
def factor_table():
    """The factor of every byte: (256,) float32."""
    steps = np.arange(256) - _ONE_BYTE
    table = np.exp2(steps / _DOUBLING_BYTES).astype(np.float32)
    table.flags.writeable = False
    return table


def byte_codebooks(codebooks):
    """The codebooks of stored bytes: (M, 256, S) unchanged, (M, 16, S) in pairs.

    Returns:
        (M, 256, S), or (M / 2, 256, 2 S): byte v stands for the codewords v % 16 and
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
        # Every position is inside; 'wrap' avoids a slower check.
        words.take(positions, 0, chosen[start : start + len(part)], "wrap")
    return out


def codeword_columns(codebooks):
    """Codebooks (M, K, S) in the order that `query_table` multiplies: (M, S, K)."""
    return np.ascontiguousarray(codebooks.transpose(0, 2, 1))


def query_table(columns, rotated):
    """table[m, j] = query_m . codeword_mj: (M, K).

    Args:
        columns: (M, S, K) of `codeword_columns`. For 48 sub-spaces of 8 they take 5 us;
            codebooks (M, K, S) take up to 15.
        rotated: (D,) float32.
    """
    num_subspaces, width, _ = columns.shape
    return np.matmul(rotated.reshape(num_subspaces, 1, width), columns)[:, 0]


def query_tables(columns, rotated):
    """`query_table` of several vectors (b, D): (b, M, K)."""
    num_subspaces, width, num_codewords = columns.shape
    tables = np.empty((len(rotated), num_subspaces, num_codewords), np.float32)
    parts = rotated.reshape(len(rotated), num_subspaces, width)
    np.matmul(parts.transpose(1, 0, 2), columns, out=tables.transpose(1, 0, 2))
    return tables


def sum_table(table, parts, out):
    """out = sum_m table[m, codes_m] for arrays of codes (m, M), one after the other."""
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


@functools.cache
def _table_starts(num_subspaces, num_codewords):
    """Starts of the sub-spaces in a flat table (M K): (rows, M), all rows equal.

    Adding whole rows is twice as fast as broadcasting one row, and sums of bytes and
    16-bit integers are four times as fast as those of 64-bit integers.
    """
    small = num_subspaces * num_codewords <= 2**16
    starts = np.arange(num_subspaces) * num_codewords
    starts = np.tile(starts.astype(np.uint16 if small else np.int64), (_GATHER_ROWS, 1))
    starts.flags.writeable = False
    return starts


@functools.cache
def _ones(num_subspaces):
    """(M,) float32 ones; making them takes longer than summing a short leaf."""
    ones = np.ones(num_subspaces, np.float32)
    ones.flags.writeable = False
    return ones
