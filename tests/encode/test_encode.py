"""Encoding a corpus: order, buckets, batches, cache."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from ehi.encode import encode as encode_module
from ehi.encode.encode import cached_encode, encode
from ehi.encode.packing import choose_buckets, plan_batches
from ehi.index.text.architectures import Options
from ehi.model.pretrained import Pretrained
from ehi.model.tower import Tower


@dataclasses.dataclass
class FakeTokens:
    """Text i is the token i + 1, repeated `lengths[i]` times."""

    lengths: np.ndarray
    key: str = "texts"

    def __len__(self):
        return len(self.lengths)

    def pad(self, rows, length):
        mask = np.arange(length) < self.lengths[rows][:, None]
        return np.where(mask, rows[:, None] + 1, 0).astype(np.int32), mask


def token_sums(params, ids, mask):
    """Stand-in for a tower: (token, number of tokens, sum of all tokens)."""
    total = jax.numpy.sum(ids * mask, axis=1)
    return jax.numpy.stack([ids[:, 0], mask.sum(1), total * params], axis=1)


@pytest.fixture
def tokens():
    return FakeTokens(np.random.default_rng(0).integers(2, 60, 101))


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
@pytest.mark.parametrize("buckets", [None, (16, 32), (16, 64)])
def test_result_is_in_the_order_of_the_texts(tokens, batch_tokens, buckets):
    apply = jax.jit(token_sums)
    result = encode(apply, 2.0, tokens, batch_tokens=batch_tokens, buckets=buckets)
    name = np.arange(1, 102)
    expected = np.stack([name, tokens.lengths, 2 * name * tokens.lengths], axis=1)
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == np.float32


def test_few_shapes_are_compiled(tokens):
    shapes = set()

    def apply(params, ids, mask):
        shapes.add(ids.shape)
        return token_sums(params, ids, mask)

    encode(apply, 1.0, tokens, batch_tokens=256, buckets=(16, 32, 64))
    # One shape a bucket; the last, partial batch may add one more.
    assert {length for _, length in shapes} == {16, 32, 64}
    assert len(shapes) <= 4


def test_batches_cover_every_text_once_longest_first(tokens):
    batches = plan_batches(tokens.lengths, (16, 32, 64), 256)
    rows = np.concatenate([rows for rows, _, _ in batches])
    assert sorted(rows) == list(range(101))
    assert (np.diff(tokens.lengths[rows]) <= 0).all()
    for rows, length, padded_rows in batches:
        assert tokens.lengths[rows].max() <= length
        assert len(rows) <= padded_rows <= 256 // length
    # Only the last batch may be partial.
    assert all(len(rows) == padded for rows, _, padded in batches[:-1])


def test_small_set_is_not_padded_to_a_full_batch():
    (_, length, padded_rows), *rest = plan_batches(np.array([5, 9, 7]), (16,), 8192)
    assert (length, padded_rows, rest) == (16, 4, [])


def test_buckets_weigh_padding_against_compilation():
    lengths = np.repeat([10, 30, 100], [1000, 1000, 1000])
    assert choose_buckets(lengths, compile_tokens=0) == (16, 32, 100)
    # A bucket of 16 saves 1,000 x 16 tokens.
    assert choose_buckets(lengths, compile_tokens=16_001) == (32, 100)
    assert choose_buckets(lengths, compile_tokens=10**9) == (100,)


def test_padded_rows_never_influence_a_text():
    tokens = FakeTokens(np.array([3, 5, 4]))
    graphdef, params = nnx.split(tiny_tower())
    apply = jax.jit(lambda params, ids, mask: nnx.merge(graphdef, params)(ids, mask))
    together = encode(apply, params, tokens, buckets=(8,))
    alone = [apply(params, *tokens.pad(np.array([i]), 5)) for i in range(3)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "batch_tokens", "message"),
    [([], 8, "no texts to encode"), ([3], 0, "batch_tokens is 0; must be at least 1")],
)
def test_bad_input_is_refused(lengths, batch_tokens, message):
    with pytest.raises(ValueError, match=message):
        encode(
            token_sums, 1.0, FakeTokens(np.array(lengths)), batch_tokens=batch_tokens
        )


def tiny_tower(**changes):
    arguments = {
        "vocab_size": 50,
        "width": 8,
        "num_layers": 1,
        "num_heads": 2,
        "mlp_width": 8,
        "max_positions": 16,
        "type_vocab_size": 0,
    }
    return Tower(**arguments | changes, rngs=nnx.Rngs(0))


def tiny_pretrained(sha256="0" * 64):
    return Pretrained("tiny", Path("tiny"), sha256, "bert", {}, Path("tokenizer"), 16)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Folder of cached arrays."""
    monkeypatch.setenv("EHI_CACHE", str(tmp_path))
    return tmp_path / "encoded"


@pytest.fixture
def count_encodes(monkeypatch):
    calls = []

    def counted(*arguments, **keywords):
        calls.append(1)
        return encode(*arguments, **keywords)

    monkeypatch.setattr(encode_module, "encode", counted)
    return calls


def test_cache_is_used_again(count_encodes, cache):
    tokens = FakeTokens(np.array([3, 5, 4]))
    first = cached_encode(tiny_pretrained(), tiny_tower(), tokens)
    again = cached_encode(tiny_pretrained(), tiny_tower(), tokens)
    assert len(count_encodes) == 1
    np.testing.assert_array_equal(first, again)
    assert isinstance(again, np.memmap)
    assert [path.suffix for path in cache.iterdir()] == [".npy"]


@pytest.mark.parametrize(
    "change",
    [
        {"pretrained": tiny_pretrained("1" * 64)},
        {"tower": tiny_tower(pooling="cls")},
        {"tower": tiny_tower(normalise=False)},
        {"tower": tiny_tower(num_layers=2)},
        {"tower": tiny_tower(dtype=jax.numpy.bfloat16)},
        {"tower": tiny_tower(options=Options(causal=True))},
        {"tokens": FakeTokens(np.array([3, 5, 4]), key="other texts")},
    ],
    ids=["weights", "pooling", "normalise", "layers", "dtype", "options", "texts"],
)
def test_cache_is_keyed_by_all_that_matters(count_encodes, cache, change):
    arguments = {
        "pretrained": tiny_pretrained(),
        "tower": tiny_tower(),
        "tokens": FakeTokens(np.array([3, 5, 4])),
    }
    cached_encode(**arguments)
    cached_encode(**(arguments | change))
    assert len(count_encodes) == 2


def test_activations_of_dense_layers_have_caches_of_their_own(count_encodes, cache):
    tokens = FakeTokens(np.array([3, 5, 4]))
    for activation in ("Tanh", "Identity", "Tanh"):
        layer = {"width": 4, "bias": True, "activation": activation}
        cached_encode(tiny_pretrained(), tiny_tower(dense=[layer]), tokens)
    assert len(count_encodes) == 2


def test_interrupted_encoding_leaves_no_cache(monkeypatch, cache):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_module, "encode", interrupted)
    tokens = FakeTokens(np.array([3]))
    with pytest.raises(KeyboardInterrupt):
        cached_encode(tiny_pretrained(), tiny_tower(), tokens)
    assert not cache.exists() or not list(cache.iterdir())
