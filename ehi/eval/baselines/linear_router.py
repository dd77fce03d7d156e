"""A linear router that learns which list holds the best document of a query.

Multinomial logistic regression on fixed lists: the weights of a list replace its
centroid, and nothing else of an inverted file changes (Vecchiato, Lucchese, Nardini and
Bruch 2024, "A Learning-to-Rank Formulation of Clustering-Based Approximate Nearest
Neighbor Search", SIGIR, arXiv 2404.11731).
"""

import numpy as np

_EPOCHS, _BATCH = 30, 512
_FIRST, _SECOND, _TINY = 0.9, 0.999, 1e-8  # Adam


def top_lists(
    queries: np.ndarray, documents: np.ndarray, lists: np.ndarray
) -> np.ndarray:
    """The list of the document with the largest inner product: (N,) int64.

    Args:
        queries: (N, D).
        documents: (documents, D).
        lists: (documents,), the list of each document.
    """
    step = max(1, 2**24 // len(documents))
    best = [
        (queries[start : start + step] @ documents.T).argmax(axis=1)
        for start in range(0, len(queries), step)
    ]
    return lists[np.concatenate(best)]


def train_router(
    queries: np.ndarray,
    targets: np.ndarray,
    start: np.ndarray,
    *,
    rate: float,
    seed: int,
    epochs: int = _EPOCHS,
) -> np.ndarray:
    """Fit W so that softmax(W q) has the list of the query's best document.

    Args:
        queries: (N, D), training queries, and documents as queries for themselves.
        targets: (N,), their lists.
        start: (P, D), the first weights: centroids times a scale.
        rate: of Adam; it decays to 0 linearly.
        seed: of the order of the queries.
        epochs: passes over the queries.

    Returns:
        W (P, D) float32.

    Example:
        >>> import numpy as np
        >>> queries = np.eye(2, dtype=np.float32).repeat(8, 0)
        >>> wrong = np.float32([[0, 1], [1, 0]])  # every query starts in another list
        >>> targets = np.arange(2).repeat(8)
        >>> weights = train_router(queries, targets, wrong, rate=0.1, seed=0)
        >>> (queries @ weights.T).argmax(axis=1).tolist() == targets.tolist()
        True
    """
    rng = np.random.default_rng(seed)
    weights = start.astype(np.float32)  # (P, D)
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    per_epoch = -(-len(queries) // _BATCH)
    for step in range(epochs * per_epoch):
        place = step % per_epoch
        if not place:
            order = rng.permutation(len(queries))
        rows = order[place * _BATCH : (place + 1) * _BATCH]
        slope = _softmax(queries[rows] @ weights.T)  # (batch, P)
        slope[np.arange(len(rows)), targets[rows]] -= 1
        gradient = slope.T @ queries[rows] / len(rows)  # (P, D)
        mean += (1 - _FIRST) * (gradient - mean)
        square += (1 - _SECOND) * (gradient**2 - square)
        unbiased = np.sqrt(square / (1 - _SECOND ** (step + 1))) + _TINY
        left = 1 - step / (epochs * per_epoch)
        weights -= rate * left * mean / (1 - _FIRST ** (step + 1)) / unbiased
    return weights


def _softmax(logits):
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exps / exps.sum(axis=1, keepdims=True)
