"""The losses of the tree: closed forms, stability, and which side has a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ehi.model.tree import assign, make_router
from ehi.train import tree_losses

N, C, P = 4, 6, 5


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


TEACHER = random(N, C, seed=1)
LOG_Q = jax.nn.log_softmax(2 * random(N, P))
LOG_C = jax.nn.log_softmax(2 * random(C, P, seed=2))


def test_path_agreement_closed_form_and_stability():
    one_hot = jnp.log(jnp.eye(P)[:2] + 1e-30)
    assert tree_losses.path_agreement(one_hot, one_hot) == pytest.approx(0.0, abs=1e-6)
    uniform = jnp.full((2, P), -jnp.log(P))
    assert tree_losses.path_agreement(uniform, uniform) == pytest.approx(np.log(P))
    # exp(-100) underflows in float32; the loss of opposite paths must not.
    far = jnp.array([[0.0, -100.0]]), jnp.array([[-100.0, 0.0]])
    value, gradient = jax.value_and_grad(tree_losses.path_agreement)(*far)
    assert value == pytest.approx(100 - np.log(2), rel=1e-5)
    np.testing.assert_allclose(gradient, [[-0.5, -0.5]], rtol=1e-5)


def test_leaf_likelihood_is_a_softmax_against_the_siblings_of_each_level():
    router = make_router("per_node", 8, height=2, branching=3, rngs=nnx.Rngs(0))
    q = random(N, 8)
    leaves = assign(router.leaf_log_probs(random(N, 8, seed=3)))
    expected = np.zeros(N)
    node = np.zeros(N, int)
    scale = float(jnp.exp(router.log_scale[...]))
    for level, child in zip(router.nodes, (leaves // 3, leaves % 3), strict=True):
        siblings = np.asarray(level[...])[node]  # (N, B, D)
        logits = scale * np.einsum("nd,nbd->nb", q, siblings)
        chosen = logits[np.arange(N), child]
        expected += np.log(np.exp(logits).sum(-1)) - chosen
        node = 3 * node + np.asarray(child)
    np.testing.assert_array_equal(node, leaves)
    assert len(set(leaves.tolist())) > 1

    def loss(q, weights=None):
        log_p = router.leaf_log_probs(q)
        return tree_losses.leaf_likelihood(log_p, leaves, weights)

    np.testing.assert_allclose(loss(q), expected.mean(), rtol=1e-5)
    weights = np.array([0.0, 2.0, 1.0, 0.5], np.float32)
    np.testing.assert_allclose(
        loss(q, jnp.asarray(weights)), (weights * expected).sum() / 3.5, rtol=1e-5
    )
    # A step against it makes the leaves of the documents more probable.
    assert loss(q - 0.01 * jax.grad(loss)(q)) < loss(q)


def test_intra_leaf_counts_unlike_pairs_that_share_a_path():
    similarity = jnp.array([[1.0, 0.9, 0.2], [0.9, 1.0, 0.1], [0.2, 0.1, 1.0]])
    paths = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    shared = paths @ paths.T
    loss = tree_losses.intra_leaf(similarity, shared, threshold=0.5)
    np.testing.assert_allclose(loss, (4 * 0.5) / 6, rtol=1e-6)
    # Without document 2 only the pair that is alike is left; it may share its leaf.
    where = jnp.ones((3, 3), bool).at[2].set(False).at[:, 2].set(False)
    assert tree_losses.intra_leaf(similarity, shared, where, threshold=0.5) == 0.0
    to_similarity = jax.grad(tree_losses.intra_leaf)(similarity, shared, threshold=0.5)
    assert not to_similarity.any()


def test_load_balance_is_zero_for_equal_loads_only():
    assert tree_losses.load_balance(jnp.eye(P)) == pytest.approx(0.0, abs=1e-6)
    one_leaf = jnp.zeros((C, P)).at[:, 2].set(1.0)
    value, gradient = jax.value_and_grad(tree_losses.load_balance)(one_leaf)
    assert value == pytest.approx(np.log(P), rel=1e-6)
    assert jnp.isfinite(gradient).all()
    weights = jnp.array([1.0, 1.0, 0.0, 0.0, 0.0])
    half = tree_losses.load_balance(jnp.eye(P), weights)
    assert half == pytest.approx(np.log(P / 2), rel=1e-6)


def test_leaf_entropy_closed_form():
    assert tree_losses.leaf_entropy(jnp.full((3, P), -jnp.log(P))) == pytest.approx(
        np.log(P)
    )
    sure = jnp.array([[0.0, -jnp.inf, -jnp.inf]])
    value, gradient = jax.value_and_grad(tree_losses.leaf_entropy)(sure)
    assert value == 0.0 and jnp.isfinite(gradient).all()


def test_route_distillation_is_cross_entropy_with_the_neighbours_leaves():
    p = np.asarray(jax.nn.softmax(TEACHER / 0.5))
    target = p @ np.exp(np.asarray(LOG_C))
    expected = -(target * np.asarray(LOG_Q)).sum(-1).mean()
    options = {"teacher_temperature": 0.5}
    loss = tree_losses.route_distillation(TEACHER, LOG_C, LOG_Q, **options)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    gradients = jax.grad(tree_losses.route_distillation, (0, 1, 2))(
        TEACHER, LOG_C, LOG_Q, **options
    )
    assert [bool(g.any()) for g in gradients] == [False, True, True]
