"""The tree: probabilities, assignment, beam search, the arrays of an index."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tree_cases import (
    D,
    N,
    beam_search,
    embeddings,
    router_of,
    with_random_residual,
)

from ehi.model.tree import PerLevelRouter, PerNodeRouter, assign

KINDS = ("per_node", "per_level")
CASES = [*itertools.product(KINDS, (1, 2, 3)), ("nearest", 1)]


@pytest.mark.parametrize("kind,height", CASES)
def test_soft_routing_sums_to_one(kind, height):
    router = router_of(kind, height)
    log_p = router.leaf_log_probs(embeddings())
    assert log_p.shape == (N, 3**height) == (N, router.num_leaves)
    np.testing.assert_allclose(jnp.exp(log_p).sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("kind,height", CASES)
def test_leaf_is_the_product_of_its_path_level_1_first(kind, height):
    router, x = router_of(kind, height), embeddings()
    levels, log_p = router.level_log_probs(x), router.leaf_log_probs(x)
    assert [level.shape for level in levels] == [(N, 3**h, 3) for h in range(height)]
    for leaf, path in enumerate(itertools.product(range(3), repeat=height)):
        node, expected = 0, 0.0
        for level, child in zip(levels, path, strict=True):
            expected += level[:, node, child]
            node = 3 * node + child
        np.testing.assert_allclose(log_p[:, leaf], expected, rtol=1e-5)


@pytest.mark.parametrize("kind,height", CASES)
def test_every_parameter_gets_a_gradient(kind, height):
    router = router_of(kind, height, **({"hidden": 4} if kind == "per_node" else {}))
    if kind == "per_node":
        with_random_residual(router)
    graphdef, params = nnx.split(router, nnx.Param)

    def loss(params):
        router = nnx.merge(graphdef, params)
        return -router.leaf_log_probs(embeddings())[:, 1].sum()

    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert jnp.isfinite(gradient).all(), path
        assert jnp.abs(gradient).max() > 1e-6, path


def test_assign_is_argmax():
    log_p = router_of("per_node").leaf_log_probs(embeddings())
    np.testing.assert_array_equal(assign(log_p), log_p.argmax(-1))
    np.testing.assert_array_equal(assign(jnp.zeros((2, 4))), [0, 0])


@pytest.mark.parametrize("kind,height", CASES)
def test_full_beam_is_exhaustive(kind, height):
    router, x = router_of(kind, height), embeddings()
    leaves, log_p = beam_search(router, x, router.num_leaves)
    exact = np.asarray(router.leaf_log_probs(x))
    np.testing.assert_array_equal(leaves, np.argsort(-exact, axis=-1, kind="stable"))
    np.testing.assert_allclose(log_p, -np.sort(-exact, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_beam_keeps_the_best_of_each_level(kind):
    router, x = router_of(kind, 3), embeddings()
    leaves, log_p = beam_search(router, x, 2)
    nodes = router.node_log_probs(x)
    for row in range(N):
        kept = [0]
        for level in nodes:
            children = [3 * node + child for node in sorted(kept) for child in range(3)]
            kept = sorted(children, key=lambda c: -float(level[row, c]))[:2]
        assert leaves[row].tolist() == kept
        np.testing.assert_allclose(log_p[row], nodes[-1][row, jnp.array(kept)])


def test_beam_breaks_ties_by_leaf_number():
    router = router_of("per_node", 3, 2)
    router.start_from([jnp.zeros(p.shape) for p in router.nodes])
    leaves, _ = beam_search(router, embeddings(), 5)
    np.testing.assert_array_equal(leaves, np.tile(np.arange(5), (N, 1)))


def test_to_arrays_has_the_arrays_of_an_index():
    tree = router_of("per_node", hidden=4, scale=7.0).to_arrays()
    assert tree["kind"] == "per_node" and set(tree) == {
        *("kind", "nodes", "scale", "w_in", "w_out")
    }
    assert [a.shape for a in tree["nodes"]] == [(1, 3, D), (3, 3, D)]
    assert tree["scale"] == pytest.approx(7.0)
    assert set(router_of("per_node").to_arrays()) == {"kind", "nodes", "scale"}
    tree = router_of("per_level").to_arrays()
    assert [a.shape for a in tree["u"]] == [(D, D), (D + 3, D + 3)]
    assert [a.shape for a in tree["w"]] == [(D, 3), (D + 3, 3)]
    assert all(type(a) is np.ndarray for a in tree["u"] + tree["w"])
    # To an index it is a tree of vectors whose logits have a bias: -|c|^2 / 2.
    nearest = router_of("nearest", 1, 4, scale=3.0)
    tree = nearest.to_arrays()
    assert tree["kind"] == "per_node" and tree["scale"] == 3.0
    (nodes,), (biases,) = tree["nodes"], tree["biases"]
    assert nodes.shape == (1, 4, D)
    np.testing.assert_allclose(biases, -np.square(nodes).sum(-1) / 2, rtol=1e-6)


def test_bad_arguments_of_functions_are_refused():
    router, x = router_of("per_node"), embeddings()
    for beam in (0, 10):
        with pytest.raises(ValueError, match=f"beam={beam} .* 9 leaves"):
            beam_search(router, x, beam)
    with pytest.raises(ValueError, match="nodes to start from"):
        router.start_from([jnp.zeros((1, 3, D))])
    assert isinstance(router, PerNodeRouter)
    assert isinstance(router_of("per_level"), PerLevelRouter)
