"""What all parts of one search share."""

from typing import NamedTuple

import numpy as np


class Job(NamedTuple):
    """The arguments of a search, checked: see `Index.search`.

    Attributes:
        index: the Index, for its parameters.
        contents: its documents at one moment.
        mask: (R,) bool by row, the documents to consider, or None for all.
        k, beam, min_prob, rerank, threads: as the caller gave them.
    """

    index: object
    contents: object
    mask: np.ndarray | None
    k: int
    beam: int
    min_prob: float
    rerank: int
    threads: int

    @property
    def candidates(self):
        """Documents to find of each query."""
        return self.rerank or self.k

    @property
    def copies(self):
        """Copies to find for that: one document may stand in `spill` leaves."""
        return self.candidates * self.index.spill
