"""Batches of texts of many lengths, padded to a few lengths.

`plan_batches` puts one text into a row, `pack_batches` as many texts as fit into it.
"""

import bisect
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from ehi.model.tower import texts_of_row

# Length of the shortest packed row. Shorter rows would save hardly any attention.
SHORTEST_PACK = 128


def choose_buckets(
    lengths: np.ndarray, *, compile_tokens: int, step: int = 16
) -> tuple[int, ...]:
    r"""Padded lengths with the least cost of padding and compilation together.

    Dynamic programming finds

    .. math:: \min_{b_1 < \dots < b_n} \sum_i \min\{b_j \ge l_i\} + n \cdot c

    Args:
        lengths: tokens of each text (N,).
        compile_tokens: c, the price of one more bucket in tokens.
        step: all buckets but the last are multiples of it, so that data sets share
            compiled programs. The last bucket is the longest length.

    Returns:
        ascending tuple of lengths.
    """
    longest = int(np.max(lengths))
    ends = np.append(np.arange(step, longest, step), longest)
    count = np.searchsorted(np.sort(lengths), ends, side="right")  # texts that fit
    # best[j]: the least cost of the texts of at most ends[j - 1] tokens.
    best, previous = np.zeros(len(ends) + 1), np.zeros(len(ends) + 1, int)
    before = np.append(0, count)
    for j in range(1, len(ends) + 1):
        cost = best[:j] + (count[j - 1] - before[:j]) * ends[j - 1] + compile_tokens
        previous[j] = np.argmin(cost)
        best[j] = cost[previous[j]]
    chosen, j = [], len(ends)
    while j:
        chosen.append(int(ends[j - 1]))
        j = previous[j]
    return tuple(reversed(chosen))


def plan_batches(
    lengths: np.ndarray, buckets: Sequence[int], batch_tokens: int
) -> list[tuple[np.ndarray, int, int]]:
    """Batches with one text in a row, the longest texts first.

    If a bucket has too few texts to fill its last batch, texts of the next shorter
    bucket fill it. So only the very last batch is partial, and its number of rows is
    padded to a power of two.

    Args:
        lengths: tokens of each text (N,).
        buckets: padded lengths, ascending.
        batch_tokens: a batch has batch_tokens // its length rows, and at least one.

    Returns:
        list of (texts, padded length, padded number of rows).
    """
    longest = int(np.max(lengths))
    buckets = np.array(buckets if longest <= buckets[-1] else [*buckets, longest])
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        first = lengths[order[start]]
        length = int(buckets[np.searchsorted(buckets, first)])
        full = max(1, batch_tokens // length)
        rows = order[start : start + full]
        padded_rows = min(full, 1 << (len(rows) - 1).bit_length())
        batches.append((rows, length, padded_rows))
        start += len(rows)
    return batches


def packing_pays() -> bool:
    """Whether packed rows are faster than padded ones: on a CPU they are.

    They gain most where lengths differ most. They were not measured on an accelerator,
    where attention over long rows costs more.
    """
    return jax.default_backend() == "cpu"


def choose_packed_lengths(lengths: np.ndarray) -> tuple[int, ...]:
    """Lengths of packed rows: `SHORTEST_PACK`, its doubles, and the longest text."""
    longest, rows = int(np.max(lengths)), [SHORTEST_PACK]
    while 3 * rows[-1] <= longest:  # the next length stays well below the longest
        rows.append(2 * rows[-1])
    return (*(row for row in rows if 1.5 * row <= longest), max(longest, SHORTEST_PACK))


def pack_batches(
    lengths: np.ndarray, row_lengths: Sequence[int], batch_tokens: int
) -> Iterator[tuple[list[list[int]], int, int]]:
    """Batches of packed rows.

    A row takes the longest text that is left, then again and again the longest one that
    still fits.

    Args:
        lengths: tokens of each text (N,).
        row_lengths: lengths of rows, ascending; the last one holds the longest text.
        batch_tokens: a batch has batch_tokens // the length of its rows rows, and at
            least one.

    Yields:
        texts of every row, length of the rows, padded number of rows.
    """
    order = np.argsort(lengths, kind="stable")
    found, first = np.unique(lengths[order], return_index=True)
    # For every length that has texts left: where these stand in `order`.
    ascending, starts = found.tolist(), first.tolist()
    ends = [*starts[1:], len(order)]

    def take(room: int) -> int | None:
        at = bisect.bisect_right(ascending, room) - 1
        if at < 0:
            return None
        ends[at] -= 1
        text = int(order[ends[at]])
        if ends[at] == starts[at]:
            for of_lengths in (ascending, starts, ends):
                of_lengths.pop(at)
        return text

    while ascending:
        length = int(row_lengths[bisect.bisect_left(row_lengths, ascending[-1])])
        full, most = max(1, batch_tokens // length), texts_of_row(length)
        rows = []
        while ascending and len(rows) < full:
            row, room = [], length
            while len(row) < most and (text := take(room)) is not None:
                row.append(text)
                room -= int(lengths[text])
            rows.append(row)
        yield rows, length, min(full, 1 << (len(rows) - 1).bit_length())
