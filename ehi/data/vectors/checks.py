"""Refuse vectors that nothing can be learned from, in one reading of the file."""

import hashlib
from dataclasses import dataclass

import numpy as np

from ehi.data.vectors.containers import Vectors, chunks
from ehi.data.vectors.metric import UNIT
from ehi.progress import Progress

LARGEST = 2.0**40  # longest vector that an index takes


@dataclass(frozen=True)
class Scan:
    """What one reading of vectors found.

    Attributes:
      sha256: of their values as float32, whatever file holds them.
      norms: the least and the largest.
      uneven: first row that is not of unit length, or -1.
    """

    sha256: str
    norms: tuple[float, float]
    uneven: int


def scan(rows: Vectors, where: str) -> Scan:
    """Read all vectors once.

    Args:
      rows: (N, T).
      where: names them in a message.

    Raises:
      ValueError: there is none, or one is not finite, zero or too long; its row is
        named.
    """
    if not len(rows) or not rows.shape[1]:
        raise ValueError(f"{where} holds no vectors: its shape is {rows.shape}")
    digest, least, most, uneven = hashlib.sha256(), np.inf, 0.0, -1
    label = f"check {where}"
    with Progress(label, len(rows), "vectors", bar=False) as progress:
        for first, block in chunks(rows):
            norms = np.linalg.norm(block.astype(np.float64), axis=1)
            _check(norms, block, first, where)
            away = np.flatnonzero(np.abs(norms - 1) > UNIT)
            if uneven < 0 and len(away):
                uneven = first + int(away[0])
            least, most = min(least, norms.min()), max(most, norms.max())
            digest.update(np.ascontiguousarray(block, "<f4").data)
            progress.update(len(block))
    return Scan(digest.hexdigest(), (float(least), float(most)), uneven)


def _check(norms, block, first: int, where: str) -> None:
    for wrong, what in (
        (~np.isfinite(norms), "has a value that is not finite"),
        (norms == 0, "is a zero vector"),
        (norms > LARGEST, f"is longer than {LARGEST:.3g}"),
    ):
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"{where}: row {first + row} {what}")


def check_queries(queries: Vectors, width: int, where: str) -> None:
    """Refuse queries of another width than the documents'."""
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(
            f"{where}: queries have shape {queries.shape}, but documents have width "
            f"{width}"
        )
