"""Search of the whole code table inside a step, for the negatives of JPQ.

The codes of the documents stay and the codebooks learn, so the ranking changes with
every step. `search_codes` finds the best documents, without a gradient; `score_rows`
scores them again, with a gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ehi.model.pq import decode
from ehi.model.score import score_products

# The ranking must equal that of the NumPy search, so no products in TF32 or bfloat16.
_EXACT = jax.lax.Precision.HIGHEST


def search_codes(
    q: jax.Array,
    codebooks: jax.Array,
    codes: jax.Array,
    *,
    k: int,
    score: str = "ip",
    chunk: int = 65536,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""The k best documents of the whole code table under the current codebooks.

    .. math:: p_{nd} = \sum_m \langle q_{nm}, c_{m, code_{dm}} \rangle

    are the products with the reconstructions. `ehi.model.score` makes scores of them,
    with the squared lengths of the decoded rows.

    The search is exhaustive and has no gradient. For each chunk of documents it
    decodes, takes one product with all queries, and joins the chunk's best k to the
    best so far. With `documents` rows of codes of M bytes, N queries and
    c = min(chunk, documents), a call needs

      bytes of the table       documents M  (if uint8; it is read, never copied)
      bytes of a chunk         c (4 D + 4 N + 4 M), vectors, scores and positions
      bytes of the result      16 N k, the best so far and the chunk's
      multiplications, adds    2 N documents D
      gathered                 documents M codewords of 4 S bytes: 4 documents D bytes

    so memory beyond the table does not grow with the documents, and time is linear in
    them. 10M documents, M = 96, D = 768, N = 32: a table of 960 MB, 235 MB a chunk,
    0.5 TFLOP and 31 GB of gathered codewords a step. 5,000 documents, M = 24, D = 384:
    120 kB, one chunk of 9 MB, 0.12 GFLOP.

    On a mesh of d devices each searches documents / d rows of the table. Their best k
    are gathered, 8 N k d bytes, and joined; the answer is the same, equal scores
    included. Table and time shrink d times if the table lies in equal parts on 'data';
    a table that lies whole on every device is cut there. If d does not divide the
    documents, the table is copied with up to d - 1 empty rows.

    Args:
      q: rotated queries (N, D).
      codebooks: (M, K, S).
      codes: (documents, M) uint8, or another integer type.
      k: documents wanted, at most all.
      score: 'ip', 'l2' or 'cosine'.
      chunk: documents decoded at a time.
      mesh: with an axis 'data'; each of its devices searches a part of the table.

    Returns:
      scores (N, k) float32, best first, and rows (N, k) int32. Of equal scores the
      smaller row comes first, as in `ehi.index`.

    Raises:
      ValueError: k is not in 1 ... documents, chunk is below 1, shapes do not fit, or
        the score needs more than codes.

    References:
      JPQ: Zhan et al. 2021, arXiv 2108.00644 (end-to-end negatives).
    """
    _check_shapes(q, codebooks, codes)
    documents = len(codes)
    if not 1 <= k <= documents:
        raise ValueError(f"k={k} of {documents} documents; allowed: 1 to {documents}")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; must be >= 1")
    q, codebooks, codes = jax.lax.stop_gradient((_float(q), _float(codebooks), codes))
    if mesh is not None and mesh.shape["data"] > 1:
        return _search_parts(q, codebooks, codes, k, score, chunk, mesh)
    return _search(q, codebooks, codes, k, score, chunk, documents)


def _search(q, codebooks, codes, k: int, score: str, chunk: int, documents):
    """The k best of the first `documents` rows: the loop of `search_codes`."""
    n, chunk = len(q), min(chunk, len(codes))

    def join(best, first):
        start, scores = _score_chunk(
            q, codebooks, codes, first, score, chunk, documents
        )
        scores, at = jax.lax.top_k(scores, min(k, chunk))
        # top_k takes the earlier of equal scores. The best so far have smaller rows, so
        # they come first.
        scores = jnp.concatenate([best[0], scores], 1)
        rows = jnp.concatenate([best[1], start + at], 1)
        scores, at = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(rows, at, 1)), None

    nothing = jnp.full((n, k), -jnp.inf), jnp.full((n, k), -1, jnp.int32)
    starts = jnp.arange(0, len(codes), chunk, dtype=jnp.int32)
    return jax.lax.scan(join, nothing, starts)[0]


