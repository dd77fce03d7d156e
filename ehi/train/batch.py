"""A batch: N queries and one pool of C candidate documents for all of them.

In-batch negatives, mined negatives and the softmax over a whole corpus differ only in
which documents are in the pool. A batch is a pure function of (seed, step).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class TrainingSet:
    """Queries of every source, the documents, and the pairs that join them.

    Attributes:
      num_queries: rows of the query table, which all sources share.
      num_documents: rows of the document table.
      pairs: source, as 'labelled' or 'pseudo' -> query rows, document rows.
      query_tokens, document_tokens: `TokenArray`s, when the tower is trained.
    """

    num_queries: int
    num_documents: int
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
    query_tokens: object | None = None
    document_tokens: object | None = None
    _positives: tuple[np.ndarray, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self):
        queries = np.concatenate([q for q, _ in self.pairs.values()])
        documents = np.concatenate([d for _, d in self.pairs.values()])
        order = np.lexsort((documents, queries))
        counts = np.bincount(queries, minlength=self.num_queries)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        object.__setattr__(self, "_positives", (offsets, documents[order]))

    @functools.cached_property
    def most_positives(self) -> int:
        """Known positives of the query that has most."""
        return int(np.diff(self._positives[0]).max())

    def positives(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All known positives of queries: positions in `queries`, document rows."""
        offsets, documents = self._positives
        counts = offsets[queries + 1] - offsets[queries]
        position = np.repeat(np.arange(len(queries)), counts)
        first = np.repeat(offsets[queries] - np.cumsum(counts) + counts, counts)
        return position, documents[first + np.arange(len(position))]


def make_batch(
    data: TrainingSet,
    *,
    batch_size: int,
    pool: int,
    sources: Mapping[str, float],
    source_weights: Mapping[str, float],
    seed: int,
    step: int,
    mined: np.ndarray | None = None,
    mined_per_query: int = 0,
    lists_positives: bool = False,
    query_length: int = 0,
    document_length: int = 0,
    encoded: int = 0,
    own: Callable[[int], slice] | None = None,
) -> dict[str, np.ndarray]:
    """The batch of one step.

    Args:
      data: the training set.
      batch_size: N.
      pool: C; the whole corpus if it is at least as large as that.
      sources: source -> share of the batch.
      source_weights: source -> weight of its rows in the contrastive terms.
      seed, step: what the batch is a pure function of.
      mined: hard negatives (num_queries, m), padded with -1.
      mined_per_query: how many of them enter the pool for each query.
      lists_positives: also list all known positives of each query.
      query_length, document_length: tokens, when the tower is trained.
      encoded: E, queries and documents that have tokens, the first of the batch and of
        the pool; 0 for all.
      own: number of rows -> those of them that this process holds, of queries and of
        documents; None for all. Which rows there are does not depend on it.

    Returns:
      queries (N,) and documents (C,) rows; target (N,) position in the pool of the
      row's own positive; where (N, C), False for its *other* known positives,
      which are no negatives; weights (N,); where asked for `positives` (N, A) document
      rows padded with -1, A being the most that any query has; with a trained tower
      `queries_ids, queries_mask (N, L)`, `documents_ids, documents_mask (C, L)`, or of
      the first E rows.

    Raises:
      ValueError: fewer than E of the queries have tokens.
    """
    queries, positives, weight = _sample(
        data, batch_size, sources, source_weights, seed, step
    )
    if encoded:
        first = _with_tokens_first(data, queries, encoded)
        queries, positives, weight = queries[first], positives[first], weight[first]
    documents = _pool(
        data, queries, positives, pool, seed, step, mined, mined_per_query, encoded
    )
    own = own or slice
    read = queries[: encoded or None], documents[: encoded or None]
    of_queries, of_documents = own(len(queries)), own(len(documents))
    queries, positives = queries[of_queries], positives[of_queries]
    row, known = data.positives(queries)
    target, where = _match(data.num_documents, documents, positives, row, known)
    documents = documents[of_documents]
    batch = {
        "queries": queries.astype(np.int32),
        "documents": documents.astype(np.int32),
        "target": target.astype(np.int32),
        "where": where,
        "weights": weight[of_queries].astype(np.float32),
    }
    if lists_positives:
        batch["positives"] = _listed(row, known, (len(queries), data.most_positives))
    if query_length:
        sides = (
            ("queries", data.query_tokens, query_length),
            ("documents", data.document_tokens, document_length),
        )
        for (side, tokens, length), rows in zip(sides, read, strict=True):
            padded = tokens.pad(rows[own(len(rows))], length)
            batch[f"{side}_ids"], batch[f"{side}_mask"] = padded
    return batch


def drawn_queries(
    data: TrainingSet, *, batch_size: int, sources: Mapping[str, float], seed: int,
    steps: int,
) -> np.ndarray:  # fmt: skip
    """The rows of the query table that the batches of a phase hold, ascending."""
    drawn = np.zeros(data.num_queries, bool)
    for step in range(steps):
        drawn[_sample(data, batch_size, sources, {}, seed, step)[0]] = True
    return np.flatnonzero(drawn)


