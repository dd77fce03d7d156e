import numpy as np
import pytest

from ehi.model.encoder import texts_of_row
from ehi.train.rows import choose_shared_rows, share_batches


@pytest.mark.parametrize("batch_tokens", [100, 256, 4096])
def test_shared_rows_hold_every_text_once_and_little_padding(batch_tokens):
    lengths = np.random.default_rng(0).integers(2, 257, 400)
    assert choose_shared_rows(lengths) == (128, lengths.max())
    assert choose_shared_rows(np.array([5, 9])) == (128,)
    assert choose_shared_rows(np.array([130])) == (130,)
    assert choose_shared_rows(np.array([513])) == (128, 256, 513)
    batches = list(share_batches(lengths, (128, 256), batch_tokens))
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
