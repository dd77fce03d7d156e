"""Computing again in the backward pass what would take memory until then."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def recomputed(function: Callable, x: jax.Array, *others) -> jax.Array:
    """function(x, *others), of which only the arguments are kept for backward.

    The backward pass runs the function again, as with `jax.checkpoint`; see `after`.

    Args:
        function: of arrays, and trees of them, to an array.
        x: what everything costly in the function depends on.
        others: its further arguments.

    Returns:
        what the function returns.
    """

    @jax.custom_vjp
    def call(x, *others):
        return function(x, *others)

    def forward(x, *others):
        return function(x, *others), (x, *others)

    def backward(kept, gradient):
        x, *others = kept
        return jax.vjp(function, after(x, gradient), *others)[1](gradient)

    call.defvjp(forward, backward)
    return call(x, *others)


def after(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """x, not to be used before `gradient` is there.

    Without it XLA finds that a recomputation equals what the forward pass computed,
    and keeps that. On a CPU the barrier of `jax.checkpoint` does not help: it is
    dropped before the operations are put in order, so the second copy is computed right
    after the first. The MLPs alone held 150 MB of a train step of MiniLM so.
    """
    return jax.lax.platform_dependent(
        x, gradient, cpu=_plus_zero, default=_behind_barrier
    )


def _plus_zero(x, gradient):
    # A zero that no compiler can know, for the sake of NaN.
    one = jax.lax.slice(gradient, (0,) * gradient.ndim, (1,) * gradient.ndim)
    return x + jnp.minimum(jnp.abs(one), 0).reshape(()).astype(x.dtype)


def _behind_barrier(x, gradient):
    return jax.lax.optimization_barrier((x, gradient))[0]
