"""Scores of many queries: each leaf is read once, for all queries that visit it.

    tasks (a leaf and its queries) -> groups -> Blocks of scores -> Products -> TopK

One leaf is little work for a call into NumPy, and with several threads every call waits
for the interpreter's lock. So the scores of several leaves lie one after the other in
one buffer, and one call selects from all of them.
"""

import functools
import itertools
import threading
from typing import NamedTuple

import numpy as np

from ehi.index.contents import Segment
from ehi.index.search.blas import aligned_empty, blas_architecture, map_threads
from ehi.index.search.codes import decode, factor_table
from ehi.index.search.topk import TopK, drop_duplicates, unpack

# Limits that keep one computation in the cache: scores of one product, scores
# of one selection, documents of one product.
_BLOCK_SCORES, _GROUP_SCORES, _BLOCK_ROWS = 2**19, 2**17, 2**13
_GROUPS = 8  # least number for each thread: one that is done early takes the next
_DECODED_ROWS = 1024  # decoded at once, in the cache; 512 take 3% longer
_SMALL_PRODUCT, _SMALL_ROWS, _FEW = 10**6, 32, 3  # see `_steps`
_SMALL_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")  # see `scores_order`


def search_by_leaf(request, queries, rotated, leaves):
    """The best documents of each query in its leaves.

    Args and returns as of `search_by_query`.
    """
    groups = _groups(_tasks(request, leaves), request.threads)
    room = max((_num_scores(group) for group in groups), default=0)
    todo = iter(groups)
    best = TopK(len(queries), request.copies)
    visited = np.zeros(len(queries), np.int64)
    # Threads gain nothing on short steps, because each step waits for the interpreter's
    # lock. So threads take turns, and only products and decoding run side by side.
    turn = threading.Lock()

    def run(_):
        workspace = Workspace(np.empty(room, np.float32), np.empty(room, bool))
        buffer = aligned_empty((_DECODED_ROWS, request.parameters.width), np.float32)
        blocks = None
        while True:
            with turn:  # once for each group
                if blocks is not None:
                    best.offer(blocks)
                group = next(todo, None)
                if group is None:
                    return
                blocks, products = _prepare(request, group, queries, rotated, workspace)
                scored = np.repeat(blocks.num_documents, blocks.num_queries)
                np.add.at(visited, blocks.queries, scored)
            multiply(request.parameters, products, buffer)

    map_threads(run, range(request.threads), request.threads)
    keys = best.result()
    if request.parameters.spill > 1:
        keys = drop_duplicates(keys, request.found)
    return *unpack(keys), visited


class _Task(NamedTuple):
    """Copies start .. stop of a leaf's documents, and the queries (n,) that visit."""

    segment: Segment
    leaf: int
    members: np.ndarray
    start: int
    stop: int

    def num_scores(self):
        return len(self.members) * (self.stop - self.start)


