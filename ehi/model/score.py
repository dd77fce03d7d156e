"""Scores of quantised documents: inner product, L2, cosine, or a corrected product.

Embeddings have unit length, reconstructions do not: OPQ at 64x shortens them to 0.89
on average. An inner product then ranks by quantisation error as much as by angle.
Training, the search in the step and the index use the same formulas:

    ip         <q, x^>
    l2         <q, x^> + (1 - |x^|^2) / 2     ranks as -|q - x^|^2 does
    cosine     <q, x^> f, f = 1 / |x^|
    corrected  <q, x^> f, f = 1 / <x^, x>     x: the document's own embedding

`corrected` is unbiased if errors point in all directions alike (RaBitQ: Gao and Long
2024, arXiv 2405.12497). An index keeps f as one byte, which holds 0.5 to 7.9, so f is
kept in this range here too. That also bounds its gradient: a reconstruction of length 0
gives f = 7.9 with no slope, and no small constant has to be added. The index rounds f,
by 0.54% at most; training does not, since rounding has no gradient.
"""

import jax
import jax.numpy as jnp

from ehi.index.search.codes import SCORES, factor_table

# The range of the factors that an index stores.
LEAST_FACTOR, MOST_FACTOR = (float(factor_table()[byte]) for byte in (0, 255))


def check_score(score: str) -> None:
    """Refuse a name that is no score."""
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; allowed: {', '.join(map(repr, SCORES))}")


def score_quantised(
    q: jax.Array, d_hat: jax.Array, d: jax.Array, score: str = "ip"
) -> jax.Array:
    """Scores of quantised documents, with gradients to all three arrays.

    Args:
      q: unit queries (N, D).
      d_hat: reconstructions (C, D) of the documents.
      d: unit embeddings (C, D) of the documents; only 'corrected' reads them.
      score: one of `SCORES`.

    Returns:
      scores (N, C).
    """
    check_score(score)
    products = q @ d_hat.T  # (N, C)
    if score == "corrected":
        agreement = jnp.sum(d_hat * d, -1)  # (C,)
        return products / jnp.clip(agreement, 1 / MOST_FACTOR, 1 / LEAST_FACTOR)
    return score_products(products, jnp.sum(d_hat * d_hat, -1), score)


def score_products(
    products: jax.Array, squares: jax.Array, score: str = "ip"
) -> jax.Array:
    """Scores that need no more of a document than its code.

    Args:
      products: <q, x^> (N, C).
      squares: |x^|^2 of the same documents, (C,) or (N, C).
      score: 'ip', 'l2' or 'cosine'.

    Returns:
      scores (N, C).

    Raises:
      ValueError: 'corrected', which compares with the document's embedding.
    """
    check_score(score)
    if score == "corrected":
        raise ValueError(
            "score 'corrected' compares with the embedding of every document, which "
            "its code does not tell; allowed here: 'ip', 'l2', 'cosine'"
        )
    if score == "l2":
        return products + (1.0 - squares) / 2
    if score == "cosine":
        squares = jnp.clip(squares, MOST_FACTOR**-2, LEAST_FACTOR**-2)
        return products * jax.lax.rsqrt(squares)
    return products
