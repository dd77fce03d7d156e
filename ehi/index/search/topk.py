"""The k best scores, with one rule for ties: the smaller number comes first.

A score and a number (document row, leaf) are packed into one int64 key. Ascending keys
mean "best score first, then smaller number". Partitioning and sorting plain integers
is exact and fast, whereas `argpartition` of scores breaks ties at random.
"""

import numpy as np

EMPTY = np.iinfo(np.int64).max  # sorts behind every score, unpacks to (-inf, -1)
MAX_NUMBER = 2**32 - 2  # numbers take the low 32 bits, all ones is EMPTY's
# If more than this fraction of k scores per query pass the floors, raise the floors and
# filter again.
_HITS = 0.5
# If more hits than this are stored for all queries, keep the best and drop the others.
_STORED = 2**16


def pack(scores, numbers):
    """int64 keys, ascending = best first.

    Args:
        scores: (...) float32, not NaN.
        numbers: (...) integers in 0 .. MAX_NUMBER, broadcast against scores.
    """
    # Adding 0 turns -0.0 into 0.0, which must tie. Flipping the low bits of negative
    # floats makes their bit patterns ascend with their value.
    bits = (np.asarray(scores, np.float32) + np.float32(0)).view(np.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (~ascending).astype(np.int64) << 32 | numbers


def unpack(keys):
    """The float32 scores and int64 numbers of `keys`; EMPTY gives -inf and -1."""
    ascending = ~(keys >> 32).astype(np.int32)
    scores = (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).view(np.float32)
    empty = keys == EMPTY
    return (
        np.where(empty, np.float32(-np.inf), scores),
        np.where(empty, -1, keys & 0xFFFFFFFF),
    )


def keys_of(scores, rows):
    """Keys (...) of documents found, EMPTY where the row is -1."""
    return np.where(rows < 0, EMPTY, pack(scores, rows))


def smallest(keys, k):
    """The k smallest keys of each row in ascending order, padded with EMPTY."""
    if keys.shape[1] > k:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    short = k - keys.shape[1]
    if short:
        keys = np.pad(keys, ((0, 0), (0, short)), constant_values=EMPTY)
    return np.sort(keys, axis=1)


def best_of(scores, numbers, k):
    """The k best of one row, or all if there are fewer: scores and numbers.

    It makes few calls and no keys: on a short row a call costs more than its work.

    Args:
        scores: (m,) float32.
        numbers: (m,) integers; equal scores go to the smaller. Or a function: positions
            (j,) -> their numbers, which is then called for the best only.
    """
    kept = None
    if len(scores) > k:
        kept = (scores >= kth_bound(scores, k)).nonzero()[0]
        scores = scores[kept]
    if callable(numbers):
        numbers = numbers(np.arange(len(scores)) if kept is None else kept)
    elif kept is not None:
        numbers = numbers[kept]
    order = np.lexsort((numbers, -scores))[:k]
    return scores[order], numbers[order]


def drop_duplicates(keys, k):
    """The k best keys of each row, each number once, at its best score.

    Args:
        keys: (N, j) ascending keys; a number may occur several times.
    """
    numbers = unpack(keys)[1]
    order = np.argsort(numbers, axis=1, kind="stable")
    ordered = np.take_along_axis(numbers, order, axis=1)
    again = np.zeros(keys.shape, bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    keys = keys.copy()
    np.put_along_axis(
        keys,
        order,
        np.where(again, EMPTY, np.take_along_axis(keys, order, axis=1)),
        axis=1,
    )
    return smallest(keys, k)


def kth_bound(scores, k):
    """A lower bound of the k-th best of one row, close to it and cheap.

    Documents of a long row are dealt like cards to 128 groups or more, so that
    neighbours, which are often alike, get into different groups. The bound is the k-th
    best of the groups' maxima: k documents score at least as much.

    Args:
        scores: (m,) float32, m >= k.

    Returns:
        float32.
    """
    groups = max(128, 4 * k)
    size = len(scores) // groups
    if size >= 8:
        scores = np.maximum.reduce(scores[: size * groups].reshape(size, groups))
    else:
        scores = scores.copy()
    cut = len(scores) - k
    scores.partition(cut)
    return scores[cut]


class TopK:
    """The k best documents of each of N queries, offered in blocks.

    `floor` is a lower bound of every query's k-th best score so far. Scores below it
    are never stored. They cannot be in the answer, so the result does not depend on the
    order of the offers.
    """

    def __init__(self, num_queries, k):
        self.k = k
        self.num_queries = num_queries
        self.floor = np.full(num_queries, -np.inf, np.float32)
        self._stored = []  # (queries, scores, rows), three arrays of one length
        self._pending = 0

    def offer(self, blocks):
        """Takes in Blocks of scores."""
        floor = self.floor[blocks.queries]
        bounded = floor.min(initial=np.inf) > -np.inf
        if not bounded:
            floor = self._raise(floor, blocks)
        hits = blocks.at_least(floor)
        if bounded and len(hits) > _HITS * self.k * len(floor):
            floor = self._raise(floor, blocks)
            hits = blocks.at_least(floor)
        if len(hits):
            self._store(*blocks.take(hits))

    def _raise(self, floor, blocks):
        np.maximum(floor, blocks.bounds(self.k), out=floor)
        np.maximum.at(self.floor, blocks.queries, floor)
        return self.floor[blocks.queries]

    def _store(self, queries, scores, rows):
        self._stored.append((queries, scores, rows))
        self._pending += len(queries)
        if self._pending > _STORED + 2 * self.num_queries * self.k:
            queries, keys, rank = self._best()
            scores, rows = unpack(keys)
            self._stored, self._pending = [(queries, scores, rows)], len(keys)
            last = rank == self.k - 1
            self.floor[queries[last]] = scores[last]

    def result(self):
        """(N, k) ascending keys, padded with EMPTY."""
        queries, keys, rank = self._best()
        result = np.full((self.num_queries, self.k), EMPTY)
        result[queries, rank] = keys
        return result

    def _best(self):
        """The k best of each query, sorted: queries, keys and ranks, (hits,) each."""
        if not self._stored:
            return np.zeros((3, 0), np.int64)
        queries, scores, rows = map(np.concatenate, zip(*self._stored, strict=True))
        # Floors have risen since the first offers: most of those drop out here.
        kept = np.flatnonzero(scores >= self.floor[queries])
        queries, keys = queries[kept], pack(scores[kept], rows[kept])
        order = np.argsort(keys)
        # A stable sort of 16-bit integers is a radix sort: linear time.
        narrow = np.uint16 if self.num_queries <= 2**16 else np.int64
        order = order[np.argsort(queries[order].astype(narrow), kind="stable")]
        queries, keys = queries[order], keys[order]
        first = np.searchsorted(queries, np.arange(self.num_queries))
        rank = np.arange(len(queries)) - first[queries]
        best = rank < self.k
        return queries[best], keys[best], rank[best]