def _tasks(request, leaves):
    """Every block of scores to compute, largest first."""
    visits = np.flatnonzero(leaves >= 0)
    visited = leaves.ravel()[visits]
    # A stable sort of 16-bit integers is a radix sort: linear time.
    narrow = np.uint16 if request.parameters.num_leaves <= 2**16 else np.int64
    order = np.argsort(visited.astype(narrow), kind="stable")
    members, visited = visits[order] // leaves.shape[1], visited[order]
    cuts = np.flatnonzero(np.diff(visited, prepend=-1, append=-1)).tolist()
    distinct = visited[cuts[:-1]]
    tasks = []
    for segment in request.contents.segments:
        starts = segment.leaf_offsets[distinct].tolist()
        stops = segment.leaf_offsets[distinct + 1].tolist()
        for leaf, span, start, stop in zip(
            distinct.tolist(), itertools.pairwise(cuts), starts, stops, strict=True
        ):
            part = members[slice(*span)]
            block = min(_BLOCK_SCORES // len(part), _BLOCK_ROWS)
            block = max(block, 2 * request.copies, 256)
            tasks += [
                _Task(segment, leaf, part, first, min(first + block, stop))
                for first in range(start, stop, block)
            ]
    tasks.sort(key=_Task.num_scores, reverse=True)
    return tasks


def _groups(tasks, threads):
    """Lists of tasks; one selection takes the scores of all tasks in a list."""
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


def _prepare(request, group, queries, rotated, workspace):
    """The Blocks of a group of tasks, without scores yet, and their Products."""
    allowed = [_allowed(request.mask, task) for task in group]
    rows, copies = zip(*allowed, strict=True)
    members = [task.members for task in group]
    blocks = Blocks(members, rows, workspace, scores_order())
    chosen = queries[blocks.queries]
    turned = chosen if rotated is queries else rotated[blocks.queries]
    parameters = request.parameters
    return blocks, products_of(parameters, group, copies, blocks, chosen, turned)


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


class Workspace(NamedTuple):
    """Memory that a thread uses over and over, so that it stays in the cache.

    Attributes:
        scores: (S,) float32, of the documents and queries of all blocks.
        hits: (S,) bool.
    """

    scores: np.ndarray
    hits: np.ndarray


class Blocks:
    """Scores of n queries and m documents for each of several leaves.

    Attributes:
        queries: (sum n,) query numbers, leaf by leaf, distinct within a leaf.
        rows: (sum m,) document rows, leaf by leaf.
        num_queries, num_documents: (leaves,) n and m.
        parts: for each leaf, the slice of `queries` that visits it.
        scores: for each leaf, (n, m) float32 in the buffer, to be written to.
    """

    def __init__(self, queries, rows, workspace, order):
        """Lays out the blocks of leaves.

        Args:
            queries, rows: for each leaf, (n,) and (m,).
            workspace: the Workspace, with room for all scores.
            order: 'C' for scores query by query, 'F' for document by document.
        """
        self.queries, self.rows = np.concatenate(queries), np.concatenate(rows)
        self.num_queries = np.array([len(part) for part in queries])
        self.num_documents = np.array([len(part) for part in rows])
        self.order, self.workspace = order, workspace
        self.first_query = _starts(self.num_queries)
        self.first_row = _starts(self.num_documents)
        self.first_score = _starts(self.num_queries * self.num_documents)
        cuts = itertools.pairwise(self.first_query.tolist())
        self.parts = [slice(*cut) for cut in cuts]
        self.scores = self._views(workspace.scores)
        self._hits = self._views(workspace.hits)

    def bounds(self, k):
        """A lower bound of the k-th best score for each of `queries`: (sum n,).

        Computed by `kth_bound`; -inf in a leaf of less than k documents.
        """
        # The number of runs of scores to compare at once. Query by query, longer runs
        # are faster. Document by document, the runs of n queries lie side by side, so
        # they are n times as long anyway.
        groups = max(64, 4 * k) if self.order == "C" else max(32, 2 * k)
        enough = self.num_documents >= k  # the other leaves take no memory below
        shape = self.num_queries[enough].sum(), groups
        maxima = np.full(shape, -np.inf, np.float32, order=self.order)
        done = 0
        for leaf in enough.nonzero()[0].tolist():
            scores = self.scores[leaf]
            num, documents = scores.shape
            part, size = maxima[done : done + num], documents // groups
            if size:
                dealt = scores[:, : size * groups].reshape(num, size, groups)
                np.maximum.reduce(dealt, axis=1, out=part)
            else:
                part[:, :documents] = scores
            done += num
        maxima.partition(groups - k, axis=1)
        bounds = np.full(len(self.queries), -np.inf, np.float32)
        bounds[np.repeat(enough, self.num_queries)] = maxima[:, groups - k]
        return bounds

    def at_least(self, floor):
        """Positions in the buffer of scores of at least a floor (sum n,): (hits,)."""
        for part, scores, hits in zip(self.parts, self.scores, self._hits, strict=True):
            np.greater_equal(scores, floor[part, None], out=hits)
        return self.workspace.hits[: self.first_score[-1]].nonzero()[0]

    def take(self, positions):
        """Queries, scores and rows at positions in the buffer, (hits,) each."""
        leaf = self.first_score.searchsorted(positions, side="right") - 1
        inside = positions - self.first_score[leaf]
        if self.order == "C":
            query, document = np.divmod(inside, self.num_documents[leaf])
        else:
            document, query = np.divmod(inside, self.num_queries[leaf])
        return (
            self.queries[query + self.first_query[leaf]],
            self.workspace.scores[positions],
            self.rows[document + self.first_row[leaf]],
        )

    def _views(self, buffer):
        """For each leaf its part of a buffer: (n, m)."""
        spans = itertools.pairwise(self.first_score.tolist())
        flat = [buffer[start:stop] for start, stop in spans]
        n, m = self.num_queries.tolist(), self.num_documents.tolist()
        if self.order == "C":
            return [
                part.reshape(*shape) for part, *shape in zip(flat, n, m, strict=True)
            ]
        return [part.reshape(*shape).T for part, *shape in zip(flat, m, n, strict=True)]


def _starts(sizes):
    """The start of each of several parts, and the end of the last one."""
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


class Products(NamedTuple):
    """The matrix products that fill the scores of Blocks.

    Attributes:
        steps: (left, right, out) of each product of float32 vectors.
        decoded: (stored, queries, out, centroid) of codes or float16 vectors (m, .),
            which are decoded first, and queries (D, n); the rotated centroid (D,) of
            residuals that 'l2' scores, or None.
        shifts: (out, shift) (n, m) and (n, 1); the shift of a leaf centroid is added to
            the scores of codes of residuals.
        factors: (out, factors) (n, m) and (m,), of scores that have factors.
    """

    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    decoded: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]]
    shifts: list[tuple[np.ndarray, np.ndarray]]
    factors: list[tuple[np.ndarray, np.ndarray]]


