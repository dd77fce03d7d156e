"""Rotations stay orthogonal in training and have the gradient of a plain solve."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ehi.model.rotation import (
    ROTATIONS,
    GivensRotation,
    Rotation,
    cayley,
    make_rotation,
)

D = 12


def vectors(rows, width=D, seed=1):
    return jax.random.normal(jax.random.key(seed), (rows, width))


def orthogonal(width=D, seed=3):
    return jnp.linalg.qr(vectors(width, width, seed))[0]


def off_orthogonal(r):
    r = np.asarray(r, np.float64)
    return np.abs(r.T @ r - np.eye(len(r))).max()


def test_cayley_is_orthogonal_and_starts_at_the_identity():
    u = vectors(D, D)
    for size in (1e-3, 1.0, 30.0):
        assert off_orthogonal(cayley(size * (u - u.T))) < 1e-5
    np.testing.assert_array_equal(cayley(jnp.zeros((D, D))), jnp.eye(D))


@pytest.mark.parametrize("size", (1e-6, 1e-3, 0.1, 3.0, 1e5))
def test_cayley_is_that_of_a_solve_in_float64(size):
    u = size * np.asarray(vectors(96, 96))
    a = (u - u.T).astype(np.float64)
    eye = np.eye(96)
    np.testing.assert_allclose(
        cayley(jnp.asarray(a, jnp.float32)), np.linalg.solve(eye - a, eye + a),
        rtol=0, atol=2e-6,
    )  # fmt: skip


def test_cayley_gradient_is_that_of_the_solve():
    def plain(a):
        eye = jnp.eye(D)
        return jnp.linalg.solve(eye - a, eye + a)

    u, target = 0.3 * vectors(D, D), vectors(D, D, seed=2)
    for at in (jnp.zeros((D, D)), u):
        gradients = [
            jax.grad(lambda u, f=f: jnp.sum(f(u - u.T) * target))(at)
            for f in (cayley, plain)
        ]
        np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_rotation_learns_and_stays_orthogonal_through_training():
    target = orthogonal(seed=4)
    target = target * jnp.sign(jnp.linalg.det(target))  # no reflection
    x = vectors(64)
    rotation = Rotation(D, learned=True)
    graphdef, params = nnx.split(rotation, nnx.Param)
    optimizer = optax.adam(0.05)

    def loss(params):
        r = nnx.merge(graphdef, params).matrix()
        return jnp.mean(jnp.square(x @ r - x @ target))

    @jax.jit
    def train(params):
        def step(state, _):
            params, opt_state = state
            value, gradient = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=300)

    (params, _), values = train(params)
    trained = nnx.merge(graphdef, params)
    assert values[-1] < 0.5 * values[0]
    assert off_orthogonal(trained.matrix()) < 1e-5
    np.testing.assert_array_equal(trained.start[...], jnp.eye(D))


def test_fixed_rotation_is_its_start_and_has_no_gradient():
    start = orthogonal()
    rotation = Rotation(D, learned=False)
    rotation.start_from(start)
    np.testing.assert_allclose(rotation.matrix(), start)
    graphdef, params = nnx.split(rotation, nnx.Param)
    gradients = jax.grad(lambda p: nnx.merge(graphdef, p).matrix().sum())(params)
    assert all(not g.any() for g in jax.tree.leaves(gradients))
    learned = Rotation(D, learned=True)
    learned.start_from(start)
    np.testing.assert_allclose(learned.matrix(), start, atol=1e-6)


def test_every_kind_is_made_and_starts_at_the_identity():
    for kind in ROTATIONS:
        rotation = make_rotation(kind, D)
        if kind == "none":
            assert rotation is None
            continue
        assert isinstance(rotation, GivensRotation) == (kind == "givens")
        np.testing.assert_array_equal(rotation.matrix(), jnp.eye(D))
        start = orthogonal()
        rotation.start_from(start)
        np.testing.assert_allclose(rotation.matrix(), start, atol=1e-6)


def test_bad_rotations_are_refused():
    with pytest.raises(ValueError, match=r"width 12 .*\(3, 3\)"):
        Rotation(D).start_from(jnp.eye(3))
    for bad in (2 * jnp.eye(D), jnp.full((D, D), jnp.nan)):
        with pytest.raises(ValueError, match="orthogonal"):
            Rotation(D).start_from(bad)
    with pytest.raises(ValueError, match="rotation='turned' .*'none', .*'givens'"):
        make_rotation("turned", D)
