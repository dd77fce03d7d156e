"""Rotations before the quantiser: orthogonal matrices that stay orthogonal in training.

An embedding x is rotated, ``z = x R``, before it is cut into the subvectors of its
code. Search never leaves the rotated space, training returns by ``x_hat = z_hat R'``.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ROTATIONS = ("none", "fixed", "learned", "givens")

# Orthogonality is tested to 1e-5, which products rounded to TF32 or bfloat16 on an
# accelerator do not reach.
_EXACT = jax.lax.Precision.HIGHEST
# Of an inverse by iteration: what float32 cannot see.
_TINY_ERROR = 1e-9


@jax.custom_vjp
def cayley(a: jax.Array) -> jax.Array:
    """The Cayley transform of a skew-symmetric matrix: an orthogonal matrix.

    ``Q = (I - A)^-1 (I + A) = 2 (I - A)^-1 - I``. It is orthogonal whatever A is, so
    there is nothing to repair after a gradient step, and A = 0 gives I. The gradient
    costs two matrix products and no second inverse: ``(I - A)^-1 = (I + Q) / 2``, so
    that ``dQ = (I + Q) dA (I + Q) / 2``.

    The inverse is made of matrix products as well, because a solve by LAPACK, whose
    threads fight with XLA's for the cores, takes 150 ms at D = 384 on 2 cores, and 2 ms
    on one; this takes 4 ms on either.

    Args:
      a: A (D, D) with ``A' = -A``.

    Returns:
      Q (D, D), a rotation that has no eigenvalue -1.

    References:
      Wen and Yin 2013, A feasible method for optimization with orthogonality
      constraints, Mathematical Programming 142 (the transform and its derivative).
    """
    return 2.0 * _inverse(a) - jnp.eye(a.shape[0], dtype=a.dtype)


def _inverse(a: jax.Array) -> jax.Array:
    """(I - A)^-1 (D, D) of a skew-symmetric A, by Newton's iteration.

    ``Y <- Y + Y (I - Y + A Y)``, which squares the error ``I - (I - A) Y``. With t no
    less than the spectral norm of A, ``Y_0 = 2 (I + A) / (2 + t^2)`` has errors of at
    most ``e = t^2 / (2 + t^2) < 1``, so the number of iterations is known beforehand.

    References:
      Schulz 1933, Iterative Berechnung der reziproken Matrix, ZAMM 13.
    """
    eye = jnp.eye(a.shape[0], dtype=a.dtype)
    square = jnp.max(jnp.sum(jnp.abs(a), 1)) ** 2  # t^2 >= |A|_2^2
    # Below 1 in float32 too, or an A of enormous size would need iterations for ever.
    error = jnp.clip(square / (2.0 + square), _TINY_ERROR, 1.0 - 2.0**-23)
    iterations = jnp.ceil(jnp.log2(jnp.log(_TINY_ERROR) / jnp.log(error)))

    def improve(_, inverse):
        # Not I - (I - A) Y: sums of small numbers onto 1 round to 1e-6.
        left = eye - inverse + jnp.dot(a, inverse, precision=_EXACT)
        return inverse + jnp.dot(inverse, left, precision=_EXACT)

    start = (eye + a) * (2.0 / (2.0 + square))
    return jax.lax.fori_loop(0, iterations.astype(jnp.int32), improve, start)


def _cayley_forward(a):
    q = cayley(a)
    return q, q


def _cayley_backward(q, gradient):
    half = (jnp.eye(q.shape[0], dtype=q.dtype) + q).T  # 2 (I - A)^-T
    left = jnp.dot(half, gradient, precision=_EXACT)
    return (0.5 * jnp.dot(left, half, precision=_EXACT),)


cayley.defvjp(_cayley_forward, _cayley_backward)


class Rotation(nnx.Module):
    """An orthogonal matrix ``R = R_0 cayley(U - U')``, of which U is learned.

    The start R_0 (that of `fit_opq`, say) stays as it is: Cayley alone cannot reach
    every rotation, and R = R_0 at the start because U = 0. Convention: ``z = x @ R``
    and back ``x = z @ R.T``.

    Args:
      width: D.
      start: R_0 (D, D), orthogonal to 1e-4; None for the identity.
      learned: whether there is a U; without, R is R_0 for good.
    """

    def __init__(
        self, width: int, *, start: jax.Array | None = None, learned: bool = True
    ):
        start = jnp.eye(width) if start is None else _orthogonal(start, width)
        self.start = nnx.Param(start)
        self.skew = nnx.Param(jnp.zeros_like(start)) if learned else None

    def matrix(self) -> jax.Array:
        """R (D, D), a few products: call it once a step. No gradient reaches R_0."""
        start = jax.lax.stop_gradient(self.start[...])
        if self.skew is None:
            return start
        skew = self.skew[...]
        return jnp.dot(start, cayley(skew - skew.T), precision=_EXACT)

    def start_from(self, start: jax.Array) -> None:
        """Take over R_0, in place: part of building the model, never of a step."""
        self.start[...] = _orthogonal(start, self.start.shape[0])


class GivensRotation(nnx.Module):
    """An orthogonal matrix that the optimiser itself turns, plane by plane.

    The other way to learn a rotation: the parameter is R, and only
    `ehi.train.givens.givens_descent` may update it, because any other step would leave
    the orthogonal matrices (Poeem: Zhang et al. 2021, arXiv 2105.03933; Jiang et al.
    2022, arXiv 2203.05082). Convention as of `Rotation`.

    Args:
      width: D.
    """

    def __init__(self, width: int):
        self.turned = nnx.Param(jnp.eye(width))

    def matrix(self) -> jax.Array:
        """R (D, D)."""
        return self.turned[...]

    def start_from(self, start: jax.Array) -> None:
        """Take over an orthogonal matrix, in place: part of building the model."""
        self.turned[...] = _orthogonal(start, self.turned.shape[0])


def make_rotation(kind: str, width: int) -> Rotation | GivensRotation | None:
    """The rotation of a kind of `ROTATIONS`, the identity at first; None for 'none'."""
    if kind not in ROTATIONS:
        raise ValueError(
            f"rotation={kind!r} is unknown; allowed: {', '.join(map(repr, ROTATIONS))}"
        )
    if kind == "none":
        return None
    if kind == "givens":
        return GivensRotation(width)
    return Rotation(width, learned=kind == "learned")


def _orthogonal(start, width: int) -> jax.Array:
    start = np.asarray(start, np.float32)
    if start.shape != (width, width):
        raise ValueError(
            f"a rotation of width {width} cannot start from shape {start.shape}"
        )
    error = np.abs(start.T @ start - np.eye(width)).max()
    if not error < 1e-4:
        raise ValueError(
            f"the start of a rotation must be orthogonal: R'R is off by {error:.1e}"
        )
    return jnp.asarray(start)
