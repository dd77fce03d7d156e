"""The losses of embeddings: how far they are from their codewords, and their start.

What `ehi.train.losses` says of `weights` and the mean over the rows holds here as well.
"""

import jax
import jax.numpy as jnp

from ehi.train.masking import as_float32, row_mean


def codebook_distortion(
    z: jax.Array, z_hat: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Draws the chosen codewords to the embeddings, which stay.

    .. math:: \| \mathrm{sg}(z_n) - \hat z_n \|^2

    Args:
      z: (N, D), embeddings before quantisation.
      z_hat: (N, D), their reconstructions with a gradient to the codewords, from
        `ProductQuantiser.decode` (not the straight-through ones).
      weights: (N,).

    References:
      VQ-VAE: van den Oord et al. 2017, arXiv 1711.00937, eq. 3, second term.
    """
    return row_mean(_squared_distance(jax.lax.stop_gradient(z), z_hat), weights)


def commitment_distortion(
    z: jax.Array, z_hat: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Draws the embeddings to their codewords, which stay.

    .. math:: \| z_n - \mathrm{sg}(\hat z_n) \|^2

    Args: as `codebook_distortion`, to which it is equal in value.

    References:
      VQ-VAE: van den Oord et al. 2017, arXiv 1711.00937, eq. 3, third term.
    """
    return row_mean(_squared_distance(z, jax.lax.stop_gradient(z_hat)), weights)


def anchor(
    embeddings: jax.Array, origin: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Keeps embeddings near the pretrained encoder's, whose neighbours are good.

    .. math:: 1 - \langle d_n, o_n \rangle

    What is learned from labelled pairs is pulled back on everything else, so that it
    does not undo what the encoder knew of it. Of documents this is loss `anchor`, of
    queries `query_anchor`.

    Args:
      embeddings: (N, D), unit rows.
      origin: (N, D), unit rows.
      weights: (N,).

    Returns:
      the mean, from 0 to 2.
    """
    cosine = jnp.sum(as_float32(embeddings) * as_float32(origin), -1)  # (N,)
    return row_mean(1.0 - cosine, weights)


def _squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(as_float32(a) - as_float32(b)), -1)
