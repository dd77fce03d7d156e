"""The whole model: encoder, tree and leaves in one module."""

import jax
import jax.numpy as jnp
from flax import nnx

from ehi.model.head import Head
from ehi.model.pq import ProductQuantiser
from ehi.model.rotation import make_rotation
from ehi.model.score import check_score
from ehi.model.sinkhorn import balanced_codes
from ehi.model.tower import Tower
from ehi.model.tree import assign, make_router

# The groups of parameters, in flow order: each may have its own learning rate.
GROUPS = (
    "tower",
    "query_tower",
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

    ``q = head(tower(query))``, ``d = head(tower(document))``. A document belongs to the
    leaf ``l = argmax p(leaf | d)``, which stores it as
    ``d_hat = c_l + R decode(encode(R' (d - c_l)))``. Only the head is required: without
    a router there is one leaf, without a quantiser ``d_hat = d``.

    Args:
      tower_width: T, width of the tower's output.
      width: D, width of an embedding.
      head_hidden: width of the head's hidden layer; 0 for a linear head.
      query_head: whether queries have their own head.
      tower: the text encoder, or None if the inputs are its cached outputs.
      query_tower: a separate text encoder of queries, for methods that freeze that of
        the documents (JPQ), or None if one encoder serves both.
      tree: arguments of ``make_router`` (``kind, height, branching, hidden``) plus
        ``query_router``, whether queries have their own router (then only that has the
        hidden layer); None for no tree.
      num_subspaces: M; 0 for raw leaves.
      num_codewords: K, 16 or 256.
      rotation: 'none', 'fixed' (never trained), 'learned' (start times Cayley) or
        'givens' (updated by `ehi.train.givens`).
      residual: quantise the difference to a learned centroid of the leaf; a router that
        has centroids of its leaves (`Router.centroids`) shares them.
      frozen_codes: whether documents keep their first codes; see `ProductQuantiser`.
      codeword_gradient: whether ranking losses reach the codewords.
      score: of quantised documents, of `ehi.index.search.codes.SCORES`; 'ip' for raw
        leaves, whose vectors are exact.
    """

    def __init__(
        self,
        *,
        tower_width: int,
        width: int,
        head_hidden: int,
        query_head: bool = False,
        tower: Tower | None = None,
        query_tower: Tower | None = None,
        tree: dict | None = None,
        num_subspaces: int = 0,
        num_codewords: int = 256,
        rotation: str = "none",
        residual: bool = False,
        frozen_codes: bool = False,
        codeword_gradient: bool = True,
        score: str = "ip",
        rngs: nnx.Rngs,
    ):
        _check_score(score, num_subspaces)
        _check_residual(residual, tree, num_subspaces)
        self.residual, self.codeword_gradient = residual, codeword_gradient
        self.score = score
        self.tower, self.query_tower = tower, query_tower
        self.head = Head(tower_width, width, hidden=head_hidden, rngs=rngs)
        self.query_head = (
            Head(tower_width, width, hidden=head_hidden, rngs=rngs)
            if query_head
            else None
        )
        self.router, self.query_router = _routers(tree, width, rngs)
        tied = self.router is not None and self.router.centroids() is not None
        self.leaf_centroids = (
            nnx.Param(jnp.zeros((self.router.num_leaves, width)))  # (P, D)
            if residual and not tied
            else None
        )
        self.rotation = make_rotation(rotation, width)
        self.quantiser = (
            ProductQuantiser(
                width,
                num_subspaces=num_subspaces,
                num_codewords=num_codewords,
                frozen_codes=frozen_codes,
                rngs=rngs,
            )
            if num_subspaces
            else None
        )

    def encode_queries(self, inputs, chunk: int = 0) -> jax.Array:
        """Tower outputs (N, T) of queries, given as (ids, mask) or cached."""
        return _features(self.query_tower or self.tower, inputs, chunk)

    def encode_documents(self, inputs, chunk: int = 0) -> jax.Array:
        """Tower outputs (N, T) of documents, given as (ids, mask) or cached."""
        return _features(self.tower, inputs, chunk)

    def embed_queries(self, inputs, chunk: int = 0) -> jax.Array:
        """Unit embeddings (N, D) of queries."""
        return (self.query_head or self.head)(self.encode_queries(inputs, chunk))

    def embed_documents(self, inputs, chunk: int = 0) -> jax.Array:
        """Unit embeddings (N, D) of documents."""
        return self.head(self.encode_documents(inputs, chunk))

    def route_queries(self, q: jax.Array) -> jax.Array:
        """log p(leaf | query) (N, P)."""
        return (self.query_router or self.router).leaf_log_probs(q)

    def route_documents(self, d: jax.Array) -> jax.Array:
        """log p(leaf | document) (N, P)."""
        return self.router.leaf_log_probs(d)

    def centroids(self) -> jax.Array | None:
        """Centroids of the leaves (P, D) that codes are residual to, or None."""
        if not self.residual:
            return None
        tied = self.leaf_centroids is None
        return self.router.centroids() if tied else self.leaf_centroids[...]

    def rotate(self, d: jax.Array, log_p: jax.Array | None = None):
        """The vectors of documents that are quantised: rotated residuals.

        Args:
          d: embeddings (N, D).
          log_p: log p(leaf | d) (N, P); needed with residual codes.

        Returns:
          z (N, D) with ``z = (d - c) R``; c (N, D), or 0 without residual codes; R
          (D, D), or None without a rotation.
        """
        centroids, c = self.centroids(), 0.0
        if centroids is not None:
            c = centroids[assign(jax.lax.stop_gradient(log_p))]  # (N, D)
        rotation = None if self.rotation is None else self.rotation.matrix()  # (D, D)
        z = d - c
        return (z if rotation is None else z @ rotation), c, rotation

    def quantise(self, d: jax.Array, log_p: jax.Array | None = None, balance=None):
        """Straight-through reconstruction of documents.

        Args:
          d: embeddings (N, D).
          log_p: log p(leaf | d) (N, P); needed with residual codes.
          balance: keyword arguments of `balanced_codes`, to spread the documents evenly
            over the codewords; None to choose the nearest codewords.

        Returns:
          d_hat: (N, D), whose gradient reaches the embeddings, the chosen codewords,
            the rotation and the leaf centroids.
          z: (N, D), the rotated vectors that were quantised.
          z_hat: (N, D), their reconstruction, without a gradient to d.
          d_plain: (N, D), z_hat rotated back: what the index will store.
          codes: (N, M).
        """
        z, c, rotation = self.rotate(d, log_p)
        if balance is None:
            codes = self.quantiser.encode(z)
        else:
            codes = balanced_codes(self.quantiser.codebooks[...], z, **balance)
        through = self.quantiser.straight_through(
            z, codes, codeword_gradient=self.codeword_gradient
        )
        z_hat = self.quantiser.decode(codes)

        def back(z_hat):
            return (z_hat if rotation is None else z_hat @ rotation.T) + c

        return back(through), z, z_hat, back(z_hat), codes


def _routers(tree: dict | None, width: int, rngs: nnx.Rngs):
    """The router of documents, and that of queries if they have their own."""
    if tree is None:
        return None, None
    tree = dict(tree)
    own, hidden = tree.pop("query_router", False), tree.pop("hidden", 0)

    def router(hidden):
        return make_router(width=width, hidden=hidden, rngs=rngs, **tree)

    return (router(0), router(hidden)) if own else (router(hidden), None)


def _check_residual(residual: bool, tree: dict | None, num_subspaces: int) -> None:
    if residual and tree is None:
        raise ValueError("residual codes need a tree: residual=True but tree=None")
    if residual and not num_subspaces:
        raise ValueError("residual=True needs PQ leaves, but num_subspaces=0")


def _check_score(score: str, num_subspaces: int) -> None:
    check_score(score)
    if score != "ip" and not num_subspaces:
        raise ValueError(
            f"score={score!r} needs PQ leaves, but num_subspaces=0: raw vectors are "
            "exact, so their score is 'ip'"
        )


def _features(tower, inputs, chunk: int) -> jax.Array:
    """Tower outputs (N, T): ``inputs`` itself, or the tower's of (ids, mask)."""
    if not isinstance(inputs, tuple):
        return inputs
    if not chunk or inputs[0].shape[0] <= chunk:
        return tower(*inputs)
    return _in_chunks(tower, inputs, chunk)


def _in_chunks(tower, inputs, chunk: int) -> jax.Array:
    """Encode ``chunk`` rows at a time, and again in the backward pass.

    The gradient is exact and takes the memory of one chunk, since only the embeddings
    are kept between the passes (gradient caching; Gao et al. 2021, arXiv 2101.06983).
    """
    rows = inputs[0].shape[0]
    if rows % chunk:
        raise ValueError(f"chunk={chunk} does not divide the {rows} rows of the batch")
    chunks = jax.tree.map(
        lambda x: x.reshape(rows // chunk, chunk, *x.shape[1:]), inputs
    )
    encode = jax.checkpoint(lambda x: tower(*x))
    return jax.lax.map(encode, chunks).reshape(rows, -1)
