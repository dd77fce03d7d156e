"""The starts: objectives fall, keys decide, trees hold together, Faiss agrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehi.model.pq import decode, encode
from ehi.train import starts

KEY = jax.random.key(0)


def correlated(rows, width, seed=0, clusters=20):
    """Unit rows in clusters, with a falling spectrum, like text embeddings."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, width + 1) ** -0.6
    centres = rng.normal(size=(clusters, width)) * spectrum
    x = centres[rng.integers(0, clusters, rows)]
    x = x + 0.8 * rng.normal(size=(rows, width)) * spectrum
    x = x @ np.linalg.qr(rng.normal(size=(width, width)))[0]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def cost(x, centroids, chosen):
    return float(((x - np.asarray(centroids)[np.asarray(chosen)]) ** 2).sum(1).mean())


def distortion(x, codebooks, rotation=None):
    z = jnp.asarray(x) if rotation is None else jnp.asarray(x) @ rotation
    z_hat = decode(codebooks, encode(codebooks, z))
    return float(jnp.square(z - z_hat).sum(-1).mean())


X = correlated(400, 12)


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_never_gets_worse_and_assigns_to_the_nearest(spherical):
    costs = []
    for iterations in (0, 1, 2, 4, 8, 16):
        centroids, chosen = starts.kmeans(
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
    whole = starts.kmeans(X, 9, iterations=3, key=KEY)
    monkeypatch.setattr(starts, "_CHUNK", 64)
    jax.clear_caches()
    chunked = starts.kmeans(X, 9, iterations=3, key=KEY)
    jax.clear_caches()
    np.testing.assert_allclose(whole[0], chunked[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(whole[1], chunked[1])


def test_empty_clusters_move_to_where_they_are_needed():
    # 90 copies of one point and 3 others: random rows rarely find all four places.
    places = 5 * np.eye(4, dtype=np.float32)
    x = places[np.r_[np.zeros(90, int), 1, 2, 3]]
    for seed in range(5):
        centroids, chosen = starts.kmeans(x, 4, iterations=8, key=jax.random.key(seed))
        assert cost(x, centroids, chosen) < 1e-6


def test_fits_are_functions_of_their_key():
    def fits(seed):
        key = jax.random.key(seed)
        tree, leaves = starts.kmeans_tree(X, height=2, branching=3, key=key)
        options = {"num_subspaces": 3, "num_codewords": 16, "iterations": 3}
        opq = starts.fit_opq(X, rounds=2, key=key, **options)
        return [np.asarray(a) for a in (*tree, leaves, *opq)]

    first, again, other = fits(1), fits(1), fits(2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("height,branching", [(1, 8), (2, 4), (3, 3)])
def test_tree_rows_take_the_best_child_at_each_level(height, branching):
    nodes, leaves = starts.kmeans_tree(X, height=height, branching=branching, key=KEY)
    shapes = [(branching**h, branching, 12) for h in range(height)]
    assert [level.shape for level in nodes] == shapes
    node = np.zeros(len(X), int)
    for level in map(np.asarray, nodes):
        np.testing.assert_allclose(np.linalg.norm(level, axis=-1), 1.0, rtol=1e-5)
        similarity = np.einsum("nd,nbd->nb", X, level[node])
        node = branching * node + similarity.argmax(1)
    assert (node == np.asarray(leaves)).mean() > 0.99  # the rest are ties of rounding
    assert len(np.unique(leaves)) > 0.8 * branching**height


def test_tree_groups_do_not_leak_into_each_other():
    # Two far groups, in which the two halves are near: level 1 must find the groups.
    angles = np.repeat([0.0, 0.2, 2.0, 2.2], 25) + np.tile(np.arange(25), 4) * 1e-3
    x = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    _, leaves = starts.kmeans_tree(x, height=2, branching=2, key=KEY)
    of_quarter = [set(q.tolist()) for q in np.split(np.asarray(leaves), 4)]
    assert [len(s) for s in of_quarter] == [1, 1, 1, 1]
    first, second, third, fourth = (s.pop() for s in of_quarter)
    assert {first // 2, third // 2} == {0, 1}
    assert first // 2 == second // 2 and third // 2 == fourth // 2
    assert len({first, second, third, fourth}) == 4


def test_tree_children_without_rows_are_distinct_and_near_their_node():
    # Three equal rows among 60: their node has nothing to split.
    x = np.concatenate([X[:57, :6], np.tile(-X[:1, :6], (3, 1))])
    nodes, _ = starts.kmeans_tree(x, height=2, branching=7, key=KEY)
    children = np.asarray(nodes[1])  # (B, B, D)
    assert np.isfinite(children).all()
    for node, its in zip(np.asarray(nodes[0][0]), children, strict=True):
        assert len(np.unique(its.round(6), axis=0)) >= 5
        assert (its @ node).mean() > 0.5


def test_pq_is_kmeans_in_each_subspace_and_improves():
    options = {"num_subspaces": 3, "num_codewords": 16, "key": KEY}
    values = [
        distortion(X, starts.fit_pq(X, iterations=i, **options)) for i in (0, 2, 20)
    ]
    assert values[0] > values[1] > values[2]
    codebooks = np.asarray(starts.fit_pq(X, iterations=20, **options))
    assert codebooks.shape == (3, 16, 4)
    for m, part in enumerate(np.split(X, 3, 1)):
        alone = starts.kmeans(part, 16, key=KEY)
        mine = ((part[:, None] - codebooks[m]) ** 2).sum(-1).min(1).mean()
        assert mine < 1.1 * cost(part, *alone)


def test_opq_is_orthogonal_and_better_than_pq_and_with_every_round():
    options = {"num_subspaces": 3, "num_codewords": 16, "key": KEY}
    fits = {n: starts.fit_opq(X, rounds=n, **options) for n in (0, 5, 30)}
    for rotation, _ in fits.values():
        r = np.asarray(rotation, np.float64)
        assert np.abs(r.T @ r - np.eye(12)).max() < 1e-5
    values = {n: distortion(X, c, r) for n, (r, c) in fits.items()}
    assert values[0] > values[5] > values[30]
    assert values[30] < distortion(X, starts.fit_pq(X, **options))


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match=r"500 clusters .* \(400, 12\)"):
        starts.kmeans(X, 500, key=KEY)
    with pytest.raises(ValueError, match=r"1000 leaves .* \(400, 12\)"):
        starts.kmeans_tree(X, height=3, branching=10, key=KEY)
    bad = X.copy()
    bad[17, 3] = np.nan
    with pytest.raises(ValueError, match="row 17 of 400"):
        starts.kmeans(bad, 5, key=KEY)
    for fit in (starts.fit_pq, starts.fit_opq):
        with pytest.raises(ValueError, match=r"256 codewords .* \(200, 12\)"):
            fit(X[:200], num_subspaces=3, num_codewords=256, key=KEY)
        with pytest.raises(ValueError, match="num_subspaces=5"):
            fit(X, num_subspaces=5, num_codewords=16, key=KEY)


@pytest.mark.faiss
@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_is_as_good_as_faiss(spherical):
    faiss = pytest.importorskip("faiss")
    x = correlated(4000, 32, clusters=100)
    ours = cost(x, *starts.kmeans(x, 64, spherical=spherical, key=KEY))
    theirs = faiss.Kmeans(
        32, 64, niter=25, spherical=spherical, seed=1, max_points_per_centroid=4000
    )
    theirs.train(x)
    chosen = theirs.index.search(x, 1)[1][:, 0]
    assert ours < 1.02 * cost(x, theirs.centroids, chosen)


@pytest.mark.faiss
def test_pq_and_opq_are_as_good_as_faiss():
    faiss = pytest.importorskip("faiss")
    x = correlated(5000, 64, clusters=500)
    options = {"num_subspaces": 8, "num_codewords": 16, "key": KEY}

    def of_faiss(z):
        pq = faiss.ProductQuantizer(64, 8, 4)
        pq.train(z)
        return float(((z - pq.decode(pq.compute_codes(z))) ** 2).sum(1).mean())

    assert distortion(x, starts.fit_pq(x, **options)) < 1.02 * of_faiss(x)
    rotation, codebooks = starts.fit_opq(x, **options)
    matrix = faiss.OPQMatrix(64, 8)
    matrix.pq = faiss.ProductQuantizer(64, 8, 4)
    matrix.train(x)
    assert distortion(x, codebooks, rotation) < 1.02 * of_faiss(matrix.apply(x))
