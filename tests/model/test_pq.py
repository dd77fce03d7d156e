"""The quantiser: nearest codes, gradients through them, unused codewords moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from ehi.model.pq import ProductQuantiser, decode, encode, revive, update_usage

D, M, K, N = 12, 3, 16, 7


def vectors(rows=N, width=D, seed=1):
    return jax.random.normal(jax.random.key(seed), (rows, width))


def quantiser():
    return ProductQuantiser(D, num_subspaces=M, num_codewords=K, rngs=nnx.Rngs(0))


def test_encode_finds_the_nearest_codeword():
    pq, z = quantiser(), 0.3 * vectors(50)
    books = np.asarray(pq.codebooks[...])
    parts = np.asarray(z).reshape(50, M, 1, D // M)
    expected = ((parts - books) ** 2).sum(-1).argmin(-1)
    codes = pq.encode(z)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(pq.encode(z[3:4]), codes[3:4])


def test_ties_go_to_the_first_codeword():
    books = jnp.tile(vectors(1, D // M), (M, K, 1))
    assert not encode(books, vectors()).any()


def test_decode_puts_codewords_side_by_side_and_codes_survive():
    pq = quantiser()
    codes = jax.random.randint(jax.random.key(2), (N, M), 0, K)
    books = np.asarray(pq.codebooks[...])
    expected = np.stack([np.concatenate(books[range(M), row]) for row in codes])
    np.testing.assert_array_equal(pq.decode(codes), expected)
    np.testing.assert_array_equal(pq.encode(pq.decode(codes)), codes)


def test_straight_through_value_is_the_reconstruction():
    pq, z = quantiser(), vectors()
    codes = pq.encode(z)
    through = jax.jit(pq.straight_through)(z, codes)
    np.testing.assert_array_equal(through, pq.decode(codes))


def test_straight_through_gradients_reach_vectors_and_chosen_codewords():
    pq, z, upstream = quantiser(), 0.3 * vectors(), vectors(seed=2)
    graphdef, params = nnx.split(pq, nnx.Param)

    def loss(params, z, **options):
        pq = nnx.merge(graphdef, params)
        return jnp.sum(pq.straight_through(z, pq.encode(z), **options) * upstream)

    to_params, to_z = jax.grad(loss, (0, 1))(params, z)
    np.testing.assert_allclose(to_z, upstream, rtol=1e-6)
    expected = np.zeros((M, K, D // M), np.float32)
    codes = np.asarray(pq.encode(z))
    np.add.at(
        expected, (np.arange(M), codes), np.asarray(upstream).reshape(N, M, D // M)
    )
    (to_books,) = jax.tree.leaves(to_params)
    np.testing.assert_allclose(to_books, expected, rtol=1e-5, atol=1e-6)
    stopped, to_z = jax.grad(
        lambda params, z: loss(params, z, codeword_gradient=False), (0, 1)
    )(params, z)
    np.testing.assert_allclose(to_z, upstream, rtol=1e-6)
    assert not np.any(jax.tree.leaves(stopped)[0])


def test_frozen_codes_outlive_the_codebooks_that_gave_them():
    pq = ProductQuantiser(
        D, num_subspaces=M, num_codewords=K, frozen_codes=True, rngs=nnx.Rngs(0)
    )
    books = jax.random.normal(jax.random.key(5), pq.codebooks.shape)
    pq.start_from(books)
    before = pq.encode(vectors())
    pq.codebooks[...] = books[:, ::-1]  # all codewords change
    np.testing.assert_array_equal(pq.encode(vectors()), before)
    assert not np.allclose(pq.decode(before), decode(books, before))


def test_gradient_of_decode_matches_finite_differences():
    codes = jax.random.randint(jax.random.key(2), (N, M), 0, K)
    books = quantiser().codebooks[...]
    check_grads(lambda b: jnp.sin(decode(b, codes)), (books,), order=1, modes=("rev",))


def test_usage_is_a_moving_average_of_shares():
    codes = jnp.array([[0, 1], [0, 2], [3, 1], [0, 1]])
    usage = update_usage(jnp.full((2, 4), 0.25), codes, 0.0)
    np.testing.assert_allclose(usage, [[0.75, 0, 0, 0.25], [0, 0.75, 0.25, 0]])
    slow = update_usage(jnp.full((2, 4), 0.25), codes, 0.9)
    np.testing.assert_allclose(slow, 0.9 * 0.25 + 0.1 * usage, rtol=1e-6)
    np.testing.assert_allclose(slow.sum(-1), 1.0, rtol=1e-6)


def test_revive_moves_only_dead_codewords_onto_data():
    books, z = quantiser().codebooks[...], vectors()
    usage = jnp.full((M, K), 1 / K).at[1, 4].set(0.0).at[2, 0].set(1e-4)
    parts = z.reshape(N, M, D // M)
    alive = revive(books, usage, parts, jax.random.key(0), threshold=0.1 / K)
    changed = (alive != books).any(-1)
    assert np.argwhere(changed).tolist() == [[1, 4], [2, 0]]
    for m, k in ((1, 4), (2, 0)):
        assert (parts[:, m] == alive[m, k]).all(-1).any()
    # A row of the data is nearest to itself, so the moved codewords are now chosen.
    assert (encode(alive, z)[:, 1] == 4).any()
    again = revive(books, usage, parts, jax.random.key(0), threshold=0.1 / K)
    np.testing.assert_array_equal(alive, again)


@pytest.mark.parametrize(
    "sizes,words",
    [
        ((D, 5, 16), "width 12 .*num_subspaces=5"),
        ((D, 0, 16), "num_subspaces=0"),
        ((D, 3, 32), "num_codewords=32 .*16, 256"),
    ],
)
def test_bad_sizes_are_refused(sizes, words):
    width, m, k = sizes
    with pytest.raises(ValueError, match=words):
        ProductQuantiser(width, num_subspaces=m, num_codewords=k, rngs=nnx.Rngs(0))
