"""The order of examples is a pure function of (seed, step): no state to resume."""

from functools import lru_cache

import numpy as np


def batch_rows(
    num_examples: int, batch_size: int, *, seed: int, step: int
) -> np.ndarray:
    """Examples of one training step (N,): every epoch is a permutation of its own.

    Steps read on through the epochs, so a batch may hold the end of one epoch and the
    start of the next, and every example comes up equally often.

    Args:
        num_examples: how many there are.
        batch_size: N.
        seed: of the permutations.
        step: counted from 0.

    Raises:
        ValueError: no examples, a batch size below 1, or a negative step.
    """
    if num_examples < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            "expected num_examples and batch_size of at least 1 and a step of at least "
            f"0, got {num_examples}, {batch_size} and {step}"
        )
    positions = step * batch_size + np.arange(batch_size)  # (N,)
    epochs, places = np.divmod(positions, num_examples)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here] = _permutation(num_examples, seed, epoch)[places[here]]
    return rows


@lru_cache(maxsize=8)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    order.flags.writeable = False
    return order


def split_batch(batch_size: int, weights: dict[str, float]) -> dict[str, int]:
    """Share of every source in a batch; shares add up to `batch_size` exactly.

    share_i = floor(N w_i / sum_j w_j), and what is left over goes, one each, to the
    largest remainders (the first ones, where equal).

    Args:
        batch_size: N.
        weights: source -> weight; a weight of 0 gives no examples.

    Raises:
        ValueError: a negative weight, or none above 0.
    """
    total = sum(weights.values())
    if total <= 0 or min(weights.values()) < 0:
        raise ValueError(
            f"weights must be at least 0 and one of them above 0, got {weights}"
        )
    exact = {name: batch_size * weight / total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    left = batch_size - sum(shares.values())
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[:left]:
        shares[name] += 1
    return shares
