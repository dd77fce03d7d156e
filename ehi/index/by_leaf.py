"""Many queries: each leaf is read once, for all queries that visit it."""

import itertools
import threading
from typing import NamedTuple

import numpy as np

from ehi.index.blocks import Blocks, Workspace
from ehi.index.products import multiply, new_buffer, products_of, scores_order
from ehi.index.segment import Segment
from ehi.index.threads import map_threads
from ehi.index.topk import TopK, drop_duplicates, unpack

# What is computed at once, so that it stays in the cache: scores of one product, of one
# selection, and documents.
_BLOCK_SCORES, _GROUP_SCORES, _BLOCK_ROWS = 2**19, 2**17, 2**13
_GROUPS = 8  # of a thread, at least: who is done early takes the next


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
    groups = _groups(_tasks(job, leaves), job.threads)
    room = max((_num_scores(group) for group in groups), default=0)
    todo = iter(groups)
    best = TopK(len(queries), job.copies)
    visited = np.zeros(len(queries), np.int64)
    # Short steps gain nothing from threads, as these wait for the interpreter's lock at
    # each: they take turns, and only products and decoding go on side by side.
    turn = threading.Lock()

    def run(_):
        workspace = Workspace(np.empty(room, np.float32), np.empty(room, bool))
        buffer = new_buffer(job.index)
        blocks = None
        while True:
            with turn:  # once a group
                if blocks is not None:
                    best.offer(blocks)
                group = next(todo, None)
                if group is None:
                    return
                blocks, products = _prepare(job, group, queries, rotated, workspace)
                scored = np.repeat(blocks.num_documents, blocks.num_queries)
                np.add.at(visited, blocks.queries, scored)
            multiply(job.index, products, buffer)

    map_threads(run, range(job.threads), job.threads)
    keys = best.result()
    if job.index.spill > 1:
        keys = drop_duplicates(keys, job.candidates)
    return *unpack(keys), visited


def _prepare(job, group, queries, rotated, workspace):
    """The Blocks of a group of tasks, without scores yet, and their Products."""
    allowed = [_allowed(job.mask, task) for task in group]
    rows, copies = zip(*allowed, strict=True)
    members = [task.members for task in group]
    blocks = Blocks(members, rows, workspace, scores_order())
    chosen = queries[blocks.queries]
    turned = chosen if rotated is queries else rotated[blocks.queries]
    return blocks, products_of(job.index, group, copies, blocks, chosen, turned)


def _tasks(job, leaves):
    """Every block of scores, largest first."""
    visits = np.flatnonzero(leaves >= 0)
    visited = leaves.ravel()[visits]
    # A stable sort of 16-bit integers is a radix sort: linear time.
    narrow = np.uint16 if job.index.num_leaves <= 2**16 else np.int64
    order = np.argsort(visited.astype(narrow), kind="stable")
    members, visited = visits[order] // leaves.shape[1], visited[order]
    cuts = np.flatnonzero(np.diff(visited, prepend=-1, append=-1)).tolist()
    distinct = visited[cuts[:-1]]
    tasks = []
    for segment in job.contents.segments:
        starts = segment.leaf_offsets[distinct].tolist()
        stops = segment.leaf_offsets[distinct + 1].tolist()
        for leaf, span, start, stop in zip(
            distinct.tolist(), itertools.pairwise(cuts), starts, stops, strict=True
        ):
            part = members[slice(*span)]
            block = min(_BLOCK_SCORES // len(part), _BLOCK_ROWS)
            block = max(block, 2 * job.copies, 256)
            tasks += [
                _Task(segment, leaf, part, first, min(first + block, stop))
                for first in range(start, stop, block)
            ]
    tasks.sort(key=_Task.num_scores, reverse=True)
    return tasks


def _groups(tasks, threads):
    """Tasks whose scores are selected from together: a list of lists."""
    most = _GROUP_SCORES
    if threads > 1:
        most = min(most, _num_scores(tasks) // (_GROUPS * threads))
    groups, room = [], 0
    for task in tasks:
        size = task.num_scores()
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(task)
        room -= size
    return groups


def _num_scores(tasks):
    return sum(task.num_scores() for task in tasks)


def _allowed(mask, task):
    """Rows of a task's copies that a mask keeps, and which copies they are."""
    start, stop = task.start, task.stop
    rows = task.segment.rows(start, stop)
    if mask is None:
        return rows, slice(start, stop)
    kept = np.flatnonzero(mask[rows])
    if len(kept) == len(rows):
        return rows, slice(start, stop)
    return rows[kept], start + kept
