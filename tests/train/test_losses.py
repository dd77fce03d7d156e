"""The losses: closed forms, batched = single, masked = subset, no effect of padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ehi.train import losses, tree_losses

N, C, P, D = 4, 6, 5, 3


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def log_probs(rows, seed=0):
    return jax.nn.log_softmax(2 * random(rows, P, seed=seed))


SCORES, TARGET = random(N, C), jnp.array([0, 3, 5, 3])
WHERE = jnp.ones((N, C), bool).at[0, 2].set(False).at[1, 3:5].set(False)
TEACHER = random(N, C, seed=1)
LOG_Q, LOG_D, LOG_C = log_probs(N), log_probs(N, 1), log_probs(C, 2)
Z, Z_HAT = random(N, D), random(N, D, seed=1)

# name -> a loss as a function of (arrays with N rows), weights; and those arrays
ROW_LOSSES = {
    "softmax": (
        lambda s, t, w: losses.softmax_contrastive(s, t, temperature=0.5, weights=w),
        (SCORES, TARGET),
    ),
    "softmax_where": (
        lambda s, t, m, w: losses.softmax_contrastive(
            s, t, m, temperature=1.0, weights=w
        ),
        (SCORES, TARGET, WHERE),
    ),
    "hinge": (
        lambda s, t, m, w: losses.hinge_contrastive(s, t, m, margin=0.5, weights=w),
        (SCORES, TARGET, WHERE),
    ),
    "path": (tree_losses.path_agreement, (LOG_Q, LOG_D)),
    "leaf": (tree_losses.leaf_likelihood, (LOG_Q, jnp.array([4, 0, 0, 2]))),
    "leaves": (
        tree_losses.leaf_likelihood,
        (LOG_Q, jnp.array([[4, 1], [0, 2], [0, 3], [2, 1]])),
    ),
    "entropy": (tree_losses.leaf_entropy, (LOG_Q,)),
    "codebook": (losses.codebook_distortion, (Z, Z_HAT)),
    "commitment": (losses.commitment_distortion, (Z, Z_HAT)),
    "distill": (
        lambda t, s, m, w: losses.distillation(
            t, s, m, teacher_temperature=0.5, temperature=2.0, weights=w
        ),
        (TEACHER, SCORES, WHERE),
    ),
    "route": (
        lambda t, q, m, w: tree_losses.route_distillation(
            t, LOG_C, q, m, teacher_temperature=0.5, weights=w
        ),
        (TEACHER, LOG_Q, WHERE),
    ),
}


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_a_batch_is_the_weighted_mean_of_its_rows(name):
    loss, arrays = ROW_LOSSES[name]
    single = np.array(
        [loss(*(a[n : n + 1] for a in arrays), None) for n in range(N)], np.float32
    )
    np.testing.assert_allclose(loss(*arrays, None), single.mean(), rtol=1e-5)
    weights = np.array([0.0, 2.0, 1.0, 0.5], np.float32)
    expected = (weights * single).sum() / weights.sum()
    batched = jax.jit(loss)(*arrays, jnp.asarray(weights))
    np.testing.assert_allclose(batched, expected, rtol=1e-5)
    assert batched.dtype == jnp.float32 and batched.shape == ()


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_rows_of_weight_zero_do_not_exist(name):
    loss, arrays = ROW_LOSSES[name]
    assert loss(*arrays, jnp.zeros(N)) == 0.0
    weights = jnp.array([1.0, 1.0, 1.0, 0.0])
    floats = [i for i, a in enumerate(arrays) if a.dtype == jnp.float32]
    for gradient in jax.grad(loss, floats)(*arrays, weights):
        assert not gradient[3].any() and jnp.isfinite(gradient).all()


def test_softmax_contrastive_closed_form():
    scores = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
    loss = losses.softmax_contrastive(scores, jnp.array([1]), temperature=1.0)
    np.testing.assert_allclose(loss, np.log(8 / 2), rtol=1e-6)
    sharp = losses.softmax_contrastive(scores, jnp.array([1]), temperature=0.5)
    np.testing.assert_allclose(sharp, np.log(30 / 4), rtol=1e-6)


def test_hinge_contrastive_closed_form():
    scores = jnp.array([[0.9, 0.8, 0.1, 1.0]])
    loss = losses.hinge_contrastive(scores, jnp.array([0]), margin=0.3)
    np.testing.assert_allclose(loss, (0.2 + 0.0 + 0.4) / 3, rtol=1e-5)
    where = jnp.array([[True, False, True, False]])
    assert losses.hinge_contrastive(scores, jnp.array([0]), where, margin=0.3) == 0.0


@pytest.mark.parametrize("name", ["softmax_where", "hinge", "distill", "route"])
def test_masked_is_the_subset(name):
    loss, (a, b, _) = ROW_LOSSES[name]
    keep = jnp.array([0, 3, 5])
    where = jnp.zeros((N, C), bool).at[:, keep].set(True)
    everywhere = jnp.ones((N, 3), bool)
    if name in ("softmax_where", "hinge"):
        subset = loss(a[:, keep], jnp.array([0, 1, 2, 1]), everywhere, None)
    elif name == "distill":
        subset = loss(a[:, keep], b[:, keep], everywhere, None)
    else:
        subset = tree_losses.route_distillation(
            a[:, keep], LOG_C[keep], b, teacher_temperature=0.5
        )
    np.testing.assert_allclose(loss(a, b, where, None), subset, rtol=1e-5)
    # What a masked entry holds changes neither the value nor the gradient.
    poisoned = jnp.where(where, a, jnp.inf)
    value, gradient = jax.value_and_grad(loss)(poisoned, b, where, None)
    np.testing.assert_allclose(value, subset, rtol=1e-5)
    assert jnp.isfinite(gradient).all() and not gradient[~where].any()


def test_the_target_counts_even_where_the_mask_forgets_it():
    nothing = jnp.zeros((N, C), bool)
    loss = losses.softmax_contrastive(SCORES, TARGET, nothing, temperature=1.0)
    assert loss == 0.0
    assert losses.hinge_contrastive(SCORES, TARGET, nothing, margin=1.0) == 0.0


def test_distillation_is_zero_for_equal_rankings_and_kl_otherwise():
    shifted = TEACHER / 2 + 3.0
    equal = losses.distillation(
        TEACHER, shifted, teacher_temperature=0.4, temperature=0.2
    )
    assert equal == pytest.approx(0.0, abs=1e-6)
    p, q = (np.asarray(jax.nn.softmax(s)) for s in (TEACHER, SCORES))
    kl = (p * np.log(p / q)).sum(-1).mean()
    plain = {"teacher_temperature": 1.0, "temperature": 1.0}
    loss = losses.distillation(TEACHER, SCORES, **plain)
    np.testing.assert_allclose(loss, kl, rtol=1e-5)
    to_teacher = jax.grad(losses.distillation)(TEACHER, SCORES, **plain)
    assert not to_teacher.any()


@pytest.mark.parametrize("name", ["softmax_where", "path", "entropy", "distill"])
def test_gradients_match_finite_differences(name):
    loss, arrays = ROW_LOSSES[name]
    at = 1 if name == "distill" else 0

    def of_one(x):
        return loss(*arrays[:at], x, *arrays[at + 1 :], None)

    check_grads(of_one, (arrays[at],), order=1, modes=("rev",), rtol=1e-2)


def test_half_precision_scores_are_scored_in_float32():
    half = SCORES.astype(jnp.bfloat16)
    loss = losses.softmax_contrastive(half, TARGET, temperature=0.05)
    exact = losses.softmax_contrastive(
        half.astype(jnp.float32), TARGET, temperature=0.05
    )
    assert loss.dtype == jnp.float32 and loss == exact


def test_scores_and_targets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 6\), \(3,\)"):
        losses.softmax_contrastive(SCORES, TARGET[:3], temperature=1.0)
    with pytest.raises(ValueError, match=r"\(6,\), \(4,\)"):
        losses.hinge_contrastive(SCORES[0], TARGET, margin=0.1)


def test_any_leaf_of_a_document_will_do():
    """-log of the sum of p over its leaves; one leaf is the loss of JTR."""
    leaves = jnp.array([[4, 1], [0, 2], [0, 3], [2, 1]])
    expected = [
        -np.log(np.exp(LOG_Q[n, a]) + np.exp(LOG_Q[n, b]))
        for n, (a, b) in enumerate(leaves.tolist())
    ]
    found = tree_losses.leaf_likelihood(LOG_Q, leaves)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-6)
    one = tree_losses.leaf_likelihood(LOG_Q, leaves[:, :1])
    assert one == tree_losses.leaf_likelihood(LOG_Q, leaves[:, 0])


def test_codebook_and_commitment_are_the_gradient_of_the_squared_error():
    """RepCONC's squared error moves codewords and documents."""

    def both(z, z_hat):
        return losses.codebook_distortion(z, z_hat) + losses.commitment_distortion(
            z, z_hat
        )

    def squared_error(z, z_hat):
        return jnp.square(z - z_hat).sum(-1).mean()

    for found, expected in zip(
        jax.grad(both, (0, 1))(Z, Z_HAT),
        jax.grad(squared_error, (0, 1))(Z, Z_HAT),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 99])
def test_the_hardest_negatives_are_those_with_the_highest_scores(count):
    found = losses.hardest_negatives(SCORES, TARGET, WHERE, count=count)
    for row in range(N):
        target = int(TARGET[row])
        able = [c for c in range(C) if bool(WHERE[row, c]) and c != target]
        able.sort(key=lambda c: -float(SCORES[row, c]))
        expected = sorted([*able[:count], target])
        assert np.flatnonzero(found[row]).tolist() == expected, row
    slope = jax.grad(
        lambda s: losses.hardest_negatives(s, TARGET, count=count).astype(s.dtype).sum()
    )(SCORES)
    assert not slope.any()
