"""Balanced codes equal those of Sinkhorn in float64 and have equal shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehi.model.pq import encode
from ehi.model.sinkhorn import balanced_codes, sinkhorn

N, M, K, S = 64, 3, 16, 4


def costs(*shape, seed=0):
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1.0, maxval=1.0)


def vectors(rows=N, seed=1):
    keys = jax.random.split(jax.random.key(seed), 2)
    z = jax.random.normal(keys[0], (rows, M * S))
    # Codewords of very different lengths: most rows are nearest to a few short ones.
    codebooks = jax.random.normal(keys[1], (M, K, S)) * jnp.linspace(0.1, 4, K)[:, None]
    return codebooks, z


def log_sum(x, axis):
    top = x.max(axis, keepdims=True)
    return np.squeeze(np.log(np.exp(x - top).sum(axis, keepdims=True)) + top, axis)


def in_float64(costs, epsilon, iterations):
    """Sinkhorn of one (N, K) in the log domain: scales columns, rows, columns, ..."""
    x = -np.asarray(costs, np.float64) / epsilon
    n, k = x.shape
    x = x if iterations else x - log_sum(x, 1)[:, None]
    for _ in range(iterations):
        x = x - log_sum(x, 0) + np.log(n / k)
        x = x - log_sum(x, 1)[:, None]
    return np.exp(x)


@pytest.mark.parametrize("epsilon", [1.0, 0.05, 0.003])
@pytest.mark.parametrize("iterations", [0, 1, 9, 10, 11, 47])
def test_sinkhorn_is_that_in_float64(epsilon, iterations):
    c = costs(2, 40, K)
    plans = jax.jit(sinkhorn, static_argnums=(1, 2))(c, epsilon, iterations)
    assert plans.shape == c.shape and plans.dtype == jnp.float32
    for plan, one in zip(plans, c, strict=True):
        # Energies up to 1 / epsilon have a rounding error of 1e-7 / epsilon.
        expected = in_float64(one, epsilon, iterations)
        np.testing.assert_allclose(plan, expected, atol=2e-6 + 1e-6 / epsilon)


def test_plan_has_its_row_and_column_sums():
    plan = np.asarray(sinkhorn(costs(40, K), 0.1, 200))
    np.testing.assert_allclose(plan.sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(plan.sum(0), 40 / K, rtol=1e-4)


@pytest.mark.parametrize("epsilon", [0.003, 1e-5])
def test_columns_that_nothing_is_near_to_stay_finite(epsilon):
    # exp(-2 / epsilon) is 0 in float32: outside the log domain, columns divide by 0.
    c = costs(40, K).at[:, :5].set(1.0).at[:, 5:].add(-1.0) / 2
    plan = sinkhorn(c, epsilon, 50)
    assert jnp.isfinite(plan).all()
    # Energies of 1 / epsilon have a rounding error of 1e-7 / epsilon.
    np.testing.assert_allclose(plan.sum(1), 1.0, rtol=2e-7 / epsilon)
    if epsilon == 0.003:
        np.testing.assert_allclose(plan, in_float64(c, epsilon, 50), atol=1e-3)


def test_codes_are_those_of_float64():
    codebooks, z = vectors()
    codes = balanced_codes(codebooks, z, iterations=100)
    assert codes.dtype == jnp.int32 and codes.shape == (N, M)
    for m in range(M):
        part = np.asarray(z, np.float64)[:, m * S : (m + 1) * S]
        d = ((part[:, None] - np.asarray(codebooks, np.float64)[m]) ** 2).sum(-1)
        middle, amplitude = (d.max() + d.min()) / 2, (d.max() - d.min()) / 2
        plan = in_float64((d - middle) / amplitude, 0.003, 100)
        two = np.sort(plan, 1)[:, -2:]
        sure = two[:, 1] - two[:, 0] > 1e-3
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(codes[sure, m], plan.argmax(1)[sure])


def test_codewords_get_equal_shares():
    codebooks, z = vectors(512)

    def most_and_least(codes):
        counts = np.stack([np.bincount(c, minlength=K) for c in np.asarray(codes).T])
        return counts.max(), counts.min()

    most, least = most_and_least(encode(codebooks, z))
    assert most > 3 * 512 / K and least == 0
    most, least = most_and_least(balanced_codes(codebooks, z, iterations=300))
    assert most <= 1.25 * 512 / K and least >= 0.75 * 512 / K


def test_without_iterations_or_need_codes_are_the_nearest():
    codebooks, z = vectors()
    nearest = encode(codebooks, z)
    np.testing.assert_array_equal(balanced_codes(codebooks, z, iterations=0), nearest)
    # Four rows are near every codeword, so the nearest codes are balanced already.
    order = jax.random.permutation(jax.random.key(5), jnp.repeat(jnp.arange(K), 4))
    beside = codebooks[:, order].transpose(1, 0, 2).reshape(N, M * S) + 1e-3
    codes = balanced_codes(codebooks, beside, iterations=100)
    np.testing.assert_array_equal(codes, jnp.tile(order[:, None], M))


def test_identical_vectors_and_gradients():
    codebooks, _ = vectors()
    same = jnp.zeros((N, M * S))
    plan = sinkhorn(jnp.zeros((N, K)), 0.003, 20)
    np.testing.assert_allclose(plan, 1 / K, rtol=1e-4)
    codes = balanced_codes(jnp.zeros_like(codebooks), same, iterations=20)
    assert ((codes >= 0) & (codes < K)).all()

    def loss(z):
        return balanced_codes(codebooks, z, iterations=5).astype(jnp.float32).sum()

    assert not jax.grad(loss)(vectors()[1]).any()


@pytest.mark.parametrize("epsilon,iterations", [(0.0, 5), (float("nan"), 5), (0.1, -1)])
def test_bad_numbers_are_refused(epsilon, iterations):
    with pytest.raises(ValueError, match=f"epsilon={epsilon} .*{iterations}"):
        balanced_codes(*vectors(), epsilon=epsilon, iterations=iterations)
