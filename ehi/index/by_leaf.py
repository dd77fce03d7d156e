"""Many queries: each leaf is read once, for all queries that visit it."""

import itertools
from typing import NamedTuple

import numpy as np

from ehi.index.nodes import group_by
from ehi.index.score import new_buffer, score_block
from ehi.index.segment import Segment
from ehi.index.threads import map_threads
from ehi.index.topk import TopK, drop_duplicates, unpack

# What is computed at once, so that it stays in the cache: scores, and of documents.
_BLOCK_SCORES, _BLOCK_ROWS = 2**19, 2**13


class _Task(NamedTuple):
    """Copies start .. stop of a leaf's documents, and the queries (n,) that visit."""

    segment: Segment
    leaf: int
    members: np.ndarray
    start: int
    stop: int

    def num_scores(self):
        return len(self.members) * (self.stop - self.start)


def search_by_leaf(job, queries, rotated, leaves):
    """The best documents of each query in its leaves.

    Args and returns as of `search_by_query`.
    """
    tasks = iter(_tasks(job, leaves))  # every thread takes the next

    def run(best):
        buffer = new_buffer(job.index)
        visited = np.zeros(len(queries), np.int64)
        for segment, leaf, members, start, stop in tasks:
            rows, copies = _allowed(job.mask, segment, start, stop)
            visited[members] += len(rows)
            if len(rows):
                chosen = queries[members]
                turned = chosen if rotated is queries else rotated[members]
                scores = score_block(
                    job.index, segment, leaf, copies, chosen, turned, buffer
                )
                best.offer(members, scores, rows)
        return visited

    # Threads share no lock of ours. What limits them is Python's, for which they wait
    # after each short call: two are 1.6 times as fast as one in long steps (raw, 32 of
    # 512 leaves), 1.1 times in short ones (codes, 8). Taking turns was no better.
    floor = np.full(len(queries), -np.inf, np.float32)
    best = [TopK(len(queries), job.copies, floor) for _ in range(job.threads)]
    visited = sum(map_threads(run, best, job.threads))
    for other in best[1:]:
        best[0].take_in(other)
    keys = best[0].result()
    if job.index.spill > 1:
        keys = drop_duplicates(keys, job.candidates)
    return *unpack(keys), visited


def _tasks(job, leaves):
    """Every block of scores, largest first."""
    tasks = []
    visits = np.flatnonzero(leaves >= 0)
    # A stable sort of 16-bit integers is a radix sort: linear time.
    narrow = np.uint16 if job.index.num_leaves <= 2**16 else np.int64
    grouped = group_by(leaves.ravel()[visits].astype(narrow))
    for leaf, positions in zip(grouped[0].tolist(), grouped[1], strict=True):
        members = visits[positions] // leaves.shape[1]
        block = min(_BLOCK_SCORES // len(members), _BLOCK_ROWS)
        block = max(block, 2 * job.copies, 256)
        for segment in job.contents.segments:
            start, stop = segment.leaf_offsets[leaf : leaf + 2].tolist()
            cuts = [*range(start, stop, block), stop]
            tasks += [
                _Task(segment, leaf, members, *span)
                for span in itertools.pairwise(cuts)
            ]
    tasks.sort(key=_Task.num_scores, reverse=True)
    return tasks


def _allowed(mask, segment, start, stop):
    """Rows of the copies start .. stop that a mask keeps, and which copies they are."""
    rows = segment.rows(start, stop)
    if mask is None:
        return rows, slice(start, stop)
    kept = np.flatnonzero(mask[rows])
    if len(kept) == len(rows):
        return rows, slice(start, stop)
    return rows[kept], start + kept
