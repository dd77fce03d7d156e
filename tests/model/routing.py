"""Routers and embeddings that the tests of the tree share."""

import jax
import jax.numpy as jnp
from flax import nnx

from ehi.model.tree import make_router

D, N = 8, 5


def embeddings(rows=N, seed=1):
    x = jax.random.normal(jax.random.key(seed), (rows, D))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def router_of(kind, height=2, branching=3, **kwargs):
    return make_router(
        kind, D, height=height, branching=branching, rngs=nnx.Rngs(0), **kwargs
    )


def with_random_residual(router):
    """A residual layer that does something: at the start w_out is zero."""
    router.w_out[...] = jax.random.normal(jax.random.key(5), router.w_out.shape)
    return router
