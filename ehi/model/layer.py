"""A transformer layer of a tower: self-attention, then an MLP, by its `Options`.

Shapes beyond the alphabet of `ehi/__init__.py`: A attention heads, K heads of keys and
values, F width of a head, H width of the MLP.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ehi.index.text.architectures import Options
from ehi.model.tower_ops import (
    attention,
    gelu,
    linear_product,
    normed,
    recomputed,
    rotated,
)


class TransformerLayer(nnx.Module):
    """Transformer layer: self-attention, then an MLP, as its options say.

    Args:
        width: T.
        num_heads: A.
        mlp_width: H, hidden width of the MLP.
        norm_eps: added to the variance in both norms.
        options: see `Options`.
        first_norm: whether there is a norm before the attention, if `pre_norm`.
        dtype: of the matrix products; parameters and softmax stay float32.
        rngs: source of the random start.

    Source: Vaswani et al. 2017, arXiv:1706.03762, sections 3.1-3.3.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        mlp_width: int,
        norm_eps: float,
        options: Options,
        first_norm: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.options = options
        self.dtype = dtype
        self.head_width = head = options.head_width or width // num_heads
        self.kv_heads = options.kv_heads or num_heads

        def linear(num_in: int, num_out: int, bias: bool):
            return nnx.Linear(
                num_in, num_out, use_bias=bias, dtype=dtype,
                dot_general=linear_product, rngs=rngs,
            )  # fmt: skip

        def norm(size: int = width):
            return norm_of(options, size, epsilon=norm_eps, dtype=dtype, rngs=rngs)

        gated = options.mlp != "gelu"
        # One product for queries, keys and values: fewer and larger products.
        heads = num_heads + 2 * self.kv_heads
        self.qkv = linear(width, heads * head, options.attention_bias)
        self.out = linear(num_heads * head, width, options.attention_bias)
        self.attention_norm = norm() if first_norm else None
        self.mlp_in = linear(width, (1 + gated) * mlp_width, options.mlp_bias)
        self.mlp_out = linear(mlp_width, width, options.mlp_bias)
        self.mlp_norm = norm()
        self.query_norm = norm(head) if options.head_norm else None
        self.key_norm = norm(head) if options.head_norm else None

    def __call__(self, x: jax.Array, bias: jax.Array, angles=None, relative=None):
        """Transform token vectors x (N, L, T).

        Args:
            x: token vectors.
            bias: added to the logits, (N, 1, 1 or L, L).
            angles: cosines and sines as `rotated` takes them, or None.
            relative: as of `attention`.
        """
        # Every array has one row per token: XLA:CPU computes an array twice if it is
        # used in two shapes.
        rows = x.reshape(-1, x.shape[-1])  # (N L, T)

        def mix(rows):
            qkv = self.heads(self.qkv(rows), angles)
            return self.out(attention(qkv, bias, self.num_heads, relative))

        if self.options.pre_norm:
            first = self.attention_norm
            rows = rows + mix(rows if first is None else normed(first, rows))
            rows = rows + self.shrink(self.mlp_in(normed(self.mlp_norm, rows)))
        else:
            rows = normed(self.attention_norm, rows + mix(rows))
            rows = normed(self.mlp_norm, rows + self.shrink(self.mlp_in(rows)))
        return rows.reshape(x.shape)

    def heads(self, qkv: jax.Array, angles) -> jax.Array:
        """Rows (N L, (A + 2 K) F) to (N L, 3 A F): normed, rotated, and K repeated."""
        groups = self.num_heads // self.kv_heads
        if angles is None and groups == 1 and self.query_norm is None:
            return qkv
        by_head = qkv.reshape(len(qkv), -1, self.head_width)
        ends = self.num_heads, self.num_heads + self.kv_heads
        query, key, value = jnp.split(by_head, ends, axis=1)  # (N L, A or K, F)
        if self.query_norm is not None:
            query, key = normed(self.query_norm, query), normed(self.key_norm, key)
        if angles is not None:
            query, key = rotated(query, angles), rotated(key, angles)
        if groups > 1:
            key, value = (jnp.repeat(part, groups, axis=1) for part in (key, value))
        return jnp.concatenate([query, key, value], axis=1).reshape(len(qkv), -1)

    def shrink(self, hidden: jax.Array) -> jax.Array:
        """Second half of the MLP, (N L, H) -> (N L, T); keeps only `hidden`."""
        graphdef, params = nnx.split(self.mlp_out)

        mlp = self.options.mlp

        def call(hidden, params):
            return nnx.merge(graphdef, params)(activated(hidden, mlp))

        return recomputed(call, hidden, params)


def norm_of(options: Options, width: int, **settings) -> nnx.Module:
    """A norm of the kind that the options name."""
    if options.rms:
        return nnx.RMSNorm(width, **settings)
    return nnx.LayerNorm(width, use_bias=options.norm_bias, **settings)


def activated(hidden: jax.Array, mlp: str) -> jax.Array:
    """What the second half of an MLP multiplies: (..., H or 2 H) -> (..., H)."""
    if mlp == "gelu":
        return gelu(hidden)
    gate, value = jnp.split(hidden, 2, axis=-1)
    return (gelu(gate) if mlp == "geglu" else jax.nn.silu(gate)) * value


def recomputed_layer(layer: nnx.Module, x: jax.Array, *context) -> jax.Array:
    """layer(x, *context) that keeps only x for the backward pass, which runs it again.

    It takes a third more time. The memory of a layer no longer grows with the width of
    the MLP and the square of the length.
    """
    graphdef, params = nnx.split(layer)

    def call(x, params, *context):
        return nnx.merge(graphdef, params)(x, *context)

    return recomputed(call, x, params, *context)
