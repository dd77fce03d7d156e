"""Top k with one rule for ties: equal scores are ordered by the smaller number.

A score and a number (document row, leaf) are packed into one int64 whose ascending
order is "best score first, then smaller number". Partitioning and sorting plain
integers is then exact, and fast, where `argpartition` would break ties at random.
"""

import numpy as np

EMPTY = np.iinfo(np.int64).max  # sorts behind every score, unpacks to (-inf, -1)
MAX_NUMBER = 2**32 - 2  # numbers take the low 32 bits, all ones is EMPTY's


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


def smallest(keys, k):
    """The k smallest keys of each row in ascending order, padded with EMPTY."""
    if keys.shape[1] > k:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    short = k - keys.shape[1]
    if short:
        keys = np.pad(keys, ((0, 0), (0, short)), constant_values=EMPTY)
    return np.sort(keys, axis=1)


def drop_duplicates(keys, k):
    """The k best keys of each row, each number once, at its best score.

    Args:
        keys: (N, j) ascending keys in which a number may come back.
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


class TopK:
    """The k best documents of each of N queries, offered block by block.

    `floor` holds a lower bound of every query's k-th best score so far; what is below
    it is never stored. Bounds only drop what cannot be in the answer, so the result
    does not depend on the order of the offers, and threads may share one `floor`.
    """

    def __init__(self, num_queries, k, floor=None):
        self.k = k
        self.num_queries = num_queries
        self.floor = (
            np.full(num_queries, -np.inf, np.float32) if floor is None else floor
        )
        self._queries, self._keys = [], []
        self._pending = 0

    def offer(self, queries, scores, rows):
        """Takes in a block of scores.

        Args:
            queries: (n,) distinct query numbers.
            scores: (n, m) float32.
            rows: (m,) document rows, ascending.
        """
        n, m = scores.shape
        floor = self.floor[queries]
        if m > self.k:
            fresh = floor == -np.inf
            if fresh.any():
                floor[fresh] = self._kth(scores if fresh.all() else scores[fresh])
        flat = np.flatnonzero(scores >= floor[:, None])
        if m > self.k and flat.size > 2 * n * self.k:
            floor = np.maximum(floor, self._kth(scores))
            flat = np.flatnonzero(scores >= floor[:, None])
        self.floor[queries] = np.maximum(self.floor[queries], floor)
        if flat.size > 2 * n * self.k:  # many equal scores
            keys = np.partition(pack(scores, rows), self.k - 1, axis=1)[:, : self.k]
            self._store(np.repeat(queries, self.k), keys.ravel())
        elif flat.size:
            local, column = np.divmod(flat, m)
            keys = pack(scores.ravel()[flat], rows[column])
            self._store(queries[local], keys)

    def merge(self, other):
        """Takes in what another TopK over the same queries holds."""
        for queries, keys in zip(other._queries, other._keys, strict=True):
            self._store(queries, keys)

    def result(self):
        """(N, k) ascending keys, padded with EMPTY."""
        queries, keys, rank = self._compact()
        result = np.full((self.num_queries, self.k), EMPTY)
        result[queries, rank] = keys
        return result

    def _kth(self, scores):
        cut = scores.shape[1] - self.k
        return np.partition(scores, cut, axis=1)[:, cut]

    def _store(self, queries, keys):
        self._queries.append(queries)
        self._keys.append(keys)
        self._pending += len(keys)
        if self._pending > 2**20 + 2 * self.num_queries * self.k:
            queries, keys, rank = self._compact()
            last = rank == self.k - 1
            self.floor[queries[last]] = unpack(keys[last])[0]

    def _compact(self):
        """Keeps the k best of each query: queries, keys and their ranks."""
        queries = np.concatenate([np.zeros(0, np.int64), *self._queries])
        keys = np.concatenate([np.zeros(0, np.int64), *self._keys])
        order = np.argsort(keys)
        # A stable sort of 16-bit integers is a radix sort: linear time.
        narrow = np.uint16 if self.num_queries <= 2**16 else np.int64
        order = order[np.argsort(queries[order].astype(narrow), kind="stable")]
        queries, keys = queries[order], keys[order]
        first = np.searchsorted(queries, np.arange(self.num_queries))
        rank = np.arange(len(queries)) - first[queries]
        best = rank < self.k
        queries, keys, rank = queries[best], keys[best], rank[best]
        self._queries, self._keys, self._pending = [queries], [keys], len(keys)
        return queries, keys, rank
