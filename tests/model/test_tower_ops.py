"""Operations with their own backward pass, against the gradients of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ehi.model.tower import Tower
from ehi.model.tower_ops import attention, gelu, layer_norm, normed, recomputed

HEADS, LENGTH = 3, 7
LOWEST = jnp.finfo(jnp.float32).min
# A few roundings in a row, each of half a bfloat16 digit.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def random(*shape, seed=0, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def plain_attention(qkv, bias):
    qkv = qkv.astype(jnp.float32).reshape(len(bias), LENGTH, 3, HEADS, -1)
    query, key, value = jnp.moveaxis(qkv, 2, 0)  # (N, L, A, F) each
    logits = jnp.einsum("nqaf,nkaf->naqk", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(logits + bias)
    mixed = jnp.einsum("naqk,nkaf->nqaf", weights, value)
    return mixed.reshape(len(bias) * LENGTH, -1)


def padded():
    """Rows of 7, 5 and 0 tokens."""
    seen = jnp.arange(LENGTH) < jnp.array([7, 5, 0])[:, None]
    return seen[:, None, None, :]


def shared():
    """Rows that several texts share, with padding after them."""
    names = jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 3, 0, 0]])
    return (names[:, :, None] == names[:, None, :])[:, None]


def assert_alike(found, expected, tolerance):
    """Equal up to a fraction of the largest number."""
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


def value_and_gradients(function, weights, *args):
    def total(*args):
        return (function(*args).astype(jnp.float32) * weights).sum()

    everything = tuple(range(len(args)))
    value = jax.jit(function)(*args).astype(jnp.float32)
    return value, jax.jit(jax.grad(total, everything))(*args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make_mask", [padded, shared])
def test_attention(make_mask, dtype):
    bias = jnp.where(make_mask(), 0.0, LOWEST)
    # Large queries and keys: weights near one and near zero.
    qkv = 2 * random(len(bias) * LENGTH, 3 * HEADS * 4)
    qkv, weights = qkv.astype(dtype), random(len(bias) * LENGTH, HEADS * 4, seed=1)
    found = value_and_gradients(lambda x: attention(x, bias, HEADS), weights, qkv)
    expected = value_and_gradients(lambda x: plain_attention(x, bias), weights, qkv)
    assert_alike(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm(dtype):
    x = (3 * random(2, 5, 16) + 1).astype(dtype)
    scale, bias = random(16, seed=1), random(16, seed=2)

    def plain(x, scale, bias):
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias

    def ours(x, scale, bias):
        return layer_norm(x, scale, bias, 1e-5)

    args = random(2, 5, 16, seed=3), x, scale, bias
    found, expected = (value_and_gradients(f, *args) for f in (ours, plain))
    assert_alike(found, expected, TOLERANCE[dtype])


def test_layer_norm_is_that_of_flax():
    norm = nnx.LayerNorm(16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = random(4, 16, dtype="bfloat16")
    assert_alike(jax.jit(normed)(norm, x), jax.jit(nnx.LayerNorm.__call__)(norm, x), 0)


def test_recomputed_function_has_the_same_gradients():
    def product(x, kernel):
        return gelu(x) @ kernel

    def again(x, kernel):
        return recomputed(product, x, kernel)

    args = random(3, 4), random(3, 8, seed=1), random(8, 4, seed=2)
    found, expected = (value_and_gradients(f, *args) for f in (again, product))
    assert_alike(found, expected, 1e-6)


def test_a_gradient_that_is_not_finite_stays_where_it_is():
    x, gradient = random(3, 8), random(3, 8).at[0, 0].set(jnp.inf)

    @jax.jit
    def back(gradient):
        return jax.vjp(lambda x: recomputed(gelu, x), x)[1](gradient)[0]

    assert np.isfinite(back(gradient)).sum() == x.size - 1


def test_recomputed_layers_take_less_memory_once_compiled():
    """XLA keeps less too: it does not undo the recomputation that JAX asks for."""
    ids = np.ones((4, 128), np.int32)

    def temporaries(**changes):
        tower = Tower(
            vocab_size=50, width=16, num_layers=6, num_heads=4, mlp_width=32,
            max_positions=128, type_vocab_size=2, rngs=nnx.Rngs(0), **changes,
        )  # fmt: skip
        graphdef, params = nnx.split(tower)

        def total(params):
            return nnx.merge(graphdef, params)(ids, ids > 0).sum()

        compiled = jax.jit(jax.grad(total)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain, remat = temporaries(), temporaries(remat=True)
    # The L x L weights of six layers are not kept: 4 x 4 x 128 x 128 floats each.
    assert plain < 6 * 4 * 4 * 128 * 128 * 4
    assert remat < 0.7 * plain
