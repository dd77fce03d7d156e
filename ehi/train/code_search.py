"""Search of the whole code table inside a step: JPQ's negatives of the current moment.

The codes of the documents stay, the codebooks learn, so the ranking changes with every
step. Two functions: one finds the best documents and has no gradient, the other scores
what was found and has.
"""

import jax
import jax.numpy as jnp

from ehi.model.pq import decode

# Ranks are compared with those of the NumPy search: no products in TF32 or bfloat16.
_EXACT = jax.lax.Precision.HIGHEST


def search_codes(
    q: jax.Array,
    codebooks: jax.Array,
    codes: jax.Array,
    *,
    k: int,
    chunk: int = 65536,
) -> tuple[jax.Array, jax.Array]:
    r"""The k best documents of the whole code table under the current codebooks.

    .. math:: s_{nd} = \sum_m \langle q_{nm}, c_{m, code_{dm}} \rangle

    Exhaustive, a chunk of documents at a time: decode, one product with all queries,
    the chunk's best k joined to the best so far. No gradient. With `documents` rows of
    codes of M bytes, N queries and c = min(chunk, documents), a call needs

      bytes of the table       documents M  (given as uint8; it is read, never copied)
      bytes of a chunk         c (4 D + 4 N + 4 M), vectors, scores and where to look
      bytes of the result      16 N k, the best so far and the chunk's
      multiplications, adds    2 N documents D
      gathered                 documents M codewords of 4 S bytes: 4 documents D bytes

    so memory beyond the table does not grow with the documents, and time is linear in
    them. 10M documents, M = 96, D = 768, N = 32: a table of 960 MB, 235 MB a chunk,
    0.5 TFLOP and 31 GB of gathered codewords a step. 5,000 documents, M = 24, D = 384:
    120 kB, one chunk of 9 MB, 0.12 GFLOP.

    Args:
      q: rotated queries (N, D).
      codebooks: (M, K, S).
      codes: (documents, M) uint8, or another integer type.
      k: documents wanted, at most all.
      chunk: documents decoded at a time.

    Returns:
      scores (N, k) float32, best first, and rows (N, k) int32. Of equal scores the
      smaller row comes first, as in `ehi.index`.

    Raises:
      ValueError: for k not in 1 ... documents, chunk < 1, or shapes that do not fit.

    References:
      JPQ: Zhan et al. 2021, arXiv 2108.00644 (end-to-end negatives).
    """
    _check_shapes(q, codebooks, codes)
    n, documents = len(q), len(codes)
    if not 1 <= k <= documents:
        raise ValueError(f"k={k} of {documents} documents; allowed: 1 to {documents}")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; must be >= 1")
    q, codebooks, codes = jax.lax.stop_gradient((_float(q), _float(codebooks), codes))
    chunk = min(chunk, documents)

    def join(best, first):
        scores, start = _score_chunk(q, codebooks, codes, first, chunk)  # (N, c)
        scores, at = jax.lax.top_k(scores, min(k, chunk))
        # Of equal scores top_k takes the earlier one: the best so far, of smaller rows,
        # stand first.
        scores = jnp.concatenate([best[0], scores], 1)
        rows = jnp.concatenate([best[1], start + at], 1)
        scores, at = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(rows, at, 1)), None

    nothing = jnp.full((n, k), -jnp.inf), jnp.full((n, k), -1, jnp.int32)
    starts = jnp.arange(0, documents, chunk, dtype=jnp.int32)
    return jax.lax.scan(join, nothing, starts)[0]


def score_rows(
    q: jax.Array, codebooks: jax.Array, codes: jax.Array, rows: jax.Array
) -> jax.Array:
    r"""Scores of chosen documents, with a gradient to the queries and the codebooks.

    .. math:: s_{nc} = \sum_m t_{n m, code_{r m}}, \quad
      t_{nmk} = \langle q_{nm}, c_{mk} \rangle, \quad r = rows_{nc}

    A look-up table holds 4 N M K bytes, the looked-up terms 4 N C M.

    Args:
      q: rotated queries (N, D).
      codebooks: (M, K, S).
      codes: (documents, M), an integer type.
      rows: (N, C) int; -1 (no document) scores as row 0, for the caller to mask.

    Returns:
      scores (N, C) float32.

    Raises:
      ValueError: for shapes that do not fit.
    """
    _check_shapes(q, codebooks, codes)
    m, k, s = codebooks.shape
    n, c = rows.shape
    parts = _float(q).reshape(n, m, s)
    table = jnp.einsum("nms,mks->nmk", parts, _float(codebooks), precision=_EXACT)
    chosen = codes[jnp.maximum(rows, 0)].astype(jnp.int32)  # (N, C, M)
    at = (chosen + k * jnp.arange(m)).reshape(n, c * m)
    terms = jnp.take_along_axis(table.reshape(n, m * k), at, 1)  # (N, C M)
    return terms.reshape(n, c, m).sum(-1)


def _score_chunk(q, codebooks, codes, first, chunk: int):
    """Scores (N, c) of a chunk of documents, minus infinity before `first`; its start.

    The last chunk starts early enough to be whole, so the table needs no padding; rows
    before `first` were seen.
    """
    start = jnp.minimum(first, len(codes) - chunk)
    block = jax.lax.dynamic_slice_in_dim(codes, start, chunk)  # (c, M)
    vectors = decode(codebooks, block.astype(jnp.int32))  # (c, D)
    scores = jnp.dot(q, vectors.T, precision=_EXACT)  # (N, c)
    seen = start + jnp.arange(chunk) < first  # (c,)
    return jnp.where(seen, -jnp.inf, scores), start


def _float(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _check_shapes(q, codebooks, codes):
    m, _, s = codebooks.shape
    if q.shape[1] != m * s or codes.shape[1] != m:
        raise ValueError(
            f"queries {q.shape}, codebooks {codebooks.shape} and codes {codes.shape} "
            "do not fit: allowed are (N, M S), (M, K, S) and (documents, M)"
        )
