"""A batch: N queries and one pool of C candidate documents for all of them.

In-batch negatives, mined negatives and the softmax over a whole corpus differ only in
which documents are in the pool. A batch is a pure function of (seed, step), so a
resumed run needs no state of the data.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ehi.data.rows import Counted
from ehi.train.phase import Phase


@dataclass(frozen=True)
class TrainingSet:
    """Queries of every source, the documents, and the pairs that join them.

    Attributes:
      num_queries: rows of the query table, which all sources share.
      num_documents: rows of the document table.
      pairs: source, as 'labelled' or 'pseudo', -> query rows and document rows. Two
        `Counted` take no memory; their query rows belong to no other source.
      query_tokens, document_tokens: `TokenArray`s, when the tower is trained.

    Raises:
      ValueError: a pair names a row that does not exist, or counted query rows are of
        two sources.
    """

    num_queries: int
    num_documents: int
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
    query_tokens: object | None = None
    document_tokens: object | None = None
    _positives: tuple[np.ndarray, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self):
        # Rows of small integer types would overflow below.
        pairs = {
            name: tuple(
                rows if isinstance(rows, Counted) else np.asarray(rows, np.int64)
                for rows in both
            )
            for name, both in self.pairs.items()
        }
        listed = {}
        for name, both in pairs.items():
            if isinstance(both[0], Counted):
                ends = np.array([0, len(both[0]) - 1][: len(both[0])], np.int64)
                self._check_rows(name, *(rows[ends] for rows in both))
            else:
                listed[name] = both
                self._check_rows(name, *both)
        object.__setattr__(self, "pairs", pairs)
        nothing = np.zeros(0, np.int64)
        queries = np.concatenate([nothing, *(q for q, _ in listed.values())])
        documents = np.concatenate([nothing, *(d for _, d in listed.values())])
        first = self._first_counted()
        if queries.max(initial=-1) >= first:
            raise ValueError(
                f"query row {queries.max()} has pairs, but the rows from {first} on "
                "are those of counted sources, which have one pair each"
            )
        order = np.lexsort((documents, queries))
        counts = np.bincount(queries, minlength=min(first, self.num_queries))
        offsets = np.concatenate([[0], np.cumsum(counts)])
        object.__setattr__(self, "_positives", (offsets, documents[order]))

    def _counted(self) -> list[tuple[Counted, Counted]]:
        """The sources whose pairs are counted, in the order of their rows."""
        counted = [b for b in self.pairs.values() if isinstance(b[0], Counted)]
        return sorted((b for b in counted if len(b[0])), key=lambda b: b[0].start)

    def _first_counted(self) -> int:
        """The first query row of a counted source; these rows follow one another."""
        counted = self._counted()
        for one, other in itertools.pairwise(counted):
            if one[0].start + len(one[0]) != other[0].start:
                raise ValueError(
                    f"the counted query rows {other[0].start} to "
                    f"{other[0].start + len(other[0]) - 1} do not follow those up to "
                    f"{one[0].start + len(one[0]) - 1}"
                )
        return counted[0][0].start if counted else self.num_queries

    def _check_rows(self, name: str, queries: np.ndarray, documents: np.ndarray):
        for what, rows, number in (
            ("query", queries, self.num_queries),
            ("document", documents, self.num_documents),
        ):
            bad = rows[(rows < 0) | (rows >= number)]
            if len(bad):
                raise ValueError(
                    f"a pair of {name!r} names {what} row {bad[0]}; allowed: 0 to "
                    f"{number - 1}"
                )

    @functools.cached_property
    def most_positives(self) -> int:
        """Known positives of the query that has most."""
        return int(np.diff(self._positives[0]).max(initial=bool(self._counted())))

    def positives(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All known positives of queries: positions in `queries`, document rows."""
        (offsets, documents), queries = self._positives, np.asarray(queries, np.int64)
        inside = np.minimum(queries, len(offsets) - 2)  # of the rows with listed pairs
        counts = offsets[inside + 1] - offsets[inside]
        last = self._counted()[-1][0] if self._counted() else Counted(0, 0)
        counted = (queries >= len(offsets) - 1) & (queries < last.start + len(last))
        counts = np.where(queries < len(offsets) - 1, counts, counted)
        position = np.repeat(np.arange(len(queries)), counts)
        first = np.repeat(offsets[inside] - np.cumsum(counts) + counts, counts)
        at, asked = first + np.arange(len(position)), queries[position]
        found = np.empty(len(position), np.int64)
        listed = asked < len(offsets) - 1
        found[listed] = documents[at[listed]]
        for rows, answers in self._counted():
            here = (asked >= rows.start) & (asked < rows.start + len(rows))
            found[here] = answers[asked[here] - rows.start]
        return position, found


def checked_seed(seed: int) -> int:
    """The seed as a Python integer, which does not overflow as NumPy's do.

    Raises:
      ValueError: it is not a whole number from 0 to 2^63 - 1, the largest of jax.
    """
    whole = isinstance(seed, int | np.integer)
    if not whole or not 0 <= int(seed) < 2**63:
        raise ValueError(
            f"seed is {seed!r}; allowed: whole numbers from 0 to {2**63 - 1}"
        )
    return int(seed)


