"""Rotations before the quantiser: matrices that stay orthogonal in training.

An embedding x is rotated, ``z = x R``, before it is cut into subvectors. Search works
in the rotated space; training rotates back, ``x_hat = z_hat R'``.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ROTATIONS = ("none", "fixed", "learned", "givens")

# Products rounded to TF32 or bfloat16 on an accelerator would miss the 1e-5 to which
# tests require orthogonality.
_EXACT = jax.lax.Precision.HIGHEST
# The iteration for an inverse stops at this error, which float32 cannot tell from 0
# beside 1.
_TINY_ERROR = 1e-9


@jax.custom_vjp
def cayley(a: jax.Array) -> jax.Array:
    """The Cayley transform of a skew-symmetric matrix: an orthogonal matrix.

    ``Q = (I - A)^-1 (I + A) = 2 (I - A)^-1 - I``. Q is orthogonal for every A, so a
    gradient step needs no repair; A = 0 gives I. The gradient takes two matrix products
    and no second inverse: ``(I - A)^-1 = (I + Q) / 2`` gives
    ``dQ = (I + Q) dA (I + Q) / 2``.

    The inverse is computed by matrix products too. They take 4 ms at D = 384 on one
    core or two. A solve by LAPACK takes 2 ms on one core, but 150 ms on two, where its
    threads compete with XLA's.

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

    ``Y <- Y + Y (I - Y + A Y)`` squares the error ``I - (I - A) Y``. If t is at least
    the spectral norm of A, ``Y_0 = 2 (I + A) / (2 + t^2)`` has an error of at most
    ``e = t^2 / (2 + t^2) < 1``, which gives the number of iterations.

    References:
      Schulz 1933, Iterative Berechnung der reziproken Matrix, ZAMM 13.
    """
    eye = jnp.eye(a.shape[0], dtype=a.dtype)
    square = jnp.max(jnp.sum(jnp.abs(a), 1)) ** 2  # t^2 >= |A|_2^2
    # Below 1 in float32 too: at 1 a huge A would iterate for ever.
    error = jnp.clip(square / (2.0 + square), _TINY_ERROR, 1.0 - 2.0**-23)
    iterations = jnp.ceil(jnp.log2(jnp.log(_TINY_ERROR) / jnp.log(error)))

    def improve(_, inverse):
        # Not I - (I - A) Y: adding small numbers to 1 rounds them to 1e-6.
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
    """An orthogonal matrix ``R = R_0 cayley(U - U')`` in which U is learned.

    R_0 is the identity, or set by `start_from`; training never changes it. It is needed
    because Cayley alone cannot reach every rotation. U is 0 at first, so that R = R_0.
    Convention: ``z = x @ R`` and back ``x = z @ R.T``.

    Args:
      width: D.
      learned: whether there is a U; otherwise R stays R_0.
    """

    def __init__(self, width: int, *, learned: bool = True):
        self.start = nnx.Param(jnp.eye(width))
        self.skew = nnx.Param(jnp.zeros((width, width))) if learned else None

    def matrix(self) -> jax.Array:
        """R (D, D), by a few products: call it once a step. R_0 gets no gradient."""
        start = jax.lax.stop_gradient(self.start[...])
        if self.skew is None:
            return start
        skew = self.skew[...]
        return jnp.dot(start, cayley(skew - skew.T), precision=_EXACT)

    def start_from(self, start: jax.Array) -> None:
        """Set R_0, in place: part of building the model, never of a step.

        Args:
          start: (D, D), orthogonal to 1e-4; from `fit_opq`, for instance.
        """
        self.start[...] = _orthogonal(start, self.start.shape[0])


class GivensRotation(nnx.Module):
    """An orthogonal matrix that the optimiser rotates, plane by plane.

    The parameter is R itself. Only `ehi.train.givens.givens_descent` may update it,
    because any other step would make it lose orthogonality (Poeem: Zhang et al. 2021,
    arXiv 2105.03933; Jiang et al. 2022, arXiv 2203.05082). Convention as in `Rotation`.

    Args:
      width: D.
    """

    def __init__(self, width: int):
        self.turned = nnx.Param(jnp.eye(width))

    def matrix(self) -> jax.Array:
        """R (D, D)."""
        return self.turned[...]

    def start_from(self, start: jax.Array) -> None:
        """Set R to an orthogonal matrix, in place: part of building the model."""
        self.turned[...] = _orthogonal(start, self.turned.shape[0])


def make_rotation(kind: str, width: int) -> Rotation | GivensRotation | None:
    """A rotation of a kind in `ROTATIONS`, the identity at first; None for 'none'."""
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
