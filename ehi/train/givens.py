"""Gradient descent on rotations by Givens rotations of disjoint pairs of columns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# A step turns no pair of columns further than this (45 degrees).
_LARGEST = jnp.pi / 4
_TINY = jnp.finfo(jnp.float32).tiny
_EXACT = jax.lax.Precision.HIGHEST


class GivensState(NamedTuple):
    """Steps done, and for each matrix the moving average of the squares chosen."""

    count: jax.Array
    squares: optax.Updates


def givens_descent(
    learning_rate: optax.ScalarOrSchedule, *, every: int = 1000, decay: float = 0.99
) -> optax.GradientTransformation:
    r"""Steepest block-coordinate descent on orthogonal matrices.

    .. math:: A = R^\top G - G^\top R, \quad
      \theta_{ij} = -\eta A_{ij} / \sqrt{v}, \quad R \leftarrow R \prod_{(i, j)}
      (\text{turn of the columns } i, j \text{ by } \theta_{ij})

    `A_ij` is the slope of the loss at a turn of columns i and j. D/2 disjoint pairs are
    taken greedily by ``|A_ij|``; they commute, so all turn at once and R stays
    orthogonal. v is the moving average, without bias, of the mean square of the chosen
    slopes: as in Adam, one rate (radians a step) serves losses of every scale, but the
    proportions between the pairs of a step remain those of the gradient. Rounding
    is repaired every `every` steps by ``R (3 I - R'R) / 2``, a Newton-Schulz step to
    the nearest orthogonal matrix.

    Args:
      learning_rate: eta, or a schedule of it; with a constant rate the descent ends as
        near to the optimum as one step reaches.
      every: steps between two repairs.
      decay: of the moving average v, from 0 (this step alone) to below 1.

    Returns:
      a transformation of square matrices; its update needs `params`.

    Raises:
      ValueError: for every < 1 or a decay outside [0, 1); in `init` for a parameter
        that is not a square matrix, in `update` without params.

    References:
      Jiang et al. 2022, arXiv 2203.05082 (GCD-G), the learned rotation of Poeem: Zhang
      et al. 2021, arXiv 2105.03933. Here the scaling by sqrt(v) is added.
    """
    if every < 1 or not 0 <= decay < 1:
        raise ValueError(f"every={every} must be >= 1 and decay={decay} in [0, 1)")

    def init(params):
        for matrix in jax.tree.leaves(params):
            _check_square(matrix)
        squares = jax.tree.map(lambda _: jnp.zeros(()), params)
        return GivensState(jnp.zeros((), jnp.int32), squares)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("givens_descent turns the parameters: pass params")
        count = state.count + 1
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        slopes = jax.tree.map(_slopes, updates, params)
        partners = jax.tree.map(greedy_pairs, slopes)
        chosen = jax.tree.map(_of_pairs, slopes, partners)
        squares = jax.tree.map(
            lambda v, a: decay * v + (1 - decay) * jnp.mean(a * a),
            state.squares,
            chosen,
        )

        def change(matrix, partner, slope, v):
            size = jnp.sqrt(jnp.maximum(v / (1 - decay**count), _TINY))
            angles = jnp.clip(-rate * slope / size, -_LARGEST, _LARGEST)
            turn = _turn(matrix, partner, angles)
            return _repaired(matrix, turn, count % every == 0)

        changes = jax.tree.map(change, params, partners, chosen, squares)
        return changes, GivensState(count, squares)

    return optax.GradientTransformation(init, update)


def greedy_pairs(weights: jax.Array) -> jax.Array:
    """Disjoint pairs (i, j), taken by decreasing ``|w_ij|`` until none is left.

    In place of one pair after the other: every free row names its best free partner,
    and rows that name each other are a pair. The heaviest pair that is left always is
    one, so the result is that of the greedy choice, in about log D rounds instead of
    D/2 (Preis 1999, STACS, locally heaviest edges).

    Args:
      weights: (D, D), ``|w|`` symmetric; the diagonal is not looked at.

    Returns:
      partners (D,) int32; of odd D one row remains, its own partner.
    """
    d = weights.shape[0]
    number = jnp.arange(d, dtype=jnp.int32)
    heavy = jnp.where(number[:, None] == number, -1.0, jnp.abs(weights))

    def pair(state):
        partner, free, rounds = state
        allowed = jnp.where(free, heavy, -1.0)  # (D, D)
        best = jnp.argmax(allowed, -1).astype(jnp.int32)
        mutual = free & free[best] & (best[best] == number) & (best != number)
        return jnp.where(mutual, best, partner), free & ~mutual, rounds + 1

    def some_left(state):
        # Not a number names nobody: without the bound it would go on for ever.
        return (state[1].sum() > 1) & (state[2] < (d + 1) // 2)

    start = number, jnp.ones(d, bool), jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(some_left, pair, start)[0]


def _check_square(matrix: jax.Array) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"givens_descent needs square matrices, got shape {matrix.shape}"
        )


def _slopes(gradient: jax.Array, matrix: jax.Array) -> jax.Array:
    product = jnp.dot(matrix.T, gradient, precision=_EXACT)
    return product - product.T  # A (D, D)


def _of_pairs(slopes: jax.Array, partner: jax.Array) -> jax.Array:
    return jnp.take_along_axis(slopes, partner[:, None], 1)[:, 0]  # (D,)


def _turn(matrix: jax.Array, partner: jax.Array, angles: jax.Array) -> jax.Array:
    """How the columns change: ``r_i (cos t_i - 1) - r_j sin t_i``, where t_j = -t_i."""
    # cos t - 1 would cancel at small angles, and R would grow or shrink step by step.
    less = -2.0 * jnp.square(jnp.sin(angles / 2))
    return matrix * less - matrix[:, partner] * jnp.sin(angles)


def _repaired(matrix: jax.Array, turn: jax.Array, now: jax.Array) -> jax.Array:
    return jax.lax.cond(now, lambda t: _nearest(matrix + t) - matrix, lambda t: t, turn)


def _nearest(matrix: jax.Array) -> jax.Array:
    """One Newton-Schulz step to the nearest orthogonal matrix: error e becomes e^2."""
    gram = jnp.dot(matrix.T, matrix, precision=_EXACT)
    off = jnp.eye(len(matrix), dtype=matrix.dtype) - gram
    return matrix + 0.5 * jnp.dot(matrix, off, precision=_EXACT)
