"""Beam search over a tree, in JAX: the twin of the NumPy search of `ehi.index`."""

import jax
import jax.numpy as jnp

from ehi.model.tree import Router


def beam_search(router: Router, x: jax.Array, beam: int) -> tuple[jax.Array, jax.Array]:
    """The leaves found when each level keeps its best min(beam, its nodes) nodes.

    All nodes are scored and the survivors looked up: on an accelerator, and in batches,
    one dense product beats gathering the children of each row's nodes. The NumPy search
    scores the survivors' children alone and finds the same leaves.

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
        # top_k prefers the earlier of equals, so the candidates go in leaf order.
        order = jnp.argsort(nodes, -1)
        nodes = jnp.take_along_axis(nodes, order, -1)[:, :, None]  # (N, b, 1)
        log_p = jnp.take_along_axis(log_p, order, -1)[:, :, None]
        log_p = log_p + jnp.take_along_axis(level, nodes, 1)  # (N, b, B)
        nodes = nodes * branching + jnp.arange(branching)
        keep = min(beam, nodes.shape[1] * branching)
        log_p, kept = jax.lax.top_k(log_p.reshape(rows, -1), keep)  # (N, keep)
        nodes = jnp.take_along_axis(nodes.reshape(rows, -1), kept, -1)
    return nodes, log_p
