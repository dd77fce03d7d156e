"""What a search returns."""

from dataclasses import dataclass

import numpy as np


@dataclass(eq=False, slots=True)
class Hits:
    """Results of N queries.

    Attributes:
        ids: (N, k) external ids, best first: int64 padded with -1, or objects, str
            padded with None.
        scores: (N, k) float32, padded with -inf.
        visited: (N,) int64 copies of documents scored, those in the visited leaves that
            are neither deleted nor filtered out; spilled duplicates count.
        nodes_scored: (N,) int64 tree nodes whose score was computed.
        leaves: (N, b) int64 leaves visited, best first, padded with -1.
        rows: (N, k) int64 document numbers, in the order they were added, padded with
            -1; `compact` gives new ones.
    """

    ids: np.ndarray
    scores: np.ndarray
    visited: np.ndarray
    nodes_scored: np.ndarray
    leaves: np.ndarray
    rows: np.ndarray
