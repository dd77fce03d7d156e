"""Properties of the tower and the head, on tiny random ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ehi.encode.encode import apply_module, encode
from ehi.model.head import Head, start_from_pca
from ehi.model.tower import Tower, texts_of_row, unit_rows
from ehi.model.tower_ops import gelu


@functools.cache
def tiny_tower(**changes):
    arguments = {
        "vocab_size": 50,
        "width": 16,
        "num_layers": 2,
        "num_heads": 4,
        "mlp_width": 32,
        "max_positions": 12,
        "type_vocab_size": 2,
    }
    return Tower(**arguments | changes, rngs=nnx.Rngs(0))


@jax.jit
def call(tower, ids, mask):
    return tower(ids, mask)


def tiny_batch(rows=4, length=8):
    rng = np.random.default_rng(0)
    mask = np.arange(length) < rng.integers(2, length + 1, rows)[:, None]
    return np.where(mask, rng.integers(1, 50, mask.shape), 0), mask


def test_padding_does_not_matter():
    tower = tiny_tower()
    ids, mask = tiny_batch()
    garbage = np.full((4, 4), 7)
    wide = np.concatenate([ids, garbage], 1), np.pad(mask, ((0, 0), (0, 4)))
    np.testing.assert_allclose(call(tower, *wide), call(tower, ids, mask), atol=1e-6)


def test_batched_equals_single():
    tower = tiny_tower()
    ids, mask = tiny_batch()
    single = [call(tower, ids[i : i + 1], mask[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(call(tower, ids, mask), single, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_texts_that_share_a_row_do_not_see_each_other(pooling):
    tower = tiny_tower(pooling=pooling)
    ids, mask = tiny_batch(rows=5, length=8)
    lengths = mask.sum(1)
    length = 24  # the 12 positions limit texts, not rows
    shared, segments = np.zeros((2, length), int), np.zeros((2, length), int)
    place = {0: (0, 1), 1: (0, 2), 2: (0, 3), 3: (1, 1), 4: (1, 2)}
    ends = [0, 0]
    for text, (row, name) in place.items():
        at = slice(ends[row], ends[row] + lengths[text])
        shared[row, at], segments[row, at] = ids[text, : lengths[text]], name
        ends[row] = at.stop
    vectors = call(tower, shared, segments)
    assert vectors.shape == (2, texts_of_row(length), 16)
    alone = call(tower, ids, mask)
    for text, (row, name) in place.items():
        np.testing.assert_allclose(vectors[row, name - 1], alone[text], atol=1e-6)
    assert not vectors[0, 3:].any() and not vectors[1, 2:].any()


class Texts:
    """Text i is the token i + 1, repeated `lengths[i]` times."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def __len__(self):
        return len(self.lengths)

    def pad(self, rows, length):
        mask = np.arange(length) < self.lengths[rows][:, None]
        return np.where(mask, rows[:, None] + 1, 0).astype(np.int32), mask


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_encoding_in_shared_rows_is_encoding_a_text_a_row(batch_tokens):
    texts = Texts(np.random.default_rng(0).integers(2, 13, 45))
    graphdef, params = nnx.split(tiny_tower())
    apply = functools.partial(apply_module, graphdef=graphdef)
    expected = encode(apply, params, texts, buckets=(12,))
    found = encode(
        apply, params, texts, batch_tokens=batch_tokens, pack=True, buckets=(32,)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_row_of_padding_is_finite_and_so_is_its_gradient():
    graphdef, params = nnx.split(tiny_tower())
    ids, mask = tiny_batch()
    mask = mask.copy()
    mask[1] = False

    def total(params):
        return nnx.merge(graphdef, params)(ids, mask).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_recomputed_layers_give_the_same_gradients_and_keep_less():
    ids, mask = tiny_batch()
    weights = jax.random.normal(jax.random.key(0), (4, 16))

    def gradient_and_kept(**changes):
        graphdef, params = nnx.split(tiny_tower(**changes))

        def total(params):
            return (nnx.merge(graphdef, params)(ids, mask) * weights).sum()

        backward = jax.eval_shape(lambda params: jax.vjp(total, params)[1], params)
        kept = sum(leaf.size for leaf in jax.tree.leaves(backward))
        return jax.jit(jax.grad(total))(params), kept

    expected, all_kept = gradient_and_kept()
    found, kept = gradient_and_kept(remat=True)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert kept < all_kept / 2


# Only RoBERTa and STAR have these.
STAR = {"type_vocab_size": 1, "projection": True}


@pytest.mark.parametrize("changes", [{}, STAR])
def test_every_parameter_gets_a_gradient(changes):
    graphdef, params = nnx.split(tiny_tower(**changes))
    ids, mask = tiny_batch()
    weights = jax.random.normal(jax.random.key(0), (4, 16))

    @jax.jit
    @jax.grad
    def gradient(params):
        return (nnx.merge(graphdef, params)(ids, mask) * weights).sum()

    for path, leaf in nnx.to_flat_state(gradient(params)):
        assert np.abs(leaf[...]).max() > 0, path


def test_module_holds_nothing_but_parameters():
    assert not jax.tree.leaves(nnx.split(tiny_tower(), nnx.Param, ...)[2])


@pytest.mark.parametrize("changes", [{}, STAR])
def test_bfloat16_is_close_and_keeps_float32_parameters(changes):
    ids, mask = tiny_batch()
    tower = tiny_tower(**changes, dtype=jnp.bfloat16)
    vectors = call(tower, ids, mask)
    assert vectors.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(tower))} == {
        jnp.dtype("float32")
    }
    exact = call(tiny_tower(**changes), ids, mask)
    assert not np.array_equal(vectors, exact)
    np.testing.assert_allclose(vectors, exact, atol=0.03)


