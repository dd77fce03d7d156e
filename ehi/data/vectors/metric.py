"""Cosine, inner product and L2 as inner products of unit vectors, exactly.

Training, index and search know unit vectors and their inner products. A metric is
therefore reduced to that: documents and queries are mapped so that the order of the
inner products is the order that the metric asks for.

    cosine   d' = d / |d|                          q' = q / |q|
    ip       d' = [d / r, sqrt(1 - |d|^2 / r^2)]    q' = [q / |q|, 0]
             with r the largest norm of a document (Bachrach et al. 2014, XBOX)
    l2       -|q - d|^2 = 2 <q, d> - |d|^2 - |q|^2, so it is `ip` of
             [d - c, t (|d - c|^2 - m)] and [q - c, -1 / (2 t)]
             with c and m the means of d and |d - c|^2

A code errs about equally in all coordinates, and a query weighs them. If queries are
about as long as documents, the score errs least for ``t^4 = 1 / (4 w)``, with w the
variance of |d - c|^2. Zeros pad the vectors to a width that codes divide.
"""

from dataclasses import dataclass

import numpy as np

from ehi.data.vectors.containers import Vectors, chunks

METRICS = ("cosine", "ip", "l2")
UNIT = 1e-3  # largest error of a unit vector's norm: that of float16
TINY = 1e-30
ABOVE = 1 + 1e-6  # no document is longer than the radius, whatever rounding does


@dataclass(frozen=True, eq=False)
class Metric:
    """Maps of documents and of queries (N, T) to unit vectors (N, D).

    Attributes:
      name: of `METRICS`.
      given: T.
      width: D.
      radius: r of 'ip' and 'l2'.
      centre: c (T,) of 'l2', or None.
      middle, spread: m and t of 'l2'.
    """

    name: str
    given: int
    width: int
    radius: float = 1.0
    centre: np.ndarray | None = None
    middle: float = 0.0
    spread: float = 1.0

    @classmethod
    def fit(cls, name: str, documents: Vectors, multiple: int = 1) -> "Metric":
        """The maps for a corpus, which is read in chunks.

        Args:
          name: of `METRICS`.
          documents: (N, T), finite.
          multiple: D is a multiple of it, where it is not T.

        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> documents, queries = rng.normal(size=(50, 4)), rng.normal(size=(3, 4))
        >>> metric = Metric.fit("l2", documents)
        >>> products = metric.queries(queries) @ metric.documents(documents).T
        >>> far = np.linalg.norm(queries[:, None] - documents, axis=2)
        >>> (products.argmax(1) == far.argmin(1)).all()
        np.True_
        """
        if name not in METRICS:
            raise ValueError(
                f"metric is {name!r}; allowed: {', '.join(map(repr, METRICS))}"
            )
        width = documents.shape[1]
        if name == "cosine":
            return cls(name, width, width)
        centre, middle, spread = None, 0.0, 1.0
        if name == "l2":
            centre = sum(x.sum(0, np.float64) for _, x in chunks(documents))
            centre = (centre / len(documents)).astype(np.float32)
            squares = [_squares(x - centre) for _, x in chunks(documents)]
            squares = np.concatenate(squares)
            middle, varies = float(squares.mean()), float(squares.var())
            spread = (4 * max(varies, TINY)) ** -0.25
        made = cls(name, width, width, 1.0, centre, middle, spread)
        longest = max(_squares(made._lifted(x)).max() for _, x in chunks(documents))
        radius = float(np.sqrt(longest)) * ABOVE
        mapped = reduced_width(name, width, multiple)
        return cls(name, width, mapped, radius, centre, middle, spread)

    def documents(self, x: np.ndarray) -> np.ndarray:
        """Documents (N, T) as unit vectors (N, D) float32."""
        x = np.asarray(x, np.float32)
        if self.name == "cosine":
            return _unit(x)
        made = np.zeros((len(x), self.width), np.float32)
        lifted = self._lifted(x) / self.radius
        made[:, : lifted.shape[1]] = lifted
        rest = np.sqrt(np.maximum(1 - _squares(lifted), 0))
        made[:, lifted.shape[1]] = rest
        return made

    def check_documents(self, x: np.ndarray) -> None:
        """Refuse documents (N, T) that are longer than those of the fit."""
        if self.name == "cosine":
            return
        lengths = np.sqrt(_squares(self._lifted(np.asarray(x, np.float32))))
        longest = int(lengths.argmax())
        if lengths[longest] > self.radius:
            raise ValueError(
                f"document {longest} is {lengths[longest] / self.radius:.4g} times as "
                f"long as the longest that the metric {self.name!r} was fitted to: fit "
                "again with it"
            )

    def queries(self, x: np.ndarray) -> np.ndarray:
        """Queries (N, T) as unit vectors (N, D) float32."""
        x = np.asarray(x, np.float32)
        if self.name == "cosine":
            return _unit(x)
        made = np.zeros((len(x), self.width), np.float32)
        made[:, : x.shape[1]] = x if self.centre is None else x - self.centre
        if self.name == "l2":
            made[:, x.shape[1]] = -1 / (2 * self.spread)
        return _unit(made)

    def _lifted(self, x: np.ndarray) -> np.ndarray:
        """Documents whose inner products with queries have the order of the metric."""
        if self.centre is None:
            return x
        x = x - self.centre
        more = self.spread * (_squares(x) - self.middle)
        return np.concatenate([x, more[:, None]], 1, dtype=np.float32)


def reduced_width(name: str, width: int, multiple: int = 1) -> int:
    """D of a metric for vectors of width T: T, or the next multiple above T.

    >>> [reduced_width(name, 64, 8) for name in METRICS]
    [64, 72, 72]
    """
    more = METRICS.index(name)  # coordinates that the metric adds
    return -(-(width + more) // multiple) * multiple if more else width


def metric_of(name: str, norms: tuple[float, float], row: int, where: str) -> str:
    """The metric that is asked for; unit vectors need no choice.

    Args:
      name: of `METRICS`, or '' for unit vectors.
      norms: least and largest norm of a document.
      row: a row that is not of unit length, if there is one.
      where: names the file.

    Raises:
      ValueError: '' and a vector that is not of unit length.
    """
    if name:
        return name
    least, most = norms
    if least < 1 - UNIT or most > 1 + UNIT:
        raise ValueError(
            f"{where}: row {row} has not unit length (norms are {least:.4g} to "
            f"{most:.4g}), so say how vectors are compared: metric='cosine' (angles), "
            "'ip' (inner products) or 'l2' (distances)"
        )
    return "cosine"


def _squares(x: np.ndarray) -> np.ndarray:
    return np.vecdot(x, x)


def _unit(x: np.ndarray) -> np.ndarray:
    norms = np.sqrt(_squares(x))[:, None]
    return x / np.maximum(norms, TINY)
