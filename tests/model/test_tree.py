"""The tree: probabilities, both parameterisations, assignment and beam search."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ehi.model.beam import beam_search
from ehi.model.tree import PerLevelRouter, PerNodeRouter, assign, make_router, to_numpy

D, N = 8, 5
KINDS = ("per_node", "per_level")
CASES = list(itertools.product(KINDS, (1, 2, 3)))


def embeddings(rows=N, seed=1):
    x = jax.random.normal(jax.random.key(seed), (rows, D))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def router_of(kind, height=2, branching=3, **kwargs):
    return make_router(
        kind, D, height=height, branching=branching, rngs=nnx.Rngs(0), **kwargs
    )


def with_random_residual(router):
    """A residual layer that does something: at the start w_out is zero."""
    router.w_out[...] = jax.random.normal(jax.random.key(5), router.w_out.shape)
    return router


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


def test_per_node_is_a_softmax_over_children_at_every_node():
    router = with_random_residual(router_of("per_node", 3, hidden=6, scale=4.0))
    x = np.asarray(embeddings())
    inner = np.maximum(x @ np.asarray(router.w_in[...]), 0)
    y = x + inner @ np.asarray(router.w_out[...])
    for level, nodes in zip(router.level_log_probs(x), router.nodes, strict=True):
        for node, children in enumerate(np.asarray(nodes[...])):
            logits = 4.0 * y @ children.T
            shifted = logits - logits.max(-1, keepdims=True)
            expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
            np.testing.assert_allclose(level[:, node], expected, rtol=1e-4, atol=1e-5)


def test_per_level_is_the_formula_of_the_paper():
    router, x = router_of("per_level", 3), np.asarray(embeddings())
    for h, level in enumerate(router.level_log_probs(x)):
        u, w = np.asarray(router.u[h][...]), np.asarray(router.w[h][...])
        for node, path in enumerate(itertools.product(range(3), repeat=h)):
            one_hots = np.eye(3)[list(path)].reshape(1, -1).repeat(N, 0)
            x_h = np.concatenate([one_hots, x], 1)
            logits = (x_h + np.maximum(x_h @ u, 0)) @ w
            expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            np.testing.assert_allclose(level[:, node], expected, rtol=1e-4, atol=1e-4)


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


def test_a_zero_residual_layer_changes_nothing():
    plain, residual = router_of("per_node"), router_of("per_node", hidden=16)
    residual.start_from([p[...] for p in plain.nodes])
    x = embeddings()
    np.testing.assert_array_equal(plain.leaf_log_probs(x), residual.leaf_log_probs(x))


def test_per_node_path_embedding_agrees_with_shared_nodes():
    router = router_of("per_node", 2)
    q, d = embeddings(seed=1), embeddings(seed=2)
    dot = (router.path_embedding(q) * router.path_embedding(d)).sum(-1)
    p_q, p_d = (jnp.exp(router.leaf_log_probs(x)) for x in (q, d))
    parents_q, parents_d = (p.reshape(N, 3, 3).sum(-1) for p in (p_q, p_d))
    expected = (p_q * p_d).sum(-1) + (parents_q * parents_d).sum(-1)
    np.testing.assert_allclose(dot, expected, rtol=1e-5)


def test_per_level_path_embedding_follows_the_top_1_path():
    router, x = router_of("per_level", 3), embeddings()
    path = router.path_embedding(x).reshape(N, 3, 3)  # (N, H, B)
    np.testing.assert_allclose(path.sum(-1), 1.0, rtol=1e-5)
    leaves, log_p = beam_search(router, x, 1)
    np.testing.assert_allclose(jnp.log(path.max(-1)).sum(-1), log_p[:, 0], rtol=1e-5)
    digits = path.argmax(-1)
    np.testing.assert_array_equal(digits @ jnp.array([9, 3, 1]), leaves[:, 0])


def test_assign_is_argmax_then_the_next_best():
    log_p = router_of("per_node").leaf_log_probs(embeddings())
    np.testing.assert_array_equal(assign(log_p)[:, 0], log_p.argmax(-1))
    expected = np.argsort(-np.asarray(log_p), axis=-1, kind="stable")[:, :3]
    np.testing.assert_array_equal(assign(log_p, 3), expected)
    np.testing.assert_array_equal(assign(jnp.zeros((2, 4)), 2), [[0, 1], [0, 1]])


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


def test_per_node_started_from_nodes_routes_to_the_nearest():
    nodes = [embeddings(3)[None], embeddings(9, seed=2).reshape(3, 3, D)]
    router, x = router_of("per_node", scale=1e3), embeddings()
    router.start_from(nodes)
    leaf, _ = beam_search(router, x, 1)
    first = (x @ nodes[0][0].T).argmax(-1)
    second = jnp.einsum("nd,nbd->nb", x, nodes[1][first]).argmax(-1)
    np.testing.assert_array_equal(leaf[:, 0], 3 * first + second)


def test_per_level_starts_level_1_only():
    router, nodes = router_of("per_level"), [embeddings(3)[None]]
    below = np.asarray(router.w[1][...])
    router.u[0][...] = jnp.zeros((D, D))
    router.start_from(nodes)
    x = embeddings()
    expected = jax.nn.log_softmax(10.0 * x @ nodes[0][0].T)
    np.testing.assert_allclose(
        router.level_log_probs(x)[0][:, 0], expected, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(router.w[1][...], below)


def test_to_numpy_has_the_arrays_of_an_index():
    tree = to_numpy(router_of("per_node", hidden=4, scale=7.0))
    assert tree["kind"] == "per_node" and set(tree) == {
        *("kind", "nodes", "scale", "w_in", "w_out")
    }
    assert [a.shape for a in tree["nodes"]] == [(1, 3, D), (3, 3, D)]
    assert tree["scale"] == pytest.approx(7.0)
    assert set(to_numpy(router_of("per_node"))) == {"kind", "nodes", "scale"}
    tree = to_numpy(router_of("per_level"))
    assert [a.shape for a in tree["u"]] == [(D, D), (D + 3, D + 3)]
    assert [a.shape for a in tree["w"]] == [(D, 3), (D + 3, 3)]
    assert all(type(a) is np.ndarray for a in tree["u"] + tree["w"])


@pytest.mark.parametrize(
    "kwargs,words",
    [
        ({"kind": "per_tree"}, "'per_tree'.*per_node, per_level"),
        ({"height": 0}, "height=0"),
        ({"branching": 1}, "branching=1"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"hidden": -1}, "hidden=-1"),
        ({"kind": "per_level", "hidden": 8}, "hidden=8"),
    ],
)
def test_bad_sizes_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        router_of(**{"kind": "per_node"} | kwargs)


def test_bad_arguments_of_functions_are_refused():
    router, x = router_of("per_node"), embeddings()
    with pytest.raises(ValueError, match="spill=10 .* 9 leaves"):
        assign(router.leaf_log_probs(x), 10)
    for beam in (0, 10):
        with pytest.raises(ValueError, match=f"beam={beam} .* 9 leaves"):
            beam_search(router, x, beam)
    with pytest.raises(ValueError, match="nodes to start from"):
        router.start_from([jnp.zeros((1, 3, D))])
    assert isinstance(router, PerNodeRouter)
    assert isinstance(router_of("per_level"), PerLevelRouter)
