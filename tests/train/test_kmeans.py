"""k-means and its tree: falling objectives, keys, nodes above their children."""

import jax
import numpy as np
import pytest
from clustered import correlated, cost

from ehi.train import kmeans as kmeans_module
from ehi.train.kmeans import kmeans, kmeans_tree

KEY = jax.random.key(0)
X = correlated(400, 12)


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_never_gets_worse_and_assigns_to_the_nearest(spherical):
    costs = []
    for iterations in (0, 1, 2, 4, 8, 16):
        centroids, chosen = kmeans(
            X, 30, iterations=iterations, spherical=spherical, key=KEY
        )
        distances = ((X[:, None] - np.asarray(centroids)) ** 2).sum(-1)
        np.testing.assert_allclose(
            distances[np.arange(len(X)), chosen], distances.min(1), atol=1e-5
        )
        costs.append(cost(X, centroids, chosen))
    assert all(b <= a + 1e-6 for a, b in zip(costs, costs[1:], strict=False))
    assert costs[-1] < 0.9 * costs[0]
    if spherical:
        norms = np.linalg.norm(centroids, axis=1)
        np.testing.assert_allclose(norms, 1.0, rtol=1e-5)


def test_kmeans_in_chunks_is_kmeans(monkeypatch):
    whole = kmeans(X, 9, iterations=3, key=KEY)
    monkeypatch.setattr(kmeans_module, "_CHUNK", 64)
    jax.clear_caches()
    chunked = kmeans(X, 9, iterations=3, key=KEY)
    jax.clear_caches()
    np.testing.assert_allclose(whole[0], chunked[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole[1], chunked[1])


def test_empty_clusters_move_to_where_they_are_needed():
    # 90 copies of one point and 3 others: random rows rarely find all four places.
    places = 5 * np.eye(4, dtype=np.float32)
    x = places[np.r_[np.zeros(90, int), 1, 2, 3]]
    for seed in range(5):
        centroids, chosen = kmeans(x, 4, iterations=8, key=jax.random.key(seed))
        assert cost(x, centroids, chosen) < 1e-6


@pytest.mark.parametrize("height,branching", [(1, 8), (2, 4), (3, 3)])
def test_tree_rows_take_the_best_child_at_each_level(height, branching):
    nodes, leaves = kmeans_tree(X, height=height, branching=branching, key=KEY)
    shapes = [(branching**h, branching, 12) for h in range(height)]
    assert [level.shape for level in nodes] == shapes
    node = np.zeros(len(X), int)
    for level in map(np.asarray, nodes):
        np.testing.assert_allclose(np.linalg.norm(level, axis=-1), 1.0, rtol=1e-5)
        similarity = np.einsum("nd,nbd->nb", X, level[node])
        node = branching * node + similarity.argmax(1)
    assert (node == np.asarray(leaves)).mean() > 0.99  # others are ties by rounding
    assert len(np.unique(leaves)) > 0.8 * branching**height


def test_tree_groups_do_not_leak_into_each_other():
    # Two groups far apart, each of two near halves: level 1 must find the groups.
    angles = np.repeat([0.0, 0.2, 2.0, 2.2], 25) + np.tile(np.arange(25), 4) * 1e-3
    x = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    _, leaves = kmeans_tree(x, height=2, branching=2, key=KEY)
    of_quarter = [set(q.tolist()) for q in np.split(np.asarray(leaves), 4)]
    assert [len(s) for s in of_quarter] == [1, 1, 1, 1]
    first, second, third, fourth = (s.pop() for s in of_quarter)
    assert {first // 2, third // 2} == {0, 1}
    assert first // 2 == second // 2 and third // 2 == fourth // 2
    assert len({first, second, third, fourth}) == 4


def test_tree_children_without_rows_are_distinct_and_near_their_node():
    # Three equal rows among 60: their node has nothing to split.
    x = np.concatenate([X[:57, :6], np.tile(-X[:1, :6], (3, 1))])
    nodes, _ = kmeans_tree(x, height=2, branching=7, key=KEY)
    children = np.asarray(nodes[1])  # (B, B, D)
    assert np.isfinite(children).all()
    for node, its in zip(np.asarray(nodes[0][0]), children, strict=True):
        assert len(np.unique(its.round(6), axis=0)) >= 5
        assert (its @ node).mean() > 0.5


@pytest.mark.faiss
@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_is_as_good_as_faiss(spherical):
    faiss = pytest.importorskip("faiss")
    x = correlated(4000, 32, clusters=100)
    ours = cost(x, *kmeans(x, 64, spherical=spherical, key=KEY))
    theirs = faiss.Kmeans(
        32, 64, niter=25, spherical=spherical, seed=1, max_points_per_centroid=4000
    )
    theirs.train(x)
    chosen = theirs.index.search(x, 1)[1][:, 0]
    assert ours < 1.02 * cost(x, theirs.centroids, chosen)


def test_fits_are_functions_of_their_key():
    def fits(seed):
        key = jax.random.key(seed)
        tree, leaves = kmeans_tree(X, height=2, branching=3, key=key)
        return [np.asarray(a) for a in (*tree, leaves)]

    first, again, other = fits(1), fits(1), fits(2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match=r"500 clusters .* \(400, 12\)"):
        kmeans(X, 500, key=KEY)
    with pytest.raises(ValueError, match=r"1000 leaves .* \(400, 12\)"):
        kmeans_tree(X, height=3, branching=10, key=KEY)
    bad = X.copy()
    bad[17, 3] = np.nan
    with pytest.raises(ValueError, match="row 17 of 400"):
        kmeans(bad, 5, key=KEY)