def _match(num_documents, documents, positives, row, known):
    """Each row's own positive in the pool (N,), and where (N, C) are no others."""
    place = np.full(num_documents, -1)
    place[documents] = np.arange(len(documents))
    target = place[positives]  # (N,)
    where = np.ones((len(positives), len(documents)), bool)  # (N, C)
    inside = place[known] >= 0
    where[row[inside], place[known[inside]]] = False
    where[np.arange(len(positives)), target] = True
    return target, where


def _listed(row: np.ndarray, known: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Known positives of each query (N, A), padded with -1; `row` ascends."""
    listed = np.full(shape, -1, np.int32)
    column = np.arange(len(row)) - np.searchsorted(row, row)
    listed[row, column] = known
    return listed


def _sample(data, batch_size, sources, source_weights, seed, step):
    """Pairs of the step: each source walks through its own epochs."""
    wanted = {n: s for n, s in sources.items() if s and len(data.pairs[n][0])}
    if not wanted:
        raise ValueError(
            f"no training pairs: shares {dict(sources)} over sources "
            f"{ {n: len(q) for n, (q, _) in data.pairs.items()} }"
        )
    queries, documents, weight = [], [], []
    for number, (name, size) in enumerate(split_batch(batch_size, wanted).items()):
        source_queries, source_documents = data.pairs[name]
        rows = batch_rows(
            len(source_queries), size, seed=seed + 7919 * number, step=step
        )
        queries.append(source_queries[rows])
        documents.append(source_documents[rows])
        weight.append(np.full(size, source_weights.get(name, 1.0)))
    return np.concatenate(queries), np.concatenate(documents), np.concatenate(weight)


def _with_tokens_first(data, queries: np.ndarray, encoded: int) -> np.ndarray:
    """An order of the queries: `encoded` of those with tokens, evenly, then the rest.

    Sources follow one another in a batch, so that each has its share of them.
    """
    readable = np.flatnonzero(queries < len(data.query_tokens))
    if len(readable) < encoded:
        raise ValueError(
            f"encoded is {encoded}, but of {len(queries)} queries of the batch "
            f"{len(readable)} have tokens; allowed: at most as many"
        )
    first = readable[np.arange(encoded) * len(readable) // encoded]
    return np.concatenate([first, np.delete(np.arange(len(queries)), first)])


def _pool(
    data, queries, positives, pool, seed, step, mined, mined_per_query, encoded
):  # fmt: skip
    whole = pool >= data.num_documents
    if whole and not encoded:
        return np.arange(data.num_documents)
    rng = np.random.default_rng([seed, step])
    wanted = [positives]
    if mined is not None and mined_per_query:
        columns = rng.integers(mined.shape[1], size=(len(queries), mined_per_query))
        chosen = np.take_along_axis(mined[queries], columns, axis=1).ravel()
        wanted.append(chosen[chosen >= 0])
    # Positives first, so that a pool too small for all drops negatives only.
    unique, first = np.unique(np.concatenate(wanted), return_index=True)
    documents = unique[np.argsort(first, kind="stable")][:pool]
    while len(documents) < min(pool, data.num_documents):
        if whole:
            extra = np.arange(data.num_documents)
        else:
            extra = rng.integers(data.num_documents, size=2 * pool)
        joined = np.concatenate([documents, extra])
        unique, first = np.unique(joined, return_index=True)
        documents = unique[np.argsort(first, kind="stable")][:pool]
    return documents


# MERGED ehi_data_batches: The order of examples is a pure function of (seed, step): no
# state to resume.


def batch_rows(
    num_examples: int, batch_size: int, *, seed: int, step: int
) -> np.ndarray:
    """Examples of one training step (N,): every epoch is a permutation of its own.

    Steps read on through the epochs, so a batch may hold the end of one epoch and the
    start of the next, and every example comes up equally often.

    Args:
        num_examples: how many there are.
        batch_size: N.
        seed: of the permutations.
        step: counted from 0.

    Raises:
        ValueError: no examples, a batch size below 1, or a negative step.
    """
    if num_examples < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            "expected num_examples and batch_size of at least 1 and a step of at least "
            f"0, got {num_examples}, {batch_size} and {step}"
        )
    positions = step * batch_size + np.arange(batch_size)  # (N,)
    epochs, places = np.divmod(positions, num_examples)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here] = _permutation(num_examples, seed, epoch)[places[here]]
    return rows


@lru_cache(maxsize=8)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    order.flags.writeable = False
    return order


def split_batch(batch_size: int, weights: dict[str, float]) -> dict[str, int]:
    """Share of every source in a batch; shares add up to `batch_size` exactly.

    share_i = floor(N w_i / sum_j w_j), and what is left over goes, one each, to the
    largest remainders (the first ones, where equal).

    Args:
        batch_size: N.
        weights: source -> weight; a weight of 0 gives no examples.

    Raises:
        ValueError: a negative weight, or none above 0.
    """
    total = sum(weights.values())
    if total <= 0 or min(weights.values()) < 0:
        raise ValueError(
            f"weights must be at least 0 and one of them above 0, got {weights}"
        )
    exact = {name: batch_size * weight / total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    left = batch_size - sum(shares.values())
    by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[:left]:
        shares[name] += 1
    return shares
