"""Operations of the tower whose backward passes are chosen for speed and memory.

Attention and layer norm have their backward pass written out, `recomputed` runs any
function again in the backward pass, and `linear_product` is the product in all linear
layers.

Shapes beyond the alphabet of `ehi/__init__.py`: A attention heads, F = T/A their width.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention(
    qkv: jax.Array,
    bias: jax.Array,
    num_heads: int,
    relative: jax.Array | None = None,
) -> jax.Array:
    r"""Multi-head attention that keeps no L x L weights for the backward pass.

    .. math::
        P = \mathrm{softmax}(Q K^\top / \sqrt F + B + R), \quad O = P V

        dV = P^\top dO, \quad dP = dO\, V^\top, \quad
        dS = P \circ (dP - \mathrm{rowsum}(P \circ dP)), \quad
        dQ = dS\, K / \sqrt F, \quad dK = dS^\top Q / \sqrt F

    Args:
        qkv: rows (N L, 3 A F) of queries, keys and values, float32 or bfloat16.
        bias: float32 (N, 1, 1 or L, L); a constant, it gets no gradient.
        num_heads: A.
        relative: R, float32 (A, L, L) of queries and keys, added to the logits of all
            rows; its gradient is the sum of dS over them. None for zero.

    Returns:
        rows (N L, A F) of the type of `qkv`.

    Source: Vaswani et al. 2017, arXiv:1706.03762; the backward pass computes P again as
    in Dao et al. 2022, arXiv:2205.14135.
    """
    return _attention_forward(qkv, bias, num_heads, relative)[0]


def _attention_forward(qkv, bias, num_heads, relative=None):
    by_token = _by_token(qkv, bias, num_heads)
    # Heads before tokens in memory: the batched products then run on plain matrices,
    # twice as fast on a CPU as on strided ones.
    query, key, value = jnp.transpose(by_token, (2, 0, 3, 1, 4))  # (N, A, L, F) each
    weights, total = _weights(query, key, bias, relative)
    # Dividing after the product divides F numbers for each token instead of L.
    mixed = _product("naqk,nakf->naqf", weights.astype(qkv.dtype), value) / total
    mixed = jnp.transpose(mixed, (0, 2, 1, 3)).astype(qkv.dtype)  # (N, L, A, F)
    return mixed.reshape(len(qkv), -1), (qkv, bias, relative)


def _attention_backward(num_heads, kept, gradient):
    qkv, bias, relative = kept
    by_token = _by_token(after(qkv, gradient), bias, num_heads)
    query, key, value = jnp.transpose(by_token, (2, 0, 3, 1, 4))  # (N, A, L, F) each
    weights, total = _weights(query, key, bias, relative)  # (N, A, L, L), (N, A, L, 1)
    # P is weights / total. The gradient is divided instead: it has fewer numbers.
    gradient = gradient.reshape(by_token.shape[:2] + by_token.shape[3:])
    across = jnp.transpose(gradient, (0, 2, 3, 1)) / jnp.swapaxes(total, 2, 3)
    gradient = jnp.transpose(gradient, (0, 2, 1, 3)) / total  # (N, A, L, F)
    across, gradient = across.astype(qkv.dtype), gradient.astype(qkv.dtype)
    # Sums over queries transpose the small operand, not the L x L one: 6.5 ms instead
    # of 7.2 on a core for 32 texts of 128 tokens and 12 heads.
    to_value = _product("nafq,naqk->nafk", across, weights.astype(qkv.dtype))
    to_weights = _product("naqf,nakf->naqk", gradient, value)
    shared = jnp.sum(weights * to_weights, axis=-1, keepdims=True) / total
    to_logits = weights * (to_weights - shared)
    to_relative = None if relative is None else jnp.sum(to_logits, axis=0)
    to_logits = to_logits.astype(qkv.dtype)
    scale = query.shape[-1] ** -0.5
    to_query = scale * _product("naqk,nakf->naqf", to_logits, key)
    across = jnp.transpose(by_token, (2, 0, 3, 4, 1))[0]  # (N, A, F, L)
    to_key = scale * _product("nafq,naqk->nafk", across, to_logits)
    to_qkv = (
        jnp.transpose(to_query, (0, 2, 1, 3)),
        jnp.transpose(to_key, (0, 3, 1, 2)),
        jnp.transpose(to_value, (0, 3, 1, 2)),
    )  # (N, L, A, F) each
    rows = [part.reshape(len(qkv), -1) for part in to_qkv]
    return jnp.concatenate(rows, axis=1).astype(qkv.dtype), None, to_relative


def _by_token(qkv, bias, num_heads):
    return qkv.reshape(len(bias), bias.shape[-1], 3, num_heads, -1)


def _weights(query, key, bias, relative):
    """Exponentials (N, A, L, L) and their sums: softmax in float32.

    bfloat16 sums over hundreds of tokens would lose digits.
    """
    scaled = query * query.shape[-1] ** -0.5
    logits = _product("naqf,nakf->naqk", scaled, key) + bias
    if relative is not None:
        logits = logits + relative
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights, jnp.sum(weights, axis=-1, keepdims=True)


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


attention.defvjp(_attention_forward, _attention_backward)


def normed(norm: nnx.LayerNorm | nnx.RMSNorm, x: jax.Array) -> jax.Array:
    """norm(x), whose backward pass takes less memory and time, for a layer norm."""
    scale = norm.scale[...]
    if isinstance(norm, nnx.RMSNorm):
        return rms_norm(x, scale, norm.epsilon).astype(norm.dtype)
    bias = jnp.zeros_like(scale) if norm.bias is None else norm.bias[...]
    return layer_norm(x, scale, bias, norm.epsilon).astype(norm.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    r"""Norm by the root of the mean square, in float32.

    .. math:: y = x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \circ \gamma

    Args:
        x: array (..., T).
        scale: gamma (T,).
        eps: added to the mean square.

    Returns:
        float32 array (..., T).

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    x = x.astype(jnp.float32)
    square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + eps) * scale


