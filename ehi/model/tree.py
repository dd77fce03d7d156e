"""The tree of soft routing nodes: embedding -> distribution over the leaves.

The children ``i_1 ... i_H`` of a path lead to leaf ``i_1 B^(H-1) + ... + i_H``: level 1
is the most significant digit, and the nodes of a level are numbered in leaf order.

`Router` turns the conditional probabilities of the levels into those of the leaves. Its
three subclasses say how a node chooses among its children: `PerNodeRouter` (the
default), `PerLevelRouter` (EHI) and `NearestRouter` (inverted lists, Poeem).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# The NumPy index repeats these discrete choices, so the products behind them must not
# be rounded to TF32 or bfloat16 on an accelerator.
_EXACT = jax.lax.Precision.HIGHEST


class Router(nnx.Module):
    """Probabilities of nodes and leaves, from those of the children of each node.

    Attributes:
      kind: name of the class in `KINDS`.
      takes_hidden: whether ``hidden`` may exceed 0.
      queries_may_differ: whether queries may have a router of their own.
      kmeans: the fit that `start_from` expects: 'tree' (hierarchical spherical k-means)
        or 'lists' (plain k-means of P centroids).
    """

    kind: str
    takes_hidden = False
    queries_may_differ = True
    kmeans = "tree"

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
        self._add_parameters(hidden, scale, rngs)

    def _add_parameters(self, hidden: int, scale: float, rngs: nnx.Rngs) -> None:
        """Make the parameters; refuse a shape or a layer that the router cannot have.

        `width`, `height`, `branching` and `num_leaves` are set already.
        """
        raise NotImplementedError

    def level_log_probs(self, x: jax.Array) -> list[jax.Array]:
        """The array log p(child | node, x), (N, B^(h-1), B), of each level h = 1..H.

        Args:
          x: embeddings (N, D).
        """
        raise NotImplementedError

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

    def path_embedding(self, x: jax.Array) -> jax.Array:
        """T(x): where x goes in the tree, as a vector to compare with others."""
        raise NotImplementedError

    def centroids(self) -> jax.Array | None:
        """The leaves' centroids (P, D) if these are what routes, else None."""
        return None

    def start_from(self, nodes: list) -> None:
        """Start from the centroids of a k-means fit, a (B^(h-1), B, D) for each level.

        This changes the parameters in place, so it is part of building the model and
        never of a jitted step.
        """
        raise NotImplementedError

    def to_arrays(self) -> dict:
        """The router as the dictionary of NumPy arrays that an index stores."""
        raise NotImplementedError


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
    takes_hidden = True

    def _add_parameters(self, hidden: int, scale: float, rngs: nnx.Rngs) -> None:
        if hidden < 0:
            raise ValueError(f"hidden={hidden} must be >= 0; 0 for no residual layer")
        width, branching = self.width, self.branching
        shapes = [(branching**h, branching, width) for h in range(self.height)]
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
        """Take over the centroids of all levels."""
        _check_nodes(nodes, [p.shape for p in self.nodes])
        for param, value in zip(self.nodes, nodes, strict=True):
            param[...] = jnp.asarray(value, jnp.float32)

    def to_arrays(self) -> dict:
        """Kind, nodes, scale and, with a hidden layer, w_in and w_out."""
        tree = {
            "kind": self.kind,
            "nodes": _numpy(self.nodes),
            "scale": float(jnp.exp(self.log_scale[...])),
        }
        if self.w_in is not None:
            tree["w_in"], tree["w_out"] = _numpy((self.w_in, self.w_out))
        return tree


class PerLevelRouter(Router):
    """One classifier for each level, which is told the choices made so far (EHI).

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

    def _add_parameters(self, hidden: int, scale: float, rngs: nnx.Rngs) -> None:
        if hidden:
            raise ValueError(
                f"hidden={hidden}: every level of a per_level router has a residual "
                "layer; set hidden=0 or kind='per_node'"
            )
        self.scale, width, branching = scale, self.width, self.branching
        widths = [width + h * branching for h in range(self.height)]  # width of x_h
        # U starts small but not at zero, where relu would never pass a gradient.
        self.u = nnx.List([_random(rngs, (w, w), 100 * w) for w in widths])
        self.w = nnx.List([_random(rngs, (w, branching), w / scale**2) for w in widths])

    def level_log_probs(self, x: jax.Array) -> list[jax.Array]:
        """Conditionals, H x (N, B^(h-1), B), of embeddings x (N, D).

        The one-hots are multiplied by U_h and W_h once for each node and x once for
        each row; only relu and the last product run for each (row, node).
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
        """Start level 1 from its centroids: W_1 = scale nodes[0].

        The levels below keep their random start: one classifier serves all nodes of a
        level, so it cannot hold the centroids of each node's children.
        """
        _check_nodes(nodes[:1], [(1, self.branching, self.width)])
        self.w[0][...] = self.scale * jnp.asarray(nodes[0][0], jnp.float32).T  # (D, B)

    def to_arrays(self) -> dict:
        """Kind, u and w."""
        return {"kind": self.kind, "u": _numpy(self.u), "w": _numpy(self.w)}