def test_pooling_and_normalisation_are_options():
    ids, mask = tiny_batch()
    mean = call(tiny_tower(), ids, mask)
    cls = call(tiny_tower(pooling="cls"), ids, mask)
    raw = call(tiny_tower(normalise=False), ids, mask)
    assert np.abs(mean - cls).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(mean, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit_rows(raw), mean, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "width 16 is not a multiple of num_heads 3"),
        ({"pooling": "sum"}, "pooling 'sum' is not one of"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_tower(**changes)


def test_too_long_input_is_refused():
    ids, mask = tiny_batch(length=13)
    with pytest.raises(ValueError, match="13 tokens exceed the 12 positions"):
        tiny_tower()(ids, mask)


def test_gelu_is_exact():
    x = jnp.linspace(-6, 6, 101)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)


def test_unit_rows_of_zero():
    zero = jnp.zeros((1, 3))
    np.testing.assert_array_equal(unit_rows(zero), zero)
    assert np.isfinite(jax.grad(lambda x: unit_rows(x).sum())(zero)).all()


@pytest.mark.parametrize("hidden", [0, 8])
def test_head_reproduces_the_tower_at_step_0(hidden):
    x = unit_rows(jax.random.normal(jax.random.key(0), (5, 16)))
    head = Head(16, 16, hidden=hidden, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(head(x), x, rtol=2e-7, atol=0)
    assert len(jax.tree.leaves(nnx.state(head))) == (4 if hidden else 1)


def test_head_learns_through_its_zero_start():
    x = jax.random.normal(jax.random.key(0), (5, 16))
    graphdef, params = nnx.split(Head(16, 4, hidden=8, rngs=nnx.Rngs(1)))
    gradient = jax.grad(lambda p: nnx.merge(graphdef, p)(x)[:, 0].sum())(params)
    assert np.abs(gradient["w_out"][...]).max() > 0
    params["w_out"] = params["w_out"].replace(jnp.ones((8, 4)))
    assert np.abs(nnx.merge(graphdef, params)(x) - unit_rows(x[:, :4])).max() > 0.01


def test_pca_start_keeps_inner_products_of_low_rank_rows():
    key = jax.random.key(0)
    # Rank 3 with a large mean: a centred PCA would lose it.
    rows = jax.random.normal(key, (50, 3)) + 2.0
    rows = rows @ jax.random.normal(jax.random.fold_in(key, 1), (3, 16))
    projection = start_from_pca(rows, 3)
    np.testing.assert_allclose(projection.T @ projection, np.eye(3), atol=1e-5)
    small = rows @ projection
    np.testing.assert_allclose(small @ small.T, rows @ rows.T, rtol=1e-3, atol=1e-2)
    head = Head(16, 3, hidden=8, rngs=nnx.Rngs(0))
    head.projection[...] = projection
    np.testing.assert_allclose(head(rows), unit_rows(small), atol=1e-5)


def test_head_refuses_widths_that_do_not_fit():
    with pytest.raises(ValueError, match="head width 8 exceeds the tower width 4"):
        Head(4, 8, hidden=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="8 components asked of vectors of width 4"):
        start_from_pca(np.ones((3, 4)), 8)
