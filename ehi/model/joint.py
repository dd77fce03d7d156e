"""Encoder + tree + leaves: the only place where the three meet."""

import jax
import jax.numpy as jnp
from flax import nnx

from ehi.model.encoder import Head, TextEncoder
from ehi.model.pq import ProductQuantiser, Rotation
from ehi.model.tree import assign, make_router

# The groups of parameters, in flow order: each may have its own learning rate.
GROUPS = (
    "tower",
    "head",
    "query_head",
    "router",
    "query_router",
    "leaf_centroids",
    "rotation",
    "quantiser",
)


class JointIndex(nnx.Module):
    """A differentiable index: text (or tower output) -> embedding -> leaf -> code.

    ``q = head(tower(query))``, ``d = head(tower(document))``; a document lives in leaf
    ``l(d) = argmax p(leaf | d)`` and is stored there as
    ``d_hat = c_l + R decode(encode(R' (d - c_l)))``. Every part but the head may be
    absent: without a router there is one leaf, without a quantiser ``d_hat = d``.

    Args:
      tower_width: T, width of the tower's output.
      width: D, width of an embedding.
      head_hidden: width of the head's hidden layer; 0 for a linear head.
      query_head: give queries a head of their own.
      tower: the text encoder, or None when its outputs are cached and fed instead.
      tree: arguments of ``make_router`` (``kind, height, branching, hidden``) plus
        ``query_router``, whether queries have a router of their own (which then has
        the hidden layer); None for no tree.
      num_subspaces: M; 0 for raw leaves.
      num_codewords: K, 16 or 256.
      rotation: 'none', 'fixed' (the start stays) or 'learned' (start times Cayley).
      residual: quantise the difference to a learned centroid of the leaf.
    """

    def __init__(
        self,
        *,
        tower_width: int,
        width: int,
        head_hidden: int,
        query_head: bool = False,
        tower: TextEncoder | None = None,
        tree: dict | None = None,
        num_subspaces: int = 0,
        num_codewords: int = 256,
        rotation: str = "none",
        residual: bool = False,
        rngs: nnx.Rngs,
    ):
        _check_leaves(tree, num_subspaces, rotation, residual)
        self.tower = tower
        self.head = Head(tower_width, width, hidden=head_hidden, rngs=rngs)
        self.query_head = (
            Head(tower_width, width, hidden=head_hidden, rngs=rngs)
            if query_head
            else None
        )
        self.router, self.query_router = _routers(tree, width, rngs)
        self.leaf_centroids = (
            nnx.Param(jnp.zeros((self.router.num_leaves, width)))  # (P, D)
            if residual
            else None
        )
        self.rotation = (
            Rotation(width, learned=rotation == "learned", rngs=rngs)
            if rotation != "none"
            else None
        )
        self.quantiser = (
            ProductQuantiser(
                width,
                num_subspaces=num_subspaces,
                num_codewords=num_codewords,
                rngs=rngs,
            )
            if num_subspaces
            else None
        )

    def features(self, inputs, chunk: int = 0) -> jax.Array:
        """Tower outputs: ``inputs`` itself if cached (N, T), else of (ids, mask)."""
        if not isinstance(inputs, tuple):
            return inputs
        if not chunk or inputs[0].shape[0] <= chunk:
            return self.tower(*inputs)
        return _in_chunks(self.tower, inputs, chunk)

    def embed_queries(self, inputs, chunk: int = 0) -> jax.Array:
        """Unit embeddings (N, D) of queries."""
        head = self.query_head or self.head
        return head(self.features(inputs, chunk))

    def embed_documents(self, inputs, chunk: int = 0) -> jax.Array:
        """Unit embeddings (N, D) of documents."""
        return self.head(self.features(inputs, chunk))

    def route_queries(self, q: jax.Array) -> jax.Array:
        """log p(leaf | query) (N, P)."""
        return (self.query_router or self.router).leaf_log_probs(q)

    def route_documents(self, d: jax.Array) -> jax.Array:
        """log p(leaf | document) (N, P)."""
        return self.router.leaf_log_probs(d)

    def quantise(self, d: jax.Array, log_p: jax.Array | None = None):
        """Straight-through reconstruction of documents.

        Args:
          d: embeddings (N, D).
          log_p: log p(leaf | d) (N, P); needed with residual codes.

        Returns:
          d_hat (N, D), whose gradient reaches the embeddings, the chosen codewords,
          the rotation and the leaf centroids; z and z_hat (N, D), what was quantised
          and its plain reconstruction, both rotated; codes (N, M).
        """
        centroids = 0.0
        if self.leaf_centroids is not None:
            leaves = assign(jax.lax.stop_gradient(log_p))[:, 0]  # (N,)
            centroids = self.leaf_centroids[...][leaves]  # (N, D)
        z = d - centroids
        rotation = None if self.rotation is None else self.rotation.matrix()  # (D, D)
        if rotation is not None:
            z = z @ rotation
        through, codes = self.quantiser.straight_through(z)
        d_hat = through if rotation is None else through @ rotation.T
        z_hat = self.quantiser.decode(codes)
        return d_hat + centroids, z, z_hat, codes


def _routers(tree: dict | None, width: int, rngs: nnx.Rngs):
    """The documents' router, and the queries' own where they have one."""
    if tree is None:
        return None, None
    tree = dict(tree)
    own, hidden = tree.pop("query_router", False), tree.pop("hidden", 0)

    def router(hidden):
        return make_router(width=width, hidden=hidden, rngs=rngs, **tree)

    return (router(0), router(hidden)) if own else (router(hidden), None)


def _check_leaves(tree, num_subspaces, rotation, residual) -> None:
    if rotation not in ("none", "fixed", "learned"):
        raise ValueError(
            f"rotation={rotation!r} is unknown; allowed: 'none', 'fixed', 'learned'"
        )
    if residual and tree is None:
        raise ValueError("residual codes need a tree: residual=True but tree=None")
    if residual and not num_subspaces:
        raise ValueError("residual=True needs PQ leaves, but num_subspaces=0")


def _in_chunks(tower, inputs, chunk: int) -> jax.Array:
    """Encode ``chunk`` rows at a time, recomputing activations in the backward pass.

    The exact gradient with the memory of one chunk (gradient caching; Gao et al. 2021,
    arXiv 2101.06983): between the two passes only the embeddings are kept.
    """
    rows = inputs[0].shape[0]
    if rows % chunk:
        raise ValueError(f"chunk={chunk} does not divide the {rows} rows of the batch")
    chunks = jax.tree.map(
        lambda x: x.reshape(rows // chunk, chunk, *x.shape[1:]), inputs
    )
    encode = jax.checkpoint(lambda x: tower(*x))
    return jax.lax.map(encode, chunks).reshape(rows, -1)


def split_model(model: JointIndex):
    """A module as (graphdef, {'group/.../name': array}).

    The flat dictionary is what the optimiser, the checkpoint and the index exporter
    see: a group is the part of a name before the first slash.
    """
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, _flatten(nnx.to_pure_dict(state))


def merge_model(graphdef, params: dict[str, jax.Array]) -> JointIndex:
    """The inverse of `split_model`; inside jit it costs nothing at run time."""
    nested: dict = {}
    for name, value in params.items():
        *path, last = (int(p) if p.isdigit() else p for p in name.split("/"))
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return nnx.merge(graphdef, nested)


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
