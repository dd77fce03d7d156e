"""Many queries: each leaf is read once, for all queries that visit it."""

import itertools
import threading
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
    tasks = iter(_tasks(job, leaves))
    best = TopK(len(queries), job.copies)
    visited = np.zeros(len(queries), np.int64)
    # Short steps gain nothing from threads, as these wait for the interpreter's lock at
    # each: they take turns, and only products and decoding go on side by side.
    turn = threading.Lock()

    def run(_):
        buffer = new_buffer(job.index)
        scored = None
        while True:
            # Once a task. Twice, two threads took 15% longer with codes in 8 of 512
            # leaves and 4% less with vectors.
            with turn:
                if scored is not None:
                    best.offer(*scored)
                task = next(tasks, None)
                if task is None:
                    return
                segment, leaf, members, start, stop = task
                rows, copies = _allowed(job.mask, segment, start, stop)
                visited[members] += len(rows)
                chosen = queries[members]
                turned = chosen if rotated is queries else rotated[members]
            scored = None
            if len(rows):
                scores = score_block(
                    job.index, segment, leaf, copies, chosen, turned, buffer
                )
                scored = members, scores, rows

    map_threads(run, range(job.threads), job.threads)
    keys = best.result()
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
