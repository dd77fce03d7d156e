"""Gradient descent on rotation matrices by turning disjoint pairs of columns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# The largest angle of a step (45 degrees).
_LARGEST = jnp.pi / 4
_TINY = jnp.finfo(jnp.float32).tiny
_EXACT = jax.lax.Precision.HIGHEST


class GivensState(NamedTuple):
    """Steps done, and the moving average of the chosen squared slopes, per matrix."""

    count: jax.Array
    squares: optax.Updates


def givens_descent(
    learning_rate: optax.ScalarOrSchedule, *, every: int, decay: float
) -> optax.GradientTransformation:
    r"""Steepest block-coordinate descent on orthogonal matrices.

    .. math:: A = R^\top G - G^\top R, \quad
      \theta_{ij} = -\eta A_{ij} / \sqrt{v}, \quad R \leftarrow R \prod_{(i, j)}
      (\text{turn of the columns } i, j \text{ by } \theta_{ij})

    `A_ij` is the slope of the loss when columns i and j turn. D/2 disjoint pairs are
    taken greedily by ``|A_ij|``. They commute, so all turn at once and R stays
    orthogonal. v is the unbiased moving average of the mean square of the chosen
    slopes. As in Adam, one rate (radians per step) then serves losses of every scale,
    while the pairs of a step keep the proportions of the gradient. Every `every` steps
    ``R (3 I - R'R) / 2``, a Newton-Schulz step to the nearest orthogonal matrix,
    repairs rounding.

    Args:
      learning_rate: eta in radians per step, or a schedule of it. With a constant rate
        the descent ends within one step of the optimum.
      every: steps between two repairs.
      decay: of the moving average v, from 0 (the last step only) to below 1.

    Returns:
      a transformation of square matrices; its update needs `params`.

    Raises:
      ValueError: `every` is below 1 or `decay` outside [0, 1); in `init`, a parameter
        is not a square matrix; in `update`, there are no `params`.

    References:
      GCD-G: Jiang et al. 2022, arXiv 2203.05082; used by Poeem: Zhang et al. 2021,
      arXiv 2105.03933. The scaling by sqrt(v) is ours.
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
            raise ValueError("givens_descent turns the parameters; pass params")
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

    In each round every free row names its best free partner, and rows that name each
    other become a pair. The heaviest free pair is always among them, so the result is
    that of the greedy choice, in about log D rounds instead of D/2 (Preis 1999, STACS,
    locally heaviest edges).

    Args:
      weights: (D, D), ``|w|`` symmetric; the diagonal is ignored.

    Returns:
      partners (D,) int32; if D is odd, one row is its own partner.
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
        # NaN weights never form a pair; the bound ends the loop.
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
    """Change of the columns, ``r_i (cos t_i - 1) - r_j sin t_i``, with t_j = -t_i."""
    # cos t - 1 would cancel at small angles, and R would grow or shrink at every step.
    less = -2.0 * jnp.square(jnp.sin(angles / 2))
    return matrix * less - matrix[:, partner] * jnp.sin(angles)


def _repaired(matrix: jax.Array, turn: jax.Array, now: jax.Array) -> jax.Array:
    return jax.lax.cond(now, lambda t: _nearest(matrix + t) - matrix, lambda t: t, turn)


def _nearest(matrix: jax.Array) -> jax.Array:
    """One Newton-Schulz step to the nearest orthogonal matrix: error e becomes e^2."""
    gram = jnp.dot(matrix.T, matrix, precision=_EXACT)
    off = jnp.eye(len(matrix), dtype=matrix.dtype) - gram
    return matrix + 0.5 * jnp.dot(matrix, off, precision=_EXACT)
