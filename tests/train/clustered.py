"""Rows like text embeddings, for the tests of k-means, PQ and OPQ."""

import numpy as np


def correlated(rows, width, seed=0, clusters=20):
    """Unit rows in clusters, with a falling spectrum, like text embeddings."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, width + 1) ** -0.6
    centres = rng.normal(size=(clusters, width)) * spectrum
    x = centres[rng.integers(0, clusters, rows)]
    x = x + 0.8 * rng.normal(size=(rows, width)) * spectrum
    x = x @ np.linalg.qr(rng.normal(size=(width, width)))[0]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def cost(x, centroids, chosen):
    return float(((x - np.asarray(centroids)[np.asarray(chosen)]) ** 2).sum(1).mean())
