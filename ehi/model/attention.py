"""Softmax attention whose backward pass is written out.

Shapes beyond the alphabet of `ehi/__init__.py`: A attention heads, F = T/A their width.
"""

import functools

import jax
import jax.numpy as jnp

from ehi.model.recompute import after


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention(qkv: jax.Array, bias: jax.Array, num_heads: int) -> jax.Array:
    r"""Multi-head attention; of its L x L weights none is kept for the backward pass.

    .. math::
        P = \mathrm{softmax}(Q K^\top / \sqrt F + B), \quad O = P V

        dV = P^\top dO, \quad
        dS = P \circ (dO\, V^\top - \mathrm{rowsum}(dO \circ O)), \quad
        dQ = dS\, K / \sqrt F, \quad dK = dS^\top Q / \sqrt F

    Args:
        qkv: rows (N L, 3 A F) of queries, keys and values, float32 or bfloat16.
        bias: float32 (N, 1, 1 or L, L); a constant, it gets no gradient.
        num_heads: A.

    Returns:
        rows (N L, A F) of the type of `qkv`.

    Source: Vaswani et al. 2017, arXiv:1706.03762; backward as in Dao et al. 2022,
    arXiv:2205.14135, section B.2.
    """
    return _forward(qkv, bias, num_heads)[0]


def _forward(qkv, bias, num_heads):
    query, key, value = _heads(qkv, bias, num_heads)
    logits = _logits(query, key, bias)  # (N, A, L, L)
    highest = jnp.max(logits, axis=-1, keepdims=True)  # (N, A, L, 1)
    # Softmax in float32: bfloat16 sums over hundreds of tokens lose digits. The
    # division comes after the product, where there are F numbers a token, not L.
    weights = jnp.exp(logits - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = _product("naqk,nakf->naqf", weights.astype(qkv.dtype), value) / total
    mixed = jnp.transpose(mixed, (0, 2, 1, 3)).astype(qkv.dtype)  # (N, L, A, F)
    mixed = mixed.reshape(len(qkv), -1)
    return mixed, (qkv, bias, highest, total, mixed)


def _backward(num_heads, kept, gradient):
    qkv, bias, highest, total, mixed = kept
    qkv, highest, total = (after(x, gradient) for x in (qkv, highest, total))
    query, key, value = _heads(qkv, bias, num_heads)
    weights = jnp.exp(_logits(query, key, bias) - highest)  # (N, A, L, L)
    by_token = (len(bias), -1, num_heads, query.shape[-1])  # (N, L, A, F)
    gradient = gradient.astype(jnp.float32).reshape(by_token)
    shared = jnp.sum(gradient * mixed.reshape(by_token), axis=-1, keepdims=True)
    # P is weights / total: the gradient is divided, which has fewer numbers.
    shared = jnp.transpose(shared, (0, 2, 1, 3)) / total  # (N, A, L, 1)
    gradient = jnp.transpose(gradient, (0, 2, 1, 3)) / total  # (N, A, L, F)
    gradient = gradient.astype(qkv.dtype)
    to_value = _product("naqk,naqf->nakf", weights.astype(qkv.dtype), gradient)
    to_weights = _product("naqf,nakf->naqk", gradient, value)
    to_logits = (weights * (to_weights - shared)).astype(qkv.dtype)
    scale = query.shape[-1] ** -0.5
    to_query = scale * _product("naqk,nakf->naqf", to_logits, key)
    to_key = scale * _product("naqk,naqf->nakf", to_logits, query)
    to_qkv = [
        jnp.transpose(x, (0, 2, 1, 3)).reshape(len(qkv), -1)
        for x in (to_query, to_key, to_value)
    ]
    return jnp.concatenate(to_qkv, axis=1).astype(qkv.dtype), None


def _heads(qkv, bias, num_heads):
    rows, length = len(bias), bias.shape[-1]
    qkv = qkv.reshape(rows, length, 3, num_heads, -1)
    # Heads before tokens in memory: the batched products then run on plain matrices,
    # twice as fast on a CPU as on strided ones.
    return jnp.transpose(qkv, (2, 0, 3, 1, 4))  # (3, N, A, L, F)


def _logits(query, key, bias):
    scaled = query * query.shape[-1] ** -0.5
    return _product("naqf,nakf->naqk", scaled, key) + bias


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


attention.defvjp(_forward, _backward)