def products_of(parameters, tasks, copies, blocks, queries, rotated):
    """The Products of documents and queries of several leaves.

    Args:
        parameters: those of the index.
        tasks: for each leaf its `segment` and its number `leaf`.
        copies: for each leaf its copies of documents, a slice or numbers (m,).
        blocks: the Blocks, in `scores_order`.
        queries: (sum n, D) float32, of all leaves.
        rotated: (sum n, D), the queries times the rotation.
    """
    coded, order = parameters.codebooks is not None, scores_order()
    asked = rotated if coded else queries
    centroids, l2 = parameters.leaf_centroids, parameters.score == "l2"
    products = Products([], [], [], [])
    for task, chosen, part, out in zip(
        tasks, copies, blocks.parts, blocks.scores, strict=True
    ):
        segment = task.segment
        stored = (segment.codes if coded else segment.vectors)[chosen]
        columns = asked[part].T  # (D, n)
        if order == "F" and columns.size <= _SMALL_PRODUCT // _SMALL_ROWS:
            columns = np.ascontiguousarray(columns)
        centroid = None
        if centroids is not None:
            shift = queries[part] @ centroids[task.leaf]
            if l2:
                centroid = parameters.rotated_centroids[task.leaf]
                shift -= parameters.half_centroid_norms[task.leaf]
            products.shifts.append((out, shift[:, None]))
        if stored.dtype == np.float32:
            products.steps.extend(_steps(columns, stored, out))
        else:
            products.decoded.append((stored, columns, out, centroid))
        if segment.factors is not None:
            factors = factor_table().take(segment.factors[chosen])
            products.factors.append((out, factors))
    return products


@functools.cache
def scores_order():
    """The memory order of scores (n, m) of queries and documents: 'C' or 'F'.

    OpenBLAS copies its inputs into an order of its own, except for small matrices with
    the AVX-512 kernels. For 16 queries and 448 documents of width 384, these kernels
    take 41 us document by document and 126 query by query; the AVX2 kernels take 96
    and 79.
    """
    return "F" if blas_architecture() in _SMALL_KERNELS else "C"


def multiply(parameters, products, buffer):
    """Computes Products, and nothing else: other threads run during each step.

    Args:
        parameters, products: those of the index, and its Products.
        buffer: (rows, D) float32, overwritten by decoded documents.
    """
    for left, right, out in products.steps:
        np.matmul(left, right, out=out)
    for stored, columns, out, centroid in products.decoded:
        _decode_and_multiply(parameters, stored, columns, out, centroid, buffer)
    for out, shift in products.shifts:
        out += shift
    for out, factors in products.factors:
        out *= factors


def _decode_and_multiply(parameters, stored, columns, out, centroid, buffer):
    """Decodes into one buffer over and over, which stays in the cache.

    A cache of decoded leaves was tried (200,000 x 384, batches of 32 and 128). It was
    10 to 25% slower, because it reads 32 times the bytes of the codes, and 20% faster
    only if all batches visited the same 70 leaves.
    """
    for start in range(0, len(stored), len(buffer)):
        rows = slice(start, start + len(buffer))
        vectors = buffer[: len(stored) - start]
        if parameters.codebooks is None:
            vectors[:] = stored[rows]
        else:
            decode(stored[rows], parameters.byte_codebooks, vectors)
        for left, right, part in _steps(columns, vectors, out[:, rows]):
            np.matmul(left, right, out=part)
        if parameters.score == "l2":
            terms = 0.5 - np.vecdot(vectors, vectors) / 2
            if centroid is not None:
                terms -= vectors @ centroid
            out[:, rows] += terms


def _steps(columns, vectors, out):
    """The products (left, right, out) that fill out (n, m) from (D, n) and (m, D).

    In order 'F', products have at most a million terms: OpenBLAS then multiplies
    without copies, and a leaf takes a third less time. In order 'C', up to 3 queries
    are multiplied one by one, which is faster for 3 queries and 390 documents.
    """
    if scores_order() == "C":
        queries, step = columns.T, columns.shape[1] if columns.shape[1] > _FEW else 1
        rows = [slice(row, row + step) for row in range(0, len(queries), step)]
        return [(queries[row], vectors.T, out[row]) for row in rows]
    num, width = vectors.shape
    out = out.T  # (m, n)
    rows = _SMALL_PRODUCT // columns.size // 16 * 16
    if not _SMALL_ROWS <= rows < num:
        return [(vectors, columns, out)]
    whole = num // rows * rows
    cut = vectors[:whole].reshape(-1, rows, width)
    out_cut = out[:whole].reshape(-1, rows, columns.shape[1])
    return [(cut, columns, out_cut), (vectors[whole:], columns, out[whole:])]
