"""Transformer layer of the BERT family.

Shapes beyond the alphabet of `ehi/__init__.py`: A attention heads, H width of the MLP.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from ehi.model.attention import attention
from ehi.model.layer_norm import normed
from ehi.model.recompute import recomputed


def unit_rows(x: jax.Array) -> jax.Array:
    r"""Scale rows to length one; a zero row stays zero and has a finite gradient.

    .. math:: y = x / \max(\|x\|_2, 10^{-12})

    Args:
        x: vectors (..., D).

    Returns:
        float32 array (..., D).
    """
    x = x.astype(jnp.float32)
    # Clamping the square before the root keeps the gradient finite at zero.
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def gelu(x: jax.Array) -> jax.Array:
    r"""Exact gelu as PyTorch computes it.

    .. math:: x \Phi(x) = x (1 + \mathrm{erf}(x / \sqrt 2)) / 2

    `jax.nn.gelu(approximate=False)` goes through erfc, which takes twice as long on a
    CPU for digits in the negative tail that no layer norm can see.
    """
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_vjp
def bfloat16_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x (..., I) @ kernel (I, O) of bfloat16 operands, summed in float32.

    The backward products take bfloat16 operands too: left to itself JAX would carry
    the float32 sums back, and an instruction that multiplies bfloat16 matrices (AMX,
    tensor cores, MXU) would serve the forward pass alone.
    """
    total = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
    return total.astype(jnp.bfloat16)


def _product_forward(x, kernel):
    return bfloat16_product(x, kernel), (x, kernel)


def _product_backward(operands, gradient):
    x, kernel = operands
    rows = gradient.reshape(-1, gradient.shape[-1])
    to_kernel = jnp.matmul(
        x.reshape(-1, x.shape[-1]).T, rows, preferred_element_type=jnp.float32
    )
    return bfloat16_product(gradient, kernel.T), to_kernel.astype(jnp.bfloat16)


bfloat16_product.defvjp(_product_forward, _product_backward)


def _dot_general(x, kernel, dimension_numbers, precision=None, out_sharding=None):
    """What nnx.Linear calls: it contracts the last axis of x (..., I) with the first.

    Rows are made one axis first: of a product with two, the gradient of the kernel sums
    over both, and a CPU then copies its operands, 2.6 times as long as the product.
    """
    if x.dtype == jnp.bfloat16:
        return bfloat16_product(x, kernel)
    product = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())),
        precision=precision, out_sharding=out_sharding,
    )  # fmt: skip
    return product.reshape(*x.shape[:-1], -1)


def recomputed_layer(layer: nnx.Module, x: jax.Array, bias: jax.Array) -> jax.Array:
    """layer(x, bias), of which nothing but x is kept for the backward pass.

    That runs the layer again: a third more time for memory that no longer grows with
    the width of the MLP and the square of the length, times layers.
    """
    graphdef, params = nnx.split(layer)

    def call(x, params, bias):
        return nnx.merge(graphdef, params)(x, bias)

    return recomputed(call, x, params, bias)


class Projection(nnx.Module):
    r"""What the dense retrievers ANCE and STAR have on top of RoBERTa.

    .. math:: y = \mathrm{norm}(x W + b)

    Args:
        width: T.
        dtype: of the matrix product; the layer norm stays float32.
        rngs: source of the random start.

    Source: Xiong et al. 2020, arXiv:2007.00808; Zhan et al. 2021, arXiv:2104.08051.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear = nnx.Linear(
            width, width, dtype=dtype, dot_general=_dot_general, rngs=rngs
        )
        # PyTorch's default, whatever the layers below have.
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map pooled vectors x (..., T) to float32 (..., T)."""
        return self.norm(self.linear(x))


class TransformerLayer(nnx.Module):
    """Post-norm transformer layer: self-attention, then a gelu MLP.

    Args:
        width: T, a multiple of `num_heads`.
        num_heads: A.
        mlp_width: hidden width of the MLP.
        norm_eps: added to the variance in both layer norms.
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
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.dtype = dtype

        def linear(num_in: int, num_out: int):
            return nnx.Linear(
                num_in, num_out, dtype=dtype, dot_general=_dot_general, rngs=rngs
            )

        def norm():
            return nnx.LayerNorm(width, epsilon=norm_eps, dtype=dtype, rngs=rngs)

        # One product for queries, keys and values: fewer, larger GEMMs.
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)
        self.attention_norm = norm()
        self.mlp_in = linear(width, mlp_width)
        self.mlp_out = linear(mlp_width, width)
        self.mlp_norm = norm()

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """Transform token vectors x (N, L, T); logits get `bias` (N, 1, 1, L) added."""
        # XLA:CPU computes twice what is used in two shapes, so all is rows of tokens.
        rows = x.reshape(-1, x.shape[-1])  # (N L, T)
        mixed = attention(self.qkv(rows), bias, self.num_heads)
        rows = normed(self.attention_norm, rows + self.out(mixed))
        rows = normed(self.mlp_norm, rows + self.shrink(self.mlp_in(rows)))
        return rows.reshape(x.shape)

    def shrink(self, hidden: jax.Array) -> jax.Array:
        """Second half of the MLP: hidden (N L, H), which is kept -> (N L, T)."""
        graphdef, params = nnx.split(self.mlp_out)

        def call(hidden, params):
            return nnx.merge(graphdef, params)(gelu(hidden))

        return recomputed(call, hidden, params)
