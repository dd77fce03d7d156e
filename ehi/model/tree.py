"""A tree of soft routing nodes: embedding -> distribution over the leaves.

A leaf is a mixed-radix number: the children ``i_1 ... i_H`` lead to leaf
``i_1 B^(H-1) + ... + i_H``, so level 1 is the most significant digit and the nodes of a
level are numbered in leaf order. How a node chooses is in `ehi.model.tree`.
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


# MERGED ehi_model_routers: How the nodes of a tree choose among their children: three
# parameterisations.

# The NumPy index repeats these discrete choices, so the products behind them must not
# be rounded to TF32 or bfloat16 on an accelerator.
_EXACT = jax.lax.Precision.HIGHEST


class PerNodeRouter(Router):
    """Every node owns one vector for each of its children; the default.

    ``p(child | node, x) = softmax_B(exp(log_scale) <f(x), v_child>)``, where f is the
    identity or, with a hidden layer, ``f(x) = x + relu(x w_in) w_out``. ``w_out`` is
    zero at the start, so that a router started from k-means routes like k-means. Such
    nodes are those of JTR (Li et al. 2023, arXiv 2304.11943, section 3).

    Args:
      width: D, width of the embeddings.
      height: H, levels of choices.
      branching: B, children of a node.
      hidden: width of the residual layer; 0 for none.
      scale: start of the inverse temperature ``exp(log_scale)``, which is trained.
      rngs: key of the random start, vectors of about unit length.
    """

    kind = "per_node"

    def __init__(
        self,
        width: int,
        *,
        height: int,
        branching: int,
        hidden: int = 0,
        scale: float = 10.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, height=height, branching=branching, scale=scale)
        if hidden < 0:
            raise ValueError(f"hidden={hidden} must be >= 0; 0 for no residual layer")
        shapes = [(branching**h, branching, width) for h in range(height)]
        self.nodes = nnx.List([_random(rngs, shape, width) for shape in shapes])
        self.log_scale = nnx.Param(jnp.log(jnp.float32(scale)))
        self.w_in = _random(rngs, (width, hidden), width) if hidden else None
        self.w_out = nnx.Param(jnp.zeros((hidden, width))) if hidden else None

    def level_log_probs(self, x: jax.Array) -> list[jax.Array]:
        """Conditionals, H x (N, B^(h-1), B), of embeddings x (N, D)."""
        if self.w_in is not None:
            x = x + _dot(jax.nn.relu(_dot(x, self.w_in[...])), self.w_out[...])
        x = x * jnp.exp(self.log_scale[...])
        logits = [
            jnp.einsum("nd,abd->nab", x, nodes[...], precision=_EXACT)
            for nodes in self.nodes
        ]
        return [jax.nn.log_softmax(level) for level in logits]

    def path_embedding(self, x: jax.Array) -> jax.Array:
        """T(x) (N, B + B^2 + ... + P): the probabilities of all nodes of all levels.

        ``<T(q), T(d)>`` is the expected number of nodes that a path of q and a path of
        d, drawn independently, have in common.
        """
        return jnp.exp(jnp.concatenate(self.node_log_probs(x), -1))

    def start_from(self, nodes: list) -> None:
        """Take over the centroids of `kmeans_tree`: H x (B^(h-1), B, D).

        In place, so never inside jit: it is part of building the model.
        """
        _check_nodes(nodes, [p.shape for p in self.nodes])
        for param, value in zip(self.nodes, nodes, strict=True):
            param[...] = jnp.asarray(value, jnp.float32)


class PerLevelRouter(Router):
    """One classifier a level, which is told the choices made so far; EHI's indexer.

    ``x_h = [onehot(i_1); ...; onehot(i_{h-1}); x]``, ``F_h = x_h + relu(x_h U_h)`` and
    ``p(. | i_1 ... i_{h-1}, x) = softmax_B(F_h W_h)`` (EHI: Kumar et al. 2023, arXiv
    2310.08891, section 3, the tree-structured indexer). With H = 1 that is one residual
    layer and a softmax.

    Args:
      width: D, width of the embeddings.
      height: H, levels of choices.
      branching: B, children of a node.
      hidden: must be 0, as every level has a residual layer already.
      scale: length of the columns of W_h at the start.
      rngs: key of the random start.
    """

    kind = "per_level"

    def __init__(
        self,
        width: int,
        *,
        height: int,
        branching: int,
        hidden: int = 0,
        scale: float = 10.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, height=height, branching=branching, scale=scale)
        if hidden:
            raise ValueError(
                f"hidden={hidden}: every level of a per_level router has a residual "
                "layer; set hidden=0 or kind='per_node'"
            )
        self.scale = scale
        widths = [width + h * branching for h in range(height)]  # of x_h
        # U starts small but not at zero, where relu passes no gradient for ever.
        self.u = nnx.List([_random(rngs, (w, w), 100 * w) for w in widths])
        self.w = nnx.List([_random(rngs, (w, branching), w / scale**2) for w in widths])

    def level_log_probs(self, x: jax.Array) -> list[jax.Array]:
        """Conditionals, H x (N, B^(h-1), B), of embeddings x (N, D).

        The one-hots meet U_h and W_h once a node and x meets them once a row; only
        relu and the last product are left for each (row, node).
        """
        levels = []
        for h, (u, w) in enumerate(zip(self.u, self.w, strict=True)):
            prefix = _prefixes(h, self.branching)  # (B^(h-1), (h-1) B), h from 1
            u_node, u_x = jnp.split(u[...], [prefix.shape[1]])
            w_node, w_x = jnp.split(w[...], [prefix.shape[1]])
            inner = jax.nn.relu(_dot(x, u_x)[:, None] + _dot(prefix, u_node))
            logits = _dot(x, w_x)[:, None] + _dot(prefix, w_node)  # (N, B^(h-1), B)
            levels.append(jax.nn.log_softmax(logits + _dot(inner, w[...])))
        return levels

    def path_embedding(self, x: jax.Array) -> jax.Array:
        """T(x) (N, H B): the conditionals that the top-1 path meets (EHI, section 3).

        The path takes the best child at each level, as a beam of 1 does.
        """
        node, path = jnp.zeros((x.shape[0], 1), jnp.int32), []
        for level in self.level_log_probs(x):  # (N, B^(h-1), B)
            here = jnp.take_along_axis(level, node[:, :, None], 1)[:, 0]  # (N, B)
            path.append(jnp.exp(here))
            node = node * self.branching + here.argmax(-1, keepdims=True)
        return jnp.concatenate(path, -1)

    def start_from(self, nodes: list) -> None:
        """Start level 1 from the centroids of `kmeans_tree`: W_1 = scale nodes[0].

        The levels below keep their random start: one classifier serves all nodes of a
        level, so no centroids of children could stand in it. In place, never in jit.
        """
        _check_nodes(nodes[:1], [(1, self.branching, self.width)])
        self.w[0][...] = self.scale * jnp.asarray(nodes[0][0], jnp.float32).T  # (D, B)


class NearestRouter(Router):
    """The leaf of the nearest centroid; the coarse level of IVF and of Poeem.

    ``p(leaf | x) = softmax_P(-scale |x - c_leaf|^2 / 2)``, so the best leaf is the
    nearest centroid. The centroids are also what residual codes are relative to
    (Poeem: Zhang et al. 2021, arXiv 2105.03933, section 3).

    Args:
      width: D.
      height: must be 1.
      branching: P, centroids.
      hidden: must be 0.
      scale: inverse temperature.
      rngs: key of the random start.
    """

    kind = "nearest"

    def __init__(
        self,
        width: int,
        *,
        height: int,
        branching: int,
        hidden: int = 0,
        scale: float = 10.0,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, height=height, branching=branching, scale=scale)
        if height != 1 or hidden:
            raise ValueError(
                f"a nearest router has one level and no hidden layer, not height="
                f"{height}, hidden={hidden}"
            )
        self.scale = scale
        self.nodes = nnx.List([_random(rngs, (1, branching, width), width)])

    def level_log_probs(self, x: jax.Array) -> list[jax.Array]:
        """[(N, 1, P)] of embeddings x (N, D); |x|^2 is the same for all leaves."""
        centroids = self.nodes[0][...][0]  # (P, D)
        half_norms = 0.5 * jnp.sum(jnp.square(centroids), -1)  # (P,)
        logits = self.scale * (_dot(x, centroids.T) - half_norms)
        return [jax.nn.log_softmax(logits)[:, None]]

    def path_embedding(self, x: jax.Array) -> jax.Array:
        """T(x) (N, P): the probabilities of the leaves."""
        return jnp.exp(self.leaf_log_probs(x))

    def start_from(self, nodes: list) -> None:
        """Take over centroids (1, P, D), in place, so never inside jit."""
        _check_nodes(nodes, [p.shape for p in self.nodes])
        self.nodes[0][...] = jnp.asarray(nodes[0], jnp.float32)


KINDS = {
    "per_node": PerNodeRouter,
    "per_level": PerLevelRouter,
    "nearest": NearestRouter,
}


def make_router(kind: str, width: int, **kwargs) -> Router:
    """The router of a kind, a key of `KINDS`; arguments as of the classes."""
    if kind not in KINDS:
        raise ValueError(f"unknown router kind {kind!r}; allowed: {', '.join(KINDS)}")
    return KINDS[kind](width, **kwargs)


def _prefixes(levels: int, branching: int) -> np.ndarray:
    """The one-hot choices (B^h, h B) that lead to each node after h = ``levels``."""
    node = np.arange(branching**levels)
    digits = [node // branching**j % branching for j in reversed(range(levels))]
    one_hots = [np.eye(branching, dtype=np.float32)[digit] for digit in digits]
    return np.concatenate([np.zeros((len(node), 0), np.float32), *one_hots], 1)


def _dot(a, b) -> jax.Array:
    return jnp.dot(a, b, precision=_EXACT)


def _random(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: float) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape) / fan_in**0.5)


def _check_nodes(nodes: list, shapes: list) -> None:
    got, wanted = [tuple(np.shape(n)) for n in nodes], [tuple(s) for s in shapes]
    if got != wanted:
        raise ValueError(f"the nodes to start from must be {wanted}, got {got}")
