"""The three routers: their formulas, starts and path embeddings."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tree_cases import (
    D,
    N,
    beam_search,
    embeddings,
    router_of,
    with_random_residual,
)

from ehi.model.tree import assign


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


def nearest_router(leaves=6, scale=10.0):
    """A nearest router whose centroids have many lengths, and the centroids."""
    centroids = embeddings(leaves, seed=7) * jnp.linspace(0.3, 2.0, leaves)[:, None]
    router = router_of("nearest", 1, leaves, scale=scale)
    router.start_from([centroids[None]])
    return router, np.asarray(centroids)


def test_nearest_takes_the_leaf_of_the_nearest_centroid():
    router, centroids = nearest_router()
    x = np.asarray(embeddings(200))
    distances = np.square(x[:, None] - centroids).sum(-1)  # (N, P)
    leaves = assign(router.leaf_log_probs(x))
    np.testing.assert_array_equal(leaves, distances.argmin(-1))
    # The largest inner product would choose another leaf.
    assert (leaves != (x @ centroids.T).argmax(-1)).mean() > 0.2
    np.testing.assert_array_equal(beam_search(router, x, 1)[0][:, 0], leaves)


def test_nearest_is_a_softmax_of_squared_distances():
    router, centroids = nearest_router(scale=3.0)
    x = np.asarray(embeddings())
    logits = -3.0 / 2 * np.square(x[:, None] - centroids).sum(-1)  # (N, P)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_p = router.leaf_log_probs(x)
    np.testing.assert_allclose(log_p, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(router.path_embedding(x), np.exp(log_p), rtol=1e-5)


@pytest.mark.parametrize(
    "kwargs,words",
    [
        ({"kind": "per_tree"}, "'per_tree'.*per_node, per_level, nearest"),
        ({"height": 0}, "height=0"),
        ({"branching": 1}, "branching=1"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"hidden": -1}, "hidden=-1"),
        ({"kind": "per_level", "hidden": 8}, "hidden=8"),
        ({"kind": "nearest"}, "one level .* height=2, hidden=0"),
        ({"kind": "nearest", "height": 1, "hidden": 3}, "height=1, hidden=3"),
    ],
)
def test_bad_sizes_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        router_of(**{"kind": "per_node"} | kwargs)