class NearestRouter(Router):
    """The leaf of the nearest centroid; the coarse level of IVF and of Poeem.

    ``p(leaf | x) = softmax_P(-scale |x - c_leaf|^2 / 2)``, so the best leaf is the
    nearest centroid. Residual codes are relative to the same centroids (Poeem: Zhang et
    al. 2021, arXiv 2105.03933, section 3).

    Args:
      width: D.
      height: must be 1.
      branching: P, centroids.
      hidden: must be 0.
      scale: inverse temperature.
      rngs: key of the random start.
    """

    kind = "nearest"
    queries_may_differ = False
    kmeans = "lists"

    def _add_parameters(self, hidden: int, scale: float, rngs: nnx.Rngs) -> None:
        if self.height != 1 or hidden:
            raise ValueError(
                f"a nearest router has one level and no hidden layer, not height="
                f"{self.height}, hidden={hidden}"
            )
        self.scale, shape = scale, (1, self.branching, self.width)
        self.nodes = nnx.List([_random(rngs, shape, self.width)])

    def level_log_probs(self, x: jax.Array) -> list[jax.Array]:
        """[(N, 1, P)] of embeddings x (N, D); |x|^2 is the same for all leaves."""
        centroids = self.centroids()
        half_norms = 0.5 * jnp.sum(jnp.square(centroids), -1)  # (P,)
        logits = self.scale * (_dot(x, centroids.T) - half_norms)
        return [jax.nn.log_softmax(logits)[:, None]]

    def path_embedding(self, x: jax.Array) -> jax.Array:
        """T(x) (N, P): the probabilities of the leaves."""
        return jnp.exp(self.leaf_log_probs(x))

    def centroids(self) -> jax.Array:
        """The centroids (P, D)."""
        return self.nodes[0][...][0]

    def start_from(self, nodes: list) -> None:
        """Take over the centroids of the only level (1, P, D)."""
        _check_nodes(nodes, [p.shape for p in self.nodes])
        self.nodes[0][...] = jnp.asarray(nodes[0], jnp.float32)

    def to_arrays(self) -> dict:
        """The arrays of a per_node tree whose logits have a bias, -|c|^2 / 2."""
        (centroids,) = _numpy(self.nodes)  # (1, P, D)
        biases = -0.5 * np.sum(centroids**2, axis=-1)  # (1, P)
        return {
            "kind": PerNodeRouter.kind,
            "nodes": [centroids],
            "biases": [biases],
            "scale": float(self.scale),
        }


KINDS = {
    router.kind: router for router in (PerNodeRouter, PerLevelRouter, NearestRouter)
}


def router_class(kind: str) -> type[Router]:
    """The class of a kind, a key of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"unknown router kind {kind!r}; allowed: {', '.join(KINDS)}")
    return KINDS[kind]


def make_router(kind: str, width: int, **kwargs) -> Router:
    """The router of a kind; further arguments as of its class."""
    return router_class(kind)(width, **kwargs)


def assign(leaf_log_probs: jax.Array) -> jax.Array:
    """The best leaf (N,) int32 of (N, P) log-probabilities.

    Among equally probable leaves it is the smallest number, as in the NumPy index.
    """
    return jax.lax.top_k(leaf_log_probs, 1)[1][:, 0].astype(jnp.int32)


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


def _numpy(params) -> list[np.ndarray]:
    return [np.asarray(param[...]) for param in params]


def _check_nodes(nodes: list, shapes: list) -> None:
    got, wanted = [tuple(np.shape(n)) for n in nodes], [tuple(s) for s in shapes]
    if got != wanted:
        raise ValueError(f"the nodes to start from must be {wanted}, got {got}")
