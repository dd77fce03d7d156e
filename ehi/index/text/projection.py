"""What the dense retrievers ANCE and STAR have on top of RoBERTa."""

from dataclasses import dataclass

import numpy as np

EPS = 1e-5  # PyTorch's default, whatever the layers of the tower have


@dataclass(frozen=True, eq=False)
class Projection:
    r"""NumPy forward of `ehi.model.transformer.Projection`.

    .. math:: y = \mathrm{norm}(W x + b)

    Attributes:
        weight: (T, T), outputs first.
        bias: (T,).
        norm: scale and bias, (T,) each.
    """

    weight: np.ndarray
    bias: np.ndarray
    norm: tuple[np.ndarray, np.ndarray]

    def __call__(self, x):
        """Map pooled vectors x (N, T) to float32 (N, T)."""
        scale, shift = self.norm
        y = x @ self.weight.T + self.bias
        y -= y.mean(axis=1, keepdims=True)
        variance = np.mean(y * y, axis=1, keepdims=True)
        return y / np.sqrt(variance + np.float32(EPS)) * scale + shift
