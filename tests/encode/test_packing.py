"""Packed rows hold every text once; its vector is the same as in a row of its own."""

import functools
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from ehi.data.tokens import tokenise
from ehi.encode.encode import apply_module, encode
from ehi.encode.packing import choose_packed_lengths, pack_batches
from ehi.model.pretrained import load_tower, resolve
from ehi.model.tower import texts_of_row

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize("batch_tokens", [100, 256, 4096])
def test_shared_rows_hold_every_text_once_and_little_padding(batch_tokens):
    lengths = np.random.default_rng(0).integers(2, 257, 400)
    assert choose_packed_lengths(lengths) == (128, lengths.max())
    assert choose_packed_lengths(np.array([5, 9])) == (128,)
    assert choose_packed_lengths(np.array([130])) == (130,)
    assert choose_packed_lengths(np.array([513])) == (128, 256, 513)
    batches = list(pack_batches(lengths, (128, 256), batch_tokens))
    rows = [row for rows, _, _ in batches for row in rows]
    assert sorted(text for row in rows for text in row) == list(range(400))
    total = 0
    for rows, length, padded in batches:
        assert len(rows) <= padded <= max(1, batch_tokens // length)
        assert all(lengths[row].sum() <= length for row in rows)
        assert all(1 <= len(row) <= texts_of_row(length) for row in rows)
        total += padded * length
    assert total < 1.1 * lengths.sum() + batch_tokens
    # Only the last batch may be partial, so there are at most three shapes.
    for rows, length, padded in batches[:-1]:
        assert len(rows) == padded == max(1, batch_tokens // length)


@pytest.mark.parametrize("name", ["roberta_tiny", "star_tiny"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_roberta_counts_positions_in_every_text_of_a_row(name, pooling):
    pretrained = resolve(FIXTURES / name)
    rng = np.random.default_rng(0)
    words = np.array(["hello", "world", "dose", "a", "with", "years"])
    texts = [" ".join(rng.choice(words, size)) for size in rng.integers(0, 9, 30)]
    tokens = tokenise(
        texts, tokenizer_file=pretrained.tokenizer_file, max_length=40, cache_dir=None,
        name="texts",
    )  # fmt: skip
    tower = load_tower(pretrained)
    tower.pooling = pooling
    graphdef, params = nnx.split(tower)
    apply = functools.partial(apply_module, graphdef=graphdef)
    single = encode(apply, params, tokens, buckets=(40,))
    shared = encode(apply, params, tokens, pack=True, buckets=(128,))
    np.testing.assert_allclose(shared, single, atol=5e-6)
