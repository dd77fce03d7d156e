"""Scores of quantised documents: the formulas, their gradients, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from ehi.index.search.codes import SCORES
from ehi.model.joint import JointIndex
from ehi.model.score import score_products, score_quantised

N, C, D = 4, 6, 5


def arrays(seed=0):
    """Unit queries and documents, and reconstructions that are 0.7 to 1.1 long."""
    rng = np.random.default_rng(seed)
    q, d = rng.normal(size=(N, D)), rng.normal(size=(C, D))
    q, d = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, d))
    d_hat = (d + 0.1 * rng.normal(size=d.shape)) * np.linspace(0.7, 1.1, C)[:, None]
    return tuple(x.astype(np.float32) for x in (q, d_hat, d))


@pytest.mark.parametrize("score", SCORES)
def test_formulas(score):
    q, d_hat, d = arrays()
    for i in range(N):
        for j in range(C):
            product = float(q[i] @ d_hat[j])
            length = float(np.sqrt(d_hat[j] @ d_hat[j]))
            expected = {
                "ip": product,
                "l2": 1 - float(np.square(q[i] - d_hat[j]).sum()) / 2,
                "cosine": product / length,
                "corrected": product / float(d_hat[j] @ d[j]),
            }[score]
            found = score_quantised(q[i : i + 1], d_hat[j : j + 1], d[j : j + 1], score)
            np.testing.assert_allclose(found, [[expected]], atol=1e-5)
    whole = score_quantised(q, d_hat, d, score)
    assert whole.shape == (N, C)
    np.testing.assert_allclose(whole[-1, -1], expected, atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_exact_documents_score_their_inner_product(score):
    q, _, d = arrays()
    np.testing.assert_allclose(score_quantised(q, d, d, score), q @ d.T, atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_gradients_match_finite_differences(score):
    def f(q, d_hat, d):
        return jnp.sin(score_quantised(q, d_hat, d, score))

    check_grads(f, arrays(), order=1, modes=("rev",), rtol=1e-2)
    _, to_d_hat, to_d = jax.grad(lambda *a: f(*a).sum(), (0, 1, 2))(*arrays())
    assert to_d_hat.any() and bool(to_d.any()) == (score == "corrected")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-3, 100.0, -1.0])
def test_odd_reconstructions_have_finite_scores_and_gradients(score, length):
    q, _, d = arrays()
    gradients = jax.grad(lambda *a: score_quantised(*a, score).sum(), (0, 1, 2))
    scores = score_quantised(q, length * d, d, score)
    assert all(np.isfinite(x).all() for x in (scores, *gradients(q, length * d, d)))
    # A factor stays within what a byte holds.
    if score in ("cosine", "corrected"):
        ratio = scores / np.where(length, length, 1.0) / (q @ d.T)
        low, high = 0.5 * (length != 0), 2 ** (191 / 64)
        assert ratio.min() >= low - 1e-5 and ratio.max() <= high + 1e-5


def test_scores_of_the_length_alone():
    q, d_hat, d = arrays()
    products, squares = q @ d_hat.T, np.square(d_hat).sum(1)
    for score in ("ip", "l2", "cosine"):
        found = score_products(products, squares, score)
        np.testing.assert_allclose(found, score_quantised(q, d_hat, d, score), 1e-5)
        each = score_products(products, np.tile(squares, (N, 1)), score)
        np.testing.assert_array_equal(each, found)
    with pytest.raises(ValueError, match="'corrected' compares with the embedding"):
        score_products(products, squares, "corrected")


def test_scores_that_do_not_exist_or_do_not_apply_are_refused():
    with pytest.raises(ValueError, match="'dot'; allowed: 'ip', 'l2', 'cosine', 'corr"):
        score_quantised(*arrays(), "dot")
    sizes = {"tower_width": D, "width": D, "head_hidden": 0, "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match="score='l2' needs PQ leaves"):
        JointIndex(**sizes, score="l2")
    with pytest.raises(ValueError, match="'L2'; allowed"):
        JointIndex(**sizes, num_subspaces=1, num_codewords=16, score="L2")
