"""Routers, embeddings and a beam search in JAX, for the tests of the tree."""

import jax
import jax.numpy as jnp
from flax import nnx

from ehi.model.tree import Router, make_router

D, N = 8, 5


def embeddings(rows=N, seed=1):
    x = jax.random.normal(jax.random.key(seed), (rows, D))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def router_of(kind, height=2, branching=3, **kwargs):
    return make_router(
        kind, D, height=height, branching=branching, rngs=nnx.Rngs(0), **kwargs
    )


def with_random_residual(router):
    """Give the residual layer an effect: w_out is zero at the start."""
    router.w_out[...] = jax.random.normal(jax.random.key(5), router.w_out.shape)
    return router


def beam_search(router: Router, x: jax.Array, beam: int) -> tuple[jax.Array, jax.Array]:
    """The beam search of `ehi.index`, again in JAX: leaves, and their log p(leaf | x).

    Each level keeps its best min(beam, its nodes) nodes.

    All nodes are scored and the survivors looked up; the NumPy search scores the
    survivors' children only and must find the same leaves.

    Args:
      router: a router of height H and branching B.
      x: embeddings (N, D).
      beam: b, from 1 to P. The best leaves are certain for H = 1 and for b = P.

    Returns:
      leaves (N, b) int32, most probable first and of equals the smaller number, and
      their log p(leaf | x) (N, b).

    Raises:
      ValueError: if ``beam`` is not from 1 to P.
    """
    if not 1 <= beam <= router.num_leaves:
        raise ValueError(f"beam={beam} is not from 1 to the {router.num_leaves} leaves")
    rows, branching = x.shape[0], router.branching
    nodes, log_p = jnp.zeros((rows, 1), jnp.int32), jnp.zeros((rows, 1))
    for level in router.level_log_probs(x):  # (N, B^(h-1), B)
        # top_k takes the first of equals, so the candidates must be in leaf order.
        order = jnp.argsort(nodes, -1)
        nodes = jnp.take_along_axis(nodes, order, -1)[:, :, None]  # (N, b, 1)
        log_p = jnp.take_along_axis(log_p, order, -1)[:, :, None]
        log_p = log_p + jnp.take_along_axis(level, nodes, 1)  # (N, b, B)
        nodes = nodes * branching + jnp.arange(branching)
        keep = min(beam, nodes.shape[1] * branching)
        log_p, kept = jax.lax.top_k(log_p.reshape(rows, -1), keep)  # (N, keep)
        nodes = jnp.take_along_axis(nodes.reshape(rows, -1), kept, -1)
    return nodes, log_p