def rotated(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    r"""Rotary positions: number i and i + F/2 of a head turn together.

    .. math:: (x_i \cos - x_{i+F/2} \sin, \; x_{i+F/2} \cos + x_i \sin)

    Args:
        x: rows of heads (N L, A, F).
        angles: cosines and sines, float32 (N L, 1, F / 2) each.

    Returns:
        array of the shape and type of x.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    cosine, sine = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = first * cosine - second * sine, second * cosine + first * sine
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float):
    r"""Layer norm over the last axis, in float32; only x is kept for the backward pass.

    .. math::
        \hat x = (x - \mathrm{mean}(x)) / \sqrt{\mathrm{var}(x) + \epsilon}, \quad
        y = \hat x \circ \gamma + \beta

        dx = (g - \mathrm{mean}(g) - \hat x\, \mathrm{mean}(g \circ \hat x))
        / \sqrt{\mathrm{var}(x) + \epsilon}, \quad g = dy \circ \gamma

    Args:
        x: array (..., T).
        scale, bias: gamma and beta (T,).
        eps: added to the variance.

    Returns:
        float32 array (..., T).

    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    centred, inverse = _centred(x, eps)
    return centred * (inverse * scale) + bias


def _norm_forward(x, scale, bias, eps):
    return layer_norm(x, scale, bias, eps), (x, scale)


def _norm_backward(eps, kept, gradient):
    # `after` for scale too: its broadcast to x would be kept between the passes.
    x, scale = (after(part, gradient) for part in kept)
    centred, inverse = _centred(x, eps)
    unit = centred * inverse  # (..., T)
    to_unit = gradient * scale
    mean = jnp.mean(to_unit, axis=-1, keepdims=True)
    along = jnp.mean(to_unit * unit, axis=-1, keepdims=True)
    to_x = inverse * (to_unit - mean - along * unit)
    rows = tuple(range(x.ndim - 1))
    to_scale = jnp.sum(gradient * unit, axis=rows)
    return to_x.astype(x.dtype), to_scale, jnp.sum(gradient, axis=rows)


def _centred(x, eps):
    """x minus its mean, and one over its standard deviation."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    # Mean and variance from sums: one pass over x. Rounding may make it negative.
    variance = jnp.mean(x * x, axis=-1, keepdims=True) - mean * mean
    return x - mean, jax.lax.rsqrt(jnp.maximum(variance, 0) + eps)


layer_norm.defvjp(_norm_forward, _norm_backward)


def gelu(x: jax.Array) -> jax.Array:
    r"""Exact gelu as PyTorch computes it.

    .. math:: x \Phi(x) = x (1 + \mathrm{erf}(x / \sqrt 2)) / 2

    `jax.nn.gelu(approximate=False)` uses erfc, which takes twice as long on a CPU, for
    digits of the negative tail that have no effect after a layer norm.
    """
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_vjp
def bfloat16_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x (..., I) @ kernel (I, O) of bfloat16 operands, summed in float32.

    The backward products take bfloat16 operands too. By default JAX would pass the
    float32 sums back, and hardware for bfloat16 products (AMX, tensor cores, MXU) would
    help in the forward pass only.
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


def linear_product(x, kernel, dimension_numbers, precision=None, out_sharding=None):
    """x (..., I) @ kernel (I, O): the `dot_general` of an nnx.Linear.

    The leading axes of x become one. With two of them, a CPU copies the operands of the
    kernel's gradient, which takes 2.6 times as long as the product itself.
    """
    if x.dtype == jnp.bfloat16:
        return bfloat16_product(x, kernel)
    product = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())),
        precision=precision, out_sharding=out_sharding,
    )  # fmt: skip
    return product.reshape(*x.shape[:-1], -1)


def recomputed(function: Callable, x: jax.Array, *others) -> jax.Array:
    """function(x, *others) that keeps only its arguments for the backward pass.

    The backward pass runs the function again, as `jax.checkpoint` does, but also on a
    CPU: see `after`.

    Args:
        function: maps arrays, or trees of arrays, to one array.
        x: the argument that all costly parts of the function depend on.
        others: further arguments.

    Returns:
        what the function returns.
    """

    @jax.custom_vjp
    def call(x, *others):
        return function(x, *others)

    def forward(x, *others):
        return function(x, *others), (x, *others)

    def backward(kept, gradient):
        x, *others = kept
        return jax.vjp(function, after(x, gradient), *others)[1](gradient)

    call.defvjp(forward, backward)
    return call(x, *others)


def after(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """x, which cannot be used before `gradient` has been computed.

    Without this, XLA finds that the recomputation equals the forward pass and keeps the
    result of that. On a CPU the barrier of `jax.checkpoint` does not prevent it: XLA
    drops the barrier before it orders the operations, and then computes the second copy
    right after the first. In a train step of MiniLM, that kept 150 MB for MLPs alone.
    """
    return jax.lax.platform_dependent(
        x, gradient, cpu=_plus_zero, default=_behind_barrier
    )


def _plus_zero(x, gradient):
    # No compiler can know that this is zero: it would be NaN for a NaN gradient.
    one = jax.lax.slice(gradient, (0,) * gradient.ndim, (1,) * gradient.ndim)
    return x + jnp.minimum(jnp.abs(one), 0).reshape(()).astype(x.dtype)


def _behind_barrier(x, gradient):
    return jax.lax.optimization_barrier((x, gradient))[0]
