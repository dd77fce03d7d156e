"""The residual head: from the outputs of the tower to embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ehi.model.tower import unit_rows
from ehi.model.tower_ops import gelu


class Head(nnx.Module):
    r"""Linear projection plus a residual part that is zero at the start.

    .. math:: y = \mathrm{unit}(x P + \mathrm{gelu}(x W_{in} + b_{in}) W_{out})

    With W_out = 0 and P = I, step 0 reproduces a normalised tower exactly. A head that
    is narrower than the tower starts from `start_from_pca`.

    Args:
        in_width: T.
        out_width: D <= T.
        hidden: width of the residual part; 0 = none, only P.
        rngs: source of the random start of W_in. P starts as the first D columns of the
            identity.

    Raises:
        ValueError: D > T.
    """

    def __init__(self, in_width: int, out_width: int, *, hidden: int, rngs: nnx.Rngs):
        if out_width > in_width:
            raise ValueError(
                f"head width {out_width} exceeds the tower width {in_width}"
            )
        self.hidden = hidden
        self.projection = nnx.Param(jnp.eye(in_width, out_width))  # (T, D)
        if hidden:
            start = nnx.initializers.lecun_normal()
            self.w_in = nnx.Param(start(rngs.params(), (in_width, hidden)))
            self.b_in = nnx.Param(jnp.zeros(hidden))
            self.w_out = nnx.Param(jnp.zeros((hidden, out_width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tower outputs x (N, T) to unit rows (N, D), float32."""
        # Full precision: with TF32 step 0 would not reproduce the tower on a GPU.
        y = jnp.matmul(x, self.projection[...], precision="highest")  # (N, D)
        if self.hidden:
            inner = gelu(x @ self.w_in[...] + self.b_in[...])
            y = y + inner @ self.w_out[...]
        return unit_rows(y)


def start_from_pca(rows: np.ndarray, out_width: int) -> jax.Array:
    r"""The projection that preserves inner products best: uncentred PCA.

    .. math:: P = \arg\min_{P^T P = I} \|X X^T - X P P^T X^T\|_F

    that is, the top eigenvectors of the second moment X^T X / N. The mean is not
    removed, because that would change inner products.

    Args:
        rows: sample of tower outputs X (N, T).
        out_width: D <= T.

    Returns:
        float32 array (T, D) with orthonormal columns, strongest direction first.

    Raises:
        ValueError: D > T.
    """
    width = rows.shape[1]
    if out_width > width:
        raise ValueError(f"{out_width} components asked of vectors of width {width}")
    rows = jnp.asarray(rows, jnp.float32)
    _, vectors = jnp.linalg.eigh(rows.T @ rows / len(rows))  # ascending order
    return vectors[:, ::-1][:, :out_width]
