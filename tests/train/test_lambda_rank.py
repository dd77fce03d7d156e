"""LambdaRank and ListNet against loops and closed forms; masks; no NaN."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ehi.train.losses import distillation, lambda_rank

N, C, CUT = 6, 9, 4


def batch(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    scores = 2 * jax.random.normal(keys[0], (N, C))
    places = [jax.random.permutation(key, C) for key in jax.random.split(keys[1], N)]
    ranks = jnp.stack(places).at[:, 0].set(0) + jnp.arange(C).at[1:].set(1)
    relevant = jax.random.bernoulli(keys[2], 0.3, (N, C)).at[:, 1].set(True)
    where = jax.random.bernoulli(keys[3], 0.8, (N, C))
    return scores, ranks, relevant, where


def of_loops(scores, ranks, relevant, where, cut):
    """The loss of each row, pair by pair."""

    def w(rank):
        return 1 / rank if 1 <= rank <= cut else 0.0

    arrays = map(np.asarray, (scores, ranks, relevant, where))
    rows = []
    for s, r, rel, use in zip(*arrays, strict=True):
        pairs = [
            math.log1p(math.exp(float(s[c]) - float(s[p]))) * abs(w(r[c]) - w(r[p]))
            for p in range(len(s))
            for c in range(len(s))
            if use[p] and use[c] and rel[p] and not rel[c]
        ]
        rows.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return np.array(rows)


@pytest.mark.parametrize("cut", [1, CUT, 200])
def test_lambda_rank_is_the_double_loop(cut):
    arrays = batch()
    rows = of_loops(*arrays, cut)
    assert rows.any()
    loss = jax.jit(lambda *a: lambda_rank(*a, cut=cut))(*arrays)
    np.testing.assert_allclose(loss, rows.mean(), rtol=1e-5)
    assert loss.dtype == jnp.float32 and loss.shape == ()
    weights = np.array([0.0, 2.0, 1.0, 0.5, 0.0, 1.0], np.float32)
    weighted = lambda_rank(*arrays, cut=cut, weights=jnp.asarray(weights))
    np.testing.assert_allclose(
        weighted, (weights * rows).sum() / weights.sum(), rtol=1e-5
    )
    everywhere = lambda_rank(*arrays[:3], cut=cut)
    rows = of_loops(*arrays[:3], np.ones((N, C), bool), cut)
    np.testing.assert_allclose(everywhere, rows.mean(), rtol=1e-5)


def test_lambda_rank_closed_form():
    scores = jnp.array([[2.0, 1.0, 1.0, 5.0]])
    ranks = jnp.array([[1, 2, 3, 4]])
    relevant = jnp.array([[False, True, False, False]])
    # (1/1 - 1/2) log(1 + e) + (1/2 - 1/3) log 2 + (1/2 - 0) log(1 + e^4), of 3 pairs
    expected = (np.log1p(np.e) / 2 + np.log(2) / 6 + np.log1p(np.exp(4)) / 2) / 3
    loss = lambda_rank(scores, ranks, relevant, cut=3)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_what_is_masked_has_no_influence():
    scores, ranks, relevant, where = batch()
    value = lambda_rank(scores, ranks, relevant, where, cut=CUT)
    poisoned = jnp.where(where, scores, jnp.nan)
    loss, gradient = jax.value_and_grad(lambda_rank)(
        poisoned, jnp.where(where, ranks, 1), relevant, where, cut=CUT
    )
    assert loss == value
    assert jnp.isfinite(gradient).all() and not gradient[~where].any()


@pytest.mark.parametrize("missing", ["positives", "negatives", "everything"])
def test_rows_without_pairs_are_zero_and_finite(missing):
    scores, ranks, relevant, where = batch()
    if missing == "everything":
        where = where.at[2].set(False)
    else:
        relevant = relevant.at[2].set(missing == "negatives")
    rows = of_loops(scores, ranks, relevant, where, CUT)
    assert rows[2] == 0
    loss, gradient = jax.value_and_grad(lambda_rank)(
        scores, ranks, relevant, where, cut=CUT
    )
    np.testing.assert_allclose(loss, rows.mean(), rtol=1e-5)
    assert jnp.isfinite(gradient).all() and not gradient[2].any()


def test_large_differences_do_not_overflow():
    scores = jnp.array([[-1e4, 1e4]])
    ranks, relevant = jnp.array([[2, 1]]), jnp.array([[True, False]])
    loss, gradient = jax.value_and_grad(lambda_rank)(scores, ranks, relevant, cut=2)
    np.testing.assert_allclose(loss, 1e4, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, 0.5]], rtol=1e-6)


def test_gradient_of_lambda_rank():
    scores, *rest = batch()
    check_grads(
        lambda s: lambda_rank(s, *rest, cut=CUT), (scores,), 1, ("rev",), rtol=1e-2
    )
    # A step against it lifts the positives and lowers the negatives.
    ranks, relevant, where = rest
    gradient = jax.grad(lambda_rank)(scores, ranks, relevant, where, cut=CUT)
    assert (gradient[relevant] <= 0).all() and (gradient[~relevant] >= 0).all()
    # Ranks come from the search; they have no gradient, even as floats.
    to_ranks = jax.grad(lambda_rank, 1)(scores, 1.0 * ranks, relevant, where, cut=CUT)
    assert not to_ranks.any()


def test_a_cut_below_one_is_refused():
    with pytest.raises(ValueError, match="cut=0"):
        lambda_rank(*batch(), cut=0)


def softmax(x, where):
    e = np.where(where, np.exp(x - x.max(-1, keepdims=True)), 0.0)
    return e / e.sum(-1, keepdims=True)


def test_distillation_has_the_gradient_of_list_net():
    scores, _, _, where = batch()
    teacher = batch(seed=1)[0]
    options = {"teacher_temperature": 0.5, "temperature": 2.0}
    t, s = np.asarray(teacher, np.float64) / 0.5, np.asarray(scores, np.float64) / 2.0
    p, q = softmax(t, where), softmax(s, where)
    counts = np.asarray(where)
    list_net = -(p[counts] * np.log(q[counts])).sum() / N
    # d/ds of -sum p log softmax(s / tau) is (softmax(s / tau) - p) / tau.
    expected = (q - p) / 2.0 / N
    gradient = jax.grad(distillation, 1)(teacher, scores, where, **options)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    assert not jax.grad(distillation)(teacher, scores, where, **options).any()
    entropy = -(p[counts] * np.log(p[counts])).sum() / N
    kl = distillation(teacher, scores, where, **options)
    np.testing.assert_allclose(kl, list_net - entropy, rtol=1e-5)
