"""PQ and OPQ fits: distortion falls, rotations are orthogonal, Faiss agrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clustered import correlated, cost

from ehi.model.pq import decode, encode
from ehi.train.kmeans import kmeans
from ehi.train.opq import fit_opq, fit_pq

KEY = jax.random.key(0)
X = correlated(400, 12)


def distortion(x, codebooks, rotation=None):
    z = jnp.asarray(x) if rotation is None else jnp.asarray(x) @ rotation
    z_hat = decode(codebooks, encode(codebooks, z))
    return float(jnp.square(z - z_hat).sum(-1).mean())


def test_pq_is_kmeans_in_each_subspace_and_improves():
    options = {"num_subspaces": 3, "num_codewords": 16, "key": KEY}
    values = [distortion(X, fit_pq(X, iterations=i, **options)) for i in (0, 2, 20)]
    assert values[0] > values[1] > values[2]
    codebooks = np.asarray(fit_pq(X, iterations=20, **options))
    assert codebooks.shape == (3, 16, 4)
    for m, part in enumerate(np.split(X, 3, 1)):
        alone = kmeans(part, 16, key=KEY)
        mine = ((part[:, None] - codebooks[m]) ** 2).sum(-1).min(1).mean()
        assert mine < 1.1 * cost(part, *alone)


def test_opq_is_orthogonal_and_better_than_pq_and_with_every_round():
    options = {"num_subspaces": 3, "num_codewords": 16, "key": KEY}
    fits = {n: fit_opq(X, rounds=n, **options) for n in (0, 5, 30)}
    for rotation, _ in fits.values():
        r = np.asarray(rotation, np.float64)
        assert np.abs(r.T @ r - np.eye(12)).max() < 1e-5
    values = {n: distortion(X, c, r) for n, (r, c) in fits.items()}
    assert values[0] > values[5] > values[30]
    assert values[30] < distortion(X, fit_pq(X, **options))


@pytest.mark.faiss
def test_pq_and_opq_are_as_good_as_faiss():
    faiss = pytest.importorskip("faiss")
    x = correlated(5000, 64, clusters=500)
    options = {"num_subspaces": 8, "num_codewords": 16, "key": KEY}

    def of_faiss(z):
        pq = faiss.ProductQuantizer(64, 8, 4)
        pq.train(z)
        return float(((z - pq.decode(pq.compute_codes(z))) ** 2).sum(1).mean())

    assert distortion(x, fit_pq(x, **options)) < 1.02 * of_faiss(x)
    rotation, codebooks = fit_opq(x, **options)
    matrix = faiss.OPQMatrix(64, 8)
    matrix.pq = faiss.ProductQuantizer(64, 8, 4)
    matrix.train(x)
    assert distortion(x, codebooks, rotation) < 1.02 * of_faiss(matrix.apply(x))


def test_fits_are_functions_of_their_key():
    def fit(seed):
        options = {"num_subspaces": 3, "num_codewords": 16, "iterations": 3}
        return fit_opq(X, rounds=2, key=jax.random.key(seed), **options)

    first, again, other = fit(1), fit(1), fit(2)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_bad_rows_and_sizes_are_refused():
    for fit in (fit_pq, fit_opq):
        with pytest.raises(ValueError, match=r"256 codewords .* \(200, 12\)"):
            fit(X[:200], num_subspaces=3, num_codewords=256, key=KEY)
        with pytest.raises(ValueError, match="num_subspaces=5"):
            fit(X, num_subspaces=5, num_codewords=16, key=KEY)
