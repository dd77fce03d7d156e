"""Scores of many queries against the documents of some leaves: matrix products."""

import functools
from typing import NamedTuple

import numpy as np

from ehi.index.aligned import aligned_empty
from ehi.index.codes import decode
from ehi.index.threads import blas_architecture

_DECODED_ROWS = 1024  # decoded at once, near the cache; 512 take 3% longer
_SMALL_PRODUCT, _SMALL_ROWS, _FEW = 10**6, 32, 3  # see `_steps`
_SMALL_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")  # see `scores_order`


@functools.cache
def scores_order():
    """The memory order of scores (n, m) of queries and documents: 'C' or 'F'.

    OpenBLAS copies what it multiplies into an order of its own, but for small matrices
    with the kernels for AVX-512. Of 16 queries and 448 documents of width 384 these
    take 41 us document by document and 126 query by query, those for AVX2 96 and 79.
    """
    return "F" if blas_architecture() in _SMALL_KERNELS else "C"


def new_buffer(index):
    """Room for what `multiply` decodes at once: (rows, D) float32."""
    return aligned_empty((_DECODED_ROWS, index.width), np.float32)


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
