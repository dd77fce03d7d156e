"""What all losses share: masks, and weighted means over the rows."""

import jax
import jax.numpy as jnp

# Stands for minus infinity, of which differences and products would be NaN.
NEVER = -1e30
# Keeps logarithms and quotients finite where there is nothing to count.
TINY = jnp.finfo(jnp.float32).tiny


def as_float32(x: jax.Array) -> jax.Array:
    """Losses are computed in float32, whatever the model is in."""
    return x.astype(jnp.float32)


def masked(scores: jax.Array, where: jax.Array | None) -> jax.Array:
    """Scores, those that do not count as good as minus infinity."""
    return scores if where is None else jnp.where(where, scores, NEVER)


def row_mean(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The mean of a loss (N,), weighted by rows; 0 if all weights are."""
    if weights is None:
        return rows.mean()
    rows, weights = as_float32(rows), as_float32(weights)
    # 0 * inf would be NaN, and a row of padding must not spoil the mean.
    rows = jnp.where(weights > 0, rows * weights, 0.0)
    return rows.sum() / jnp.maximum(weights.sum(), TINY)