def _search_parts(q, codebooks, codes, k: int, score: str, chunk: int, mesh):
    """The k best: `_search` of an equal part of the rows on every device, joined."""
    documents, parts = len(codes), mesh.shape["data"]
    share = -(-documents // parts)  # rows of a part
    if share * parts > documents:
        codes = jnp.pad(codes, ((0, share * parts - documents), (0, 0)))

    # Without shard_map the compiler copies the whole table to every device, because the
    # slices of the loop cross the parts.
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,  # jax does not infer that all_gather gives all the same
    )
    def search(q, codebooks, part):
        before = share * jax.lax.axis_index("data")
        here = jnp.clip(documents - before, 0, share)  # rows that are not empty
        scores, rows = _search(q, codebooks, part, min(k, share), score, chunk, here)
        # The parts are in order, so of equal scores the smaller row comes first.
        scores, rows = (
            jax.lax.all_gather(x, "data", axis=1, tiled=True)  # (N, d k)
            for x in (scores, before + rows)
        )
        scores, at = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(rows, at, 1)

    return search(q, codebooks, codes)


def score_rows(
    q: jax.Array,
    codebooks: jax.Array,
    codes: jax.Array,
    rows: jax.Array,
    *,
    score: str = "ip",
) -> jax.Array:
    r"""Scores of given documents, with a gradient to the queries and the codebooks.

    .. math:: p_{nc} = \sum_m t_{n m, code_{r m}}, \quad
      t_{nmk} = \langle q_{nm}, c_{mk} \rangle, \quad r = rows_{nc}

    are the products, of which `ehi.model.score` makes scores; squared lengths are sums
    of a table (M, K) in the same way. The look-up table takes 4 N M K bytes, the terms
    from it 4 N C M.

    Args:
      q: rotated queries (N, D).
      codebooks: (M, K, S).
      codes: (documents, M), an integer type.
      rows: (N, C) int; -1 (no document) scores as row 0, which the caller masks.
      score: 'ip', 'l2' or 'cosine'.

    Returns:
      scores (N, C) float32.

    Raises:
      ValueError: shapes do not fit, or the score needs more than codes.
    """
    _check_shapes(q, codebooks, codes)
    m, k, s = codebooks.shape
    n, c = rows.shape
    parts = _float(q).reshape(n, m, s)
    codebooks = _float(codebooks)
    table = jnp.einsum("nms,mks->nmk", parts, codebooks, precision=_EXACT)
    chosen = codes[jnp.maximum(rows, 0)].astype(jnp.int32)  # (N, C, M)
    at = chosen + k * jnp.arange(m)
    terms = table.reshape(n, m * k)
    terms = jnp.take_along_axis(terms, at.reshape(n, c * m), 1)  # (N, C M)
    norms = jnp.sum(codebooks**2, -1).reshape(m * k)
    products, squares = terms.reshape(n, c, m).sum(-1), norms[at].sum(-1)  # (N, C)
    return score_products(products, squares, score)


def _score_chunk(q, codebooks, codes, first, score: str, chunk: int, documents):
    """Start of a chunk of rows, and its scores (N, c).

    The last chunk starts early enough to be whole, so the table needs no padding. Rows
    before `first`, which were seen, and empty rows from `documents` on score minus
    infinity.
    """
    start = jnp.minimum(first, len(codes) - chunk)
    block = jax.lax.dynamic_slice_in_dim(codes, start, chunk)  # (c, M)
    vectors = decode(codebooks, block.astype(jnp.int32))  # (c, D)
    products = jnp.dot(q, vectors.T, precision=_EXACT)  # (N, c)
    scores = score_products(products, jnp.sum(vectors * vectors, -1), score)
    rows = start + jnp.arange(chunk)
    new = (rows >= first) & (rows < documents)  # (c,)
    return start, jnp.where(new, scores, -jnp.inf)


def _float(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _check_shapes(q, codebooks, codes):
    m, _, s = codebooks.shape
    if q.shape[1] != m * s or codes.shape[1] != m:
        raise ValueError(
            f"queries {q.shape}, codebooks {codebooks.shape} and codes {codes.shape} "
            "do not fit: allowed are (N, M S), (M, K, S) and (documents, M)"
        )
