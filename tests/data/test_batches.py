import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehi.data.batches import batch_rows, split_batch


@given(
    num_examples=st.integers(1, 20),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_every_epoch_is_a_permutation(num_examples, batch_size, seed):
    steps = range(2 * num_examples)
    batches = [
        batch_rows(num_examples, batch_size, seed=seed, step=step) for step in steps
    ]
    epochs = np.concatenate(batches).reshape(-1, num_examples)
    expected = np.arange(num_examples)
    assert (np.sort(epochs, axis=1) == expected).all()


def test_a_pure_function_of_seed_and_step():
    later = batch_rows(100, 8, seed=3, step=57)
    np.testing.assert_array_equal(later, batch_rows(100, 8, seed=3, step=57))
    assert later.tolist() != batch_rows(100, 8, seed=4, step=57).tolist()
    first, second = (batch_rows(100, 100, seed=3, step=step) for step in (0, 1))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("arguments", [(0, 4, 0), (4, 0, 0), (4, 4, -1)])
def test_bad_arguments_are_refused(arguments):
    num_examples, batch_size, step = arguments
    with pytest.raises(
        ValueError, match=f"got {num_examples}, {batch_size} and {step}"
    ):
        batch_rows(num_examples, batch_size, seed=0, step=step)


@given(
    batch_size=st.integers(0, 512),
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(any),
)
def test_shares_add_up_and_are_within_one(batch_size, weights):
    named = {str(number): weight for number, weight in enumerate(weights)}
    shares = split_batch(batch_size, named)
    assert sum(shares.values()) == batch_size
    for name, weight in named.items():
        assert abs(shares[name] - batch_size * weight / sum(weights)) < 1 + 1e-6


def test_shares_by_hand():
    assert split_batch(10, {"train": 2, "pseudo": 1}) == {"train": 7, "pseudo": 3}
    assert split_batch(3, {"train": 1, "pseudo": 0}) == {"train": 3, "pseudo": 0}
    for weights in ({"train": 0}, {"train": -1, "pseudo": 2}):
        with pytest.raises(ValueError, match="train"):
            split_batch(4, weights)
