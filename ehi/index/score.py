"""Scores of the documents in leaves.

Raw leaves hold vectors d and score q.d. PQ leaves hold codes and score
(q R).decode(codes) + q.centroid(leaf), the last term where codes are of residuals
(Jegou et al., Product quantization for nearest neighbor search, 2011, section IV).
Sixteen-codeword codes stand two in a byte. A byte of them is a code of a quantiser
with M / 2 sub-spaces and 256 codewords, all pairs of the old ones, so everything here
sees one code a byte.
"""

import numpy as np

_GATHER_ROWS = 1024  # rows a look-up handles at once, so that they stay in the cache
_FEW_QUERIES = 64  # measured: up to 1.8 times faster below, slower above


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


def decode(codes, codebooks):
    """Reconstructions (m, D) of stored codes (m, M), given byte codebooks."""
    num_subspaces, num_codewords, width = codebooks.shape
    words = codebooks.reshape(num_subspaces * num_codewords, width)
    chosen = words.take(codes + _table_starts(codebooks), axis=0)  # (m, M, S)
    return chosen.reshape(len(codes), num_subspaces * width)


def score_block(index, segment, queries, rotated, leaf, copies):
    """Scores of many queries against documents of one leaf: one GEMM.

    Args:
        index, segment: the Index, and the Segment that holds the documents.
        queries: (n, D) float32.
        rotated: (n, D), the queries times the rotation.
        leaf: leaf number.
        copies: which copies of documents to score, a slice or numbers (m,).

    Returns:
        (n, m) float32.
    """
    if segment.codes is None:
        vectors = segment.vectors[copies].astype(np.float32, copy=False)
        return _inner_products(queries, vectors)
    vectors = decode(segment.codes[copies], index.byte_codebooks)
    scores = _inner_products(rotated, vectors)
    if index.leaf_centroids is not None:
        scores += (queries @ index.leaf_centroids[leaf])[:, None]
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
    found = [
        _score_segment(index, segment, query, rotated, leaves)
        for segment in contents.segments
    ]
    if len(found) == 1:
        return found[0]
    scores, rows = zip(*found, strict=True)
    return np.concatenate(scores), np.concatenate(rows)


def _score_segment(index, segment, query, rotated, leaves):
    starts, stops = segment.leaf_offsets[leaves], segment.leaf_offsets[leaves + 1]
    spans = list(zip(starts.tolist(), stops.tolist(), strict=True))
    rows = np.concatenate([segment.rows(start, stop) for start, stop in spans])
    if segment.codes is None:
        scores = np.empty(len(rows), np.float32)
        done = 0
        for start, stop in spans:
            block = segment.vectors[start:stop].astype(np.float32, copy=False)
            np.matmul(block, query, out=scores[done : done + len(block)])
            done += len(block)
        return scores, rows
    codes = np.concatenate([segment.codes[start:stop] for start, stop in spans])
    scores = look_up(codes, index.byte_codebooks, rotated)
    if index.leaf_centroids is not None:
        scores += np.repeat(index.leaf_centroids[leaves] @ query, stops - starts)
    return scores, rows


def look_up(codes, codebooks, rotated):
    """Inner products of one query with coded documents, from a table (M, K).

    score = sum_m table[m, code_m], table[m, j] = query_m . codeword_mj

    Args:
        codes: (m, M) uint8.
        codebooks: (M, K, S) byte codebooks.
        rotated: (D,) float32.
    """
    num_subspaces, num_codewords, width = codebooks.shape
    parts = rotated.reshape(num_subspaces, width, 1)
    table = np.matmul(codebooks, parts).ravel()  # (M K,)
    starts = _table_starts(codebooks)
    ones = np.ones(num_subspaces, np.float32)
    scores = np.empty(len(codes), np.float32)
    for start in range(0, len(codes), _GATHER_ROWS):
        positions = codes[start : start + _GATHER_ROWS] + starts
        # A product with ones sums short rows several times faster than sum(axis=1).
        scores[start : start + _GATHER_ROWS] = table.take(positions) @ ones
    return scores


def _table_starts(codebooks):
    """Where each sub-space's part of a table over all codewords starts: (M,)."""
    num_subspaces, num_codewords, _ = codebooks.shape
    # Sums of bytes and 16-bit integers are four times faster than of 64-bit ones.
    small = num_subspaces * num_codewords <= 2**16
    starts = np.arange(num_subspaces) * num_codewords
    return starts.astype(np.uint16 if small else np.int64)


def _inner_products(queries, vectors):
    """(n, m) inner products; the orientation BLAS is faster in depends on n."""
    if len(queries) < _FEW_QUERIES:
        return np.ascontiguousarray((vectors @ queries.T).T)
    return queries @ vectors.T
