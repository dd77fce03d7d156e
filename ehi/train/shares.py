"""Rows shared over the processes: of P each does every P-th, and all get all."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from ehi.train.processes import barrier

# Rows that a process shows the others at once, on their devices.
GATHERED = 2**17


def own_share() -> slice:
    """The rows that this process does: every P-th, and all where it is alone."""
    return slice(jax.process_index(), None, jax.process_count())


def all_rows(rows: np.ndarray, num: int) -> np.ndarray:
    """What each process made of its own share, put together: the same bits in all.

    Several processes call this together.

    Args:
      rows: of this process's share (about num / P, D), maybe none.
      num: rows of all processes together.

    Returns:
      all rows (num, D).
    """
    processes = jax.process_count()
    if processes == 1 or not num:
        return rows
    share = -(-num // processes)
    rows = np.pad(rows, ((0, share - len(rows)), (0, 0)))
    barrier("rows")  # one that is late is waited for here, not inside a collective
    parts = [
        # (P, n, D): row i of process p is row i P + p of all.
        multihost_utils.process_allgather(rows[i : i + GATHERED]).swapaxes(0, 1)
        for i in range(0, share, GATHERED)
    ]
    return np.concatenate(parts).reshape(-1, rows.shape[1])[:num]
