"""Givens descent: greedy pairs, matrices that stay orthogonal, Procrustes solved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ehi.train import givens
from ehi.train.givens import greedy_pairs

D = 16
givens_descent = functools.partial(givens.givens_descent, every=1000, decay=0.99)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def rotation(width=D, seed=3):
    q = jnp.linalg.qr(normal(width, width, seed=seed))[0]
    return q.at[:, 0].multiply(jnp.linalg.det(q))  # no mirror


def off_orthogonal(r):
    return jnp.abs(jnp.dot(r.T, r, precision="highest") - jnp.eye(len(r))).max()


def greedy(weights):
    """One pair after the other, heaviest first."""
    d = len(weights)
    partner, free = np.arange(d), np.ones(d, bool)
    i, j = np.triu_indices(d, 1)
    for e in np.argsort(-np.abs(weights[i, j]), kind="stable"):
        if free[i[e]] and free[j[e]]:
            partner[[i[e], j[e]]] = j[e], i[e]
            free[[i[e], j[e]]] = False
    return partner


@pytest.mark.parametrize("width", [1, 2, 7, 16, 33])
def test_pairs_are_those_of_the_greedy_choice(width):
    for seed in range(5):
        w = normal(width, width, seed=seed)
        w = w - w.T
        np.testing.assert_array_equal(jax.jit(greedy_pairs)(w), greedy(np.asarray(w)))


def test_equal_weights_make_pairs_and_nan_comes_to_an_end():
    partner = np.asarray(greedy_pairs(jnp.zeros((7, 7))))
    np.testing.assert_array_equal(partner[partner], np.arange(7))
    assert (partner == np.arange(7)).sum() == 1
    greedy_pairs(jnp.full((7, 7), jnp.nan)).block_until_ready()
    # The worst order: every choice depends on the one before.
    chain = (
        jnp.zeros((16, 16))
        .at[jnp.arange(15), jnp.arange(1, 16)]
        .set(jnp.arange(15, 0, -1.0))
    )
    chain = chain - chain.T
    np.testing.assert_array_equal(greedy_pairs(chain), greedy(np.asarray(chain)))


def test_first_update_turns_the_steepest_pairs_by_a_step_of_the_rate():
    r, gradient = rotation(), normal(D, D)
    optimizer = givens_descent(0.01)
    change, _ = optimizer.update(gradient, optimizer.init(r), r)
    r64, g64 = np.asarray(r, np.float64), np.asarray(gradient, np.float64)
    a = r64.T @ g64 - g64.T @ r64
    partner = greedy(a)
    rms = np.sqrt(np.mean(a[np.arange(D), partner] ** 2))
    expected = r64.copy()
    for i, j in enumerate(partner):
        if i < j:
            t = -0.01 * a[i, j] / rms
            turn = np.eye(D)
            turn[[i, j], [i, j]] = np.cos(t)
            turn[i, j], turn[j, i] = np.sin(t), -np.sin(t)
            expected = expected @ turn
    np.testing.assert_allclose(r64 + np.asarray(change), expected, atol=1e-6)
    assert np.sum(g64 * np.asarray(change)) < 0  # downhill


def train(optimizer, start, loss, steps):
    """Losses, distances from orthogonality (steps,) and the last matrix."""

    def step(state, i):
        r, opt_state = state
        value, gradient = jax.value_and_grad(loss)(r, i)
        change, opt_state = optimizer.update(gradient, opt_state, r)
        r = optax.apply_updates(r, change)
        return (r, opt_state), (value, off_orthogonal(r))

    start = start, optimizer.init(start)
    (r, _), (values, off) = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))(
        start
    )
    return values, off, r


def procrustes(width, rows=200):
    """A loss of rotations, a start, and the least value, from the SVD."""
    x = normal(rows, width, seed=1)
    y = x @ rotation(width, seed=2) + 0.3 * normal(rows, width, seed=4)
    u, _, vt = np.linalg.svd(np.asarray(x.T @ y, np.float64))
    sign = np.ones(width)
    sign[-1] = np.linalg.det(u @ vt)
    best = np.square(np.asarray(x) @ (u * sign) @ vt - np.asarray(y)).sum(-1).mean()

    def loss(r, _, scale=1.0):
        return scale * jnp.square(x @ r - y).sum(-1).mean()

    return loss, rotation(width, seed=7), best


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_procrustes_comes_near_its_optimum_at_every_scale(scale):
    loss, start, best = procrustes(D)
    optimizer = givens_descent(optax.cosine_decay_schedule(0.1, 400))
    values, off, _ = train(optimizer, start, lambda r, i: loss(r, i, scale), steps=400)
    assert values[0] > 5 * scale * best
    assert values[-1] < 1.001 * scale * best
    assert off.max() < 1e-5


def noisy(width):
    """A gradient that never vanishes: another linear loss at every step."""
    return lambda r, i: jnp.sum(r * jax.random.normal(jax.random.key(i), r.shape))


def test_ten_thousand_steps_leave_it_orthogonal():
    optimizer = givens_descent(0.02)
    _, off, r = train(optimizer, jnp.eye(D), noisy(D), steps=10_000)
    assert off.max() < 1e-5  # at every step, also before a repair
    assert off[-1] < 1e-6
    assert jnp.abs(r - jnp.eye(D)).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
def test_wider_rotations_stay_and_learn(width):
    optimizer = givens_descent(0.01)
    _, off, _ = train(optimizer, rotation(width), noisy(width), steps=10_000)
    assert off.max() < 1e-5
    loss, start, best = procrustes(width, rows=4 * width)
    optimizer = givens_descent(optax.cosine_decay_schedule(0.1, 2000))
    values, _, _ = train(optimizer, start, loss, steps=2000)
    assert values[-1] < 1.01 * best


def test_repair_brings_it_back():
    r = rotation() + 1e-3 * normal(D, D)
    optimizer = givens_descent(0.0, every=2)
    state = optimizer.init(r)
    for expected in (False, True):
        change, state = optimizer.update(normal(D, D), state, r)
        assert bool(jnp.abs(change).max() > 1e-4) == expected
    assert off_orthogonal(r) > 1e-3 > 5e-5 > off_orthogonal(r + change)


def test_works_beside_other_groups_under_jit():
    params = {
        "rotation/matrix": rotation(),
        "quantiser/codebooks": jnp.ones((2, 3, 4)),
        "head/b": jnp.ones(5),
    }
    optimizer = optax.multi_transform(
        {"rotation": givens_descent(lambda i: 0.1 / (1 + i)), "rest": optax.adam(0.1)},
        {name: "rotation" if name[0] == "r" else "rest" for name in params},
    )
    gradients = jax.tree.map(jnp.sin, params)
    state = optimizer.init(params)
    changes, after = jax.jit(optimizer.update)(gradients, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    alone = givens_descent(0.1)
    r, g = params["rotation/matrix"], gradients["rotation/matrix"]
    expected, _ = alone.update(g, alone.init(r), r)
    np.testing.assert_allclose(changes["rotation/matrix"], expected, atol=1e-6)
    np.testing.assert_allclose(changes["head/b"], -0.1, rtol=1e-4)
    # The schedule counts steps.
    again, _ = jax.jit(optimizer.update)(gradients, after, params)
    ratio = again["rotation/matrix"] / changes["rotation/matrix"]
    assert 0.3 < jnp.median(ratio) < 0.7


def test_no_gradient_no_change():
    r, optimizer = rotation(), givens_descent(0.1)
    change, _ = optimizer.update(jnp.zeros((D, D)), optimizer.init(r), r)
    assert not change.any()


def test_bad_input_is_refused():
    for bad in ({"every": 0}, {"decay": 1.0}):
        with pytest.raises(ValueError, match="|".join(bad)):
            givens_descent(0.1, **bad)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        givens_descent(0.1).init({"a": jnp.zeros((3, 4))})
    optimizer = givens_descent(0.1)
    with pytest.raises(ValueError, match="pass params"):
        optimizer.update(jnp.eye(3), optimizer.init(jnp.eye(3)))
