"""A tree of soft routing nodes: embedding -> distribution over the leaves.

A leaf is a mixed-radix number: the children ``i_1 ... i_H`` lead to leaf
``i_1 B^(H-1) + ... + i_H``, so level 1 is the most significant digit and the nodes of a
level are numbered in leaf order. How a node chooses is in `ehi.model.routers`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Router(nnx.Module):
    """What follows from the levels, whatever their parameters.

    A subclass has ``level_log_probs(x)``: for embeddings x (N, D) a list over the
    levels h = 1..H of ``log p(child | node, x)``, an array (N, B^(h-1), B).
    """

    def __init__(self, width: int, *, height: int, branching: int, scale: float):
        for name, value, least in (
            ("width", width, 1),
            ("height", height, 1),
            ("branching", branching, 2),
        ):
            if value < least:
                raise ValueError(f"{name}={value} of a tree must be >= {least}")
        if not scale > 0:
            raise ValueError(f"scale={scale} of a router must be > 0")
        self.width, self.height, self.branching = width, height, branching
        self.num_leaves = branching**height

    def node_log_probs(self, x: jax.Array) -> list[jax.Array]:
        """log p(node | x), an array (N, B^h) for each level; the last are the leaves.

        ``p(node) = prod_{j <= h} p(i_j | i_1 ... i_{j-1}, x)``.
        """
        above, nodes = jnp.zeros((x.shape[0], 1)), []  # the root has probability 1
        for level in self.level_log_probs(x):  # (N, B^(h-1), B)
            above = (above[:, :, None] + level).reshape(x.shape[0], -1)  # (N, B^h)
            nodes.append(above)
        return nodes

    def leaf_log_probs(self, x: jax.Array) -> jax.Array:
        """log p(leaf | x) (N, P) of embeddings x (N, D)."""
        return self.node_log_probs(x)[-1]


def assign(leaf_log_probs: jax.Array, spill: int = 1) -> jax.Array:
    """The s = ``spill`` best leaves (N, s) int32 of (N, P) log-probabilities.

    Best first; of equally probable leaves the smaller number, as in the NumPy index.
    """
    leaves = leaf_log_probs.shape[-1]
    if not 1 <= spill <= leaves:
        raise ValueError(f"spill={spill} must be from 1 to the {leaves} leaves")
    return jax.lax.top_k(leaf_log_probs, spill)[1].astype(jnp.int32)


def to_numpy(router: Router) -> dict:
    """The router as the plain arrays that an index stores and searches."""
    if router.kind == "nearest":
        centroids = np.asarray(router.nodes[0][...])  # (1, P, D)
        biases = -0.5 * np.sum(centroids**2, axis=-1)  # (1, P)
        return {
            "kind": "per_node",
            "nodes": [centroids],
            "biases": [biases],
            "scale": float(router.scale),
        }
    if router.kind == "per_level":
        u, w = ([np.asarray(p[...]) for p in ps] for ps in (router.u, router.w))
        return {"kind": router.kind, "u": u, "w": w}
    nodes = [np.asarray(p[...]) for p in router.nodes]
    scale = float(jnp.exp(router.log_scale[...]))
    tree = {"kind": router.kind, "nodes": nodes, "scale": scale}
    if router.w_in is not None:
        tree["w_in"] = np.asarray(router.w_in[...])
        tree["w_out"] = np.asarray(router.w_out[...])
    return tree