def make_batch(
    data: TrainingSet,
    phase: Phase,
    *,
    seed: int,
    step: int,
    mined: np.ndarray | None = None,
    lengths: tuple[int, int] = (0, 0),
    own: Callable[[int], slice] | None = None,
    tables: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The batch of one step.

    Args:
      data: the training set.
      phase: `batch_size` N, `pool` C, shares and weights of the sources, and so on.
      seed, step: the batch is a pure function of both.
      mined: hard negatives (num_queries, m), padded with -1, or `SomeRows` of it that
        hold those of `drawn_queries`.
      lengths: tokens of a query and of a document when the tower trains, else zeros.
      own: number of rows -> the slice of them that this process holds, of queries and
        of documents; None for all rows. The whole batch does not depend on it.
      tables: arrays or `Rows` that are too large for a device, by their names in
        `objective`; the batch holds the rows of them that the step reads.

    Returns:
      queries (N,) and documents (C,) rows; target (N,), position in the pool of the
      row's own positive; where (N, C), False for its other known positives, which are
      not negatives; weights (N,); `positives` (N, A), document rows padded with -1, if
      a term searches all codes (A is the most that any query has). With a trained
      tower also `queries_ids, queries_mask (N, L)` and `documents_ids, documents_mask
      (C, L)`, of the first E rows only if `phase.encoded` is E. Of each table of
      `tables` the rows of the queries (N, .) or of the documents (C, .), but of
      `cached_queries` and `cached_documents` only those after the first E.

    Raises:
      ValueError: no pairs for any source, or fewer than E queries with tokens.
    """
    queries, positives, weight = _sample(data, phase, seed, step)
    if phase.encoded:
        first = _with_tokens_first(data, queries, phase.encoded)
        queries, positives, weight = queries[first], positives[first], weight[first]
    documents = _pool(data, phase, queries, positives, mined, seed, step)
    read = queries[: phase.encoded or None], documents[: phase.encoded or None]
    own = own or slice
    gathered = _gathered(tables or {}, queries, documents, len(read[0]), own)
    of_queries, of_documents = own(len(queries)), own(len(documents))
    queries, positives = queries[of_queries], positives[of_queries]
    row, known = data.positives(queries)
    target, where = _match(documents, positives, row, known)
    batch = {
        "queries": queries.astype(np.int32),
        "documents": documents[of_documents].astype(np.int32),
        "target": target.astype(np.int32),
        "where": where,
        "weights": weight[of_queries].astype(np.float32),
    }
    if phase.needs_codes:
        batch["positives"] = _listed(row, known, (len(queries), data.most_positives))
    if any(lengths):
        tokens = data.query_tokens, data.document_tokens
        for side, some, rows, length in zip(
            ("queries", "documents"), tokens, read, lengths, strict=True
        ):
            padded = some.pad(rows[own(len(rows))], length)
            batch[f"{side}_ids"], batch[f"{side}_mask"] = padded
    return batch | gathered


def side_of(table: str) -> str:
    """'queries' or 'documents': whose rows a table of `objective` holds."""
    return "queries" if table.endswith("queries") else "documents"


def _gathered(tables, queries, documents, encoded: int, own) -> dict[str, np.ndarray]:
    """The rows of host tables that a step reads, by the names of the tables."""
    found, rows_of = {}, {"queries": queries, "documents": documents}
    for name, table in tables.items():
        rows = rows_of[side_of(name)]
        rows = rows[encoded if name.startswith("cached_") else 0 :]
        made = np.asarray(table[rows[own(len(rows))]])
        floats = np.issubdtype(made.dtype, np.floating)
        found[name] = made.astype(np.float32, copy=False) if floats else made
    return found


def drawn_queries(data: TrainingSet, phase: Phase, *, seed: int) -> np.ndarray:
    """Rows of the query table that the batches of a phase hold, ascending."""
    drawn, wanted = [np.zeros(0, np.int64)], _wanted(data, phase)
    for number, (name, size) in enumerate(wanted.items()):
        rows, asked = data.pairs[name][0], phase.steps * size
        if asked >= len(rows):  # a whole epoch
            drawn.append(np.asarray(rows))
        elif asked:
            order = _permutation(len(rows), checked_seed(seed) + 7919 * number, 0)
            drawn.append(rows[order[:asked]])
    return np.unique(np.concatenate(drawn))


# The pairs of a step.


def _wanted(data: TrainingSet, phase: Phase) -> dict[str, int]:
    """Rows of a batch from each source that the phase draws from."""
    wanted = {n: s for n, s in phase.sources.items() if s and len(data.pairs[n][0])}
    if not wanted:
        raise ValueError(
            f"no training pairs: shares {dict(phase.sources)} over sources "
            f"{ {n: len(q) for n, (q, _) in data.pairs.items()} }"
        )
    return split_batch(phase.batch_size, wanted)


def _sample(data: TrainingSet, phase: Phase, seed: int, step: int):
    """Query rows, document rows and weights (N,); each source has its own epochs."""
    seed, sizes = checked_seed(seed), _wanted(data, phase)
    queries, documents, weight = [], [], []
    for number, (name, size) in enumerate(sizes.items()):
        source_queries, source_documents = data.pairs[name]
        rows = batch_rows(
            len(source_queries), size, seed=seed + 7919 * number, step=step
        )
        queries.append(source_queries[rows])
        documents.append(source_documents[rows])
        weight.append(np.full(size, phase.source_weights.get(name, 1.0)))
    return np.concatenate(queries), np.concatenate(documents), np.concatenate(weight)


def split_batch(batch_size: int, weights: dict[str, float]) -> dict[str, int]:
    """Rows of every source in a batch; they add up to `batch_size` exactly.

    Source i gets ``floor(N w_i / sum_j w_j)`` rows. The rows that are left go, one
    each, to the sources with the largest remainders; of equal remainders the first
    sources get them.

    Args:
        batch_size: N.
        weights: source -> weight; a weight of 0 gives no rows.

    Raises:
        ValueError: a negative weight, or none above 0.
    """
    total = sum(weights.values())
    if total <= 0 or min(weights.values()) < 0:
        raise ValueError(
            f"weights must be at least 0 and one of them above 0, got {weights}"
        )
    exact = {name: batch_size * weight / total for name, weight in weights.items()}
    rows = {name: int(share) for name, share in exact.items()}
    left = batch_size - sum(rows.values())
    by_remainder = sorted(exact, key=lambda name: rows[name] - exact[name])
    for name in by_remainder[:left]:
        rows[name] += 1
    return rows


def batch_rows(
    num_examples: int, batch_size: int, *, seed: int, step: int
) -> np.ndarray:
    """Examples of one training step (N,): every epoch is another permutation.

    Batches run on from one epoch into the next, so every example comes up equally
    often.

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


@functools.lru_cache(maxsize=8)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    if num_examples < 2**32:  # half of the memory
        order = order.astype(np.uint32)
    order.flags.writeable = False
    return order


def _with_tokens_first(data, queries: np.ndarray, encoded: int) -> np.ndarray:
    """An order of the queries: `encoded` of those with tokens first, then the rest.

    They are taken at even distances. Sources follow one another in a batch, so each
    source gets its share of them.
    """
    readable = np.flatnonzero(queries < len(data.query_tokens))
    if len(readable) < encoded:
        raise ValueError(
            f"encoded is {encoded}, but of {len(queries)} queries of the batch "
            f"{len(readable)} have tokens; allowed: at most as many"
        )
    first = readable[np.arange(encoded) * len(readable) // encoded]
    return np.concatenate([first, np.delete(np.arange(len(queries)), first)])


# The pool of a step.


def _pool(data, phase: Phase, queries, positives, mined, seed, step) -> np.ndarray:
    """Document rows (C,): the positives, mined negatives, then random documents."""
    whole = phase.pool >= data.num_documents
    if whole and not phase.encoded:
        return np.arange(data.num_documents)
    rng = np.random.default_rng([seed, step])
    wanted = [positives]
    if mined is not None and phase.mined_per_query:
        shape = len(queries), phase.mined_per_query
        columns = rng.integers(mined.shape[1], size=shape)
        # A pool that cannot hold all of them drops some of every query's.
        chosen = np.take_along_axis(mined[queries], columns, axis=1).T.ravel()
        wanted.append(chosen[chosen >= 0])
    # The positives come first, so a small pool drops negatives only.
    documents = _distinct(np.concatenate(wanted))[: phase.pool]
    while len(documents) < min(phase.pool, data.num_documents):
        if whole:
            extra = np.arange(data.num_documents)
        else:
            extra = rng.integers(data.num_documents, size=2 * phase.pool)
        documents = _distinct(np.concatenate([documents, extra]))[: phase.pool]
    return documents


def _distinct(rows: np.ndarray) -> np.ndarray:
    """The distinct rows, in the order in which they first appear."""
    unique, first = np.unique(rows, return_index=True)
    return unique[np.argsort(first, kind="stable")]


def _match(documents, positives, row, known):
    """Position in the pool of each row's own positive (N,), and the mask (N, C).

    The mask is False for the other known positives of a row.
    """
    order = np.argsort(documents)
    ascending = documents[order]

    def place(rows):
        at = np.minimum(np.searchsorted(ascending, rows), len(order) - 1)
        return np.where(ascending[at] == rows, order[at], -1)

    target, known = place(positives), place(known)  # (N,)
    where = np.ones((len(positives), len(documents)), bool)  # (N, C)
    where[row[known >= 0], known[known >= 0]] = False
    where[np.arange(len(positives)), target] = True
    return target, where


def _listed(row: np.ndarray, known: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Known positives of each query (N, A), padded with -1; `row` ascends."""
    listed = np.full(shape, -1, np.int32)
    column = np.arange(len(row)) - np.searchsorted(row, row)
    listed[row, column] = known
    return listed
