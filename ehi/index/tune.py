"""Finds the search that scores the fewest documents at a wanted recall: see `tune`.

    exact search -> leaves that hold its results -> bisection over real searches

A search finds a result of exact search only in the leaves that it visits. So routing
alone says where the bisection starts: at the first beam, or probability of a leaf,
that visits enough of them. On raw leaves this is the answer. Codes rank some results
too low, and then the bisection visits more leaves or re-ranks more candidates.
"""

import math
import numbers
from dataclasses import dataclass

import numpy as np

from ehi.index import updates
from ehi.index.check import check_count
from ehi.index.contents import as_ids
from ehi.index.search.blas import map_threads, one_blas_thread
from ehi.index.search.routing import leaf_log_probs
from ehi.index.search.search import as_queries, rerank_scores, row_mask, search
from ehi.index.search.topk import EMPTY, keys_of, pack, smallest, unpack

_MOST_QUERIES = 1000  # their recall at 10 is known to half a percent
_MOST_RESULTS = 2**24  # of all queries together
_VALUES = 2**22  # numbers computed at once
_RERANKS = (2, 4, 8, 16, 32, 64)  # candidates tried for each result wanted
_HALVING = 16  # probabilities tried between one and half of it


@dataclass(frozen=True)
class Tuned:
    """A search setting, and what it does on the sample queries. `print` explains it.

    Attributes:
        beam, min_prob, rerank: arguments of `Index.search`.
        recall: the share of the exact results that it finds, mean over the queries.
        target: the recall that was asked for.
        k: results of a query.
        visited_mean, visited_p95: documents that a query scores in its leaves, mean and
            95th percentile, in copies.
        num_documents, num_queries: of the index, and of the sample.
        exact: the search that was counted as exact: 'vectors', 'codes' or 'truth'.

    Example:
        >>> tuned = Tuned(8, 0.0, 0, 0.957, 0.95, 10, 52.3, 80, 1000, 200, "vectors")
        >>> print(tuned)
        beam=8, min_prob=0, rerank=0
        recall@10 0.9570 of exact search of vectors, on 200 queries (0.95 wanted)
        visits 52 of 1,000 documents (5.23%), 95% of the queries at most 80 (8%)
    """

    beam: int
    min_prob: float
    rerank: int
    recall: float
    target: float
    k: int
    visited_mean: float
    visited_p95: float
    num_documents: int
    num_queries: int
    exact: str

    @property
    def reached(self):
        """Whether the recall is at least the target."""
        return self.recall >= self.target - 1e-9

    @property
    def setting(self):
        """The arguments of `Index.search`: `index.search(q, k, **tuned.setting)`."""
        return {"beam": self.beam, "min_prob": self.min_prob, "rerank": self.rerank}

    def __str__(self):
        share = 100 / self.num_documents
        lines = [
            f"beam={self.beam}, min_prob={self.min_prob:.4g}, rerank={self.rerank}",
            f"recall@{self.k} {self.recall:.4f} of {_EXACT[self.exact]}, on "
            f"{self.num_queries:,} queries ({self.target:g} wanted)",
            f"visits {self.visited_mean:,.0f} of {self.num_documents:,} documents "
            f"({self.visited_mean * share:.3g}%), 95% of the queries at most "
            f"{self.visited_p95:,.0f} ({self.visited_p95 * share:.3g}%)",
        ]
        if not self.reached:
            lines.append(
                f"recall {self.target:g} cannot be reached: a search of all leaves "
                f"finds no more than this"
            )
        return "\n".join(lines)


_EXACT = {
    "vectors": "exact search of vectors",
    "codes": "a search of all codes",
    "truth": "the given truth",
}


def tune(index, queries, recall=0.95, k=10, *, truth=None, save=False, threads=1):
    """Finds the search setting that scores the fewest documents at a recall.

    Recall is the share of the k documents of an exact search that a search finds. No
    labels are needed. Exact search scores every document: by its vector if the index
    stores vectors (raw leaves or re-rank vectors), else by its code. In the second case
    the recall says nothing of what the codes lose; `truth` can say it.

    A setting is a beam, or a probability that leaves must have (`min_prob`), and, where
    re-rank vectors are stored, a number of candidates to re-rank. Each such candidate
    counts as one more document scored. With the same arguments the result is the same.

    Memory: the sample, 2^24 results of it at most, and blocks of 2^22 numbers.

    Args:
        queries: (N, D) floats, or N texts if the index names its text encoder. At most
            1,000 of them are used, evenly spaced.
        recall: wanted, 0 < recall <= 1.
        k: results of a query.
        truth: (N, m) ids of the true results of each query, best first, padded with -1
            or None; its first k columns count. None runs an exact search.
        save: store the setting, in the folder if there is one. A search that names
            neither beam nor min_prob then uses it. A setting that misses the recall is
            not stored.
        threads: Python threads of each search.

    Returns:
        Tuned. If no setting reaches the recall, the one with the fewest documents that
        finds as much as a search of all leaves; `Tuned.reached` is then False.

    Raises:
        ValueError: no queries, or of another width or dtype or not finite; recall
            outside (0, 1]; k beyond the documents; truth of another shape or with ids
            that the index does not hold.
        IndexLockedError, OSError: the setting cannot be stored.

    Example:
        >>> import numpy as np
        >>> from ehi.index import build_index
        >>> x = np.random.default_rng(0).standard_normal((500, 8))
        >>> tree = {"kind": "per_node", "nodes": [x[None, :16]], "scale": 1.0}
        >>> index = build_index(x, range(500), tree=tree)
        >>> tuned = index.tune(x[::5], recall=0.9, save=True)
        >>> tuned.reached, tuned.visited_mean < 500
        (True, True)
        >>> index.search(x[:1]).visited[0] < 500  # by that setting
        np.True_
    """
    contents = index.contents
    recall = _check_recall(recall)
    queries = as_queries(index, queries)
    k = check_count("k", k)
    if k > contents.num_documents:
        raise ValueError(
            f"k={k} results are more than the {contents.num_documents} documents of "
            "the index"
        )
    num = min(len(queries), _MOST_QUERIES, max(1, _MOST_RESULTS // k))
    chosen = np.linspace(0, len(queries) - 1, num).astype(np.int64)
    given = None if truth is None else _given(contents, truth, len(queries), k)[chosen]
    trials = _Trials(index.parameters, contents, queries[chosen], k, given, threads)
    best = _cheapest(trials, recall)
    visited = best.visited
    tuned = Tuned(
        beam=best.beam, min_prob=best.min_prob, rerank=best.rerank,
        recall=best.found / trials.wanted, target=recall, k=k,
        visited_mean=float(visited.mean()),
        visited_p95=float(np.percentile(visited, 95)),
        num_documents=contents.num_documents, num_queries=num, exact=trials.exact,
    )  # fmt: skip
    if save and tuned.reached:
        share = tuned.visited_mean / tuned.num_documents
        found = {"recall": tuned.recall, "k": k, "visited": share}
        updates.keep_setting(index, tuned.setting | found)
    return tuned


def _check_recall(recall):
    if not (isinstance(recall, numbers.Real) and 0 < recall <= 1):
        raise ValueError(f"recall must be above 0 and at most 1, got {recall!r}")
    return float(recall)


def _given(contents, truth, num, k):
    """The rows of the first k true documents of each query: (N, m), padded with -1."""
    try:
        truth = np.asarray(truth)
    except ValueError:  # rows of different lengths
        truth = np.empty(0)
    if truth.ndim != 2 or len(truth) != num or not truth.size:
        raise ValueError(
            f"truth must be ids of shape ({num}, m), the same number for every query, "
            f"got shape {truth.shape}"
        )
    truth = truth[:, :k]
    if truth.dtype.kind in "iu":
        named = truth >= 0
        ids = as_ids(truth[named])
    else:
        truth = truth.astype(object)
        named = np.not_equal(truth, None).astype(bool)
        ids = as_ids(truth[named].tolist())
    rows = np.full(truth.shape, -1, np.int64)
    rows[named] = contents.find(ids)
    absent = named & (rows < 0)
    if absent.any():
        raise ValueError(
            f"truth names {absent.sum()} documents that the index does not hold, first "
            f"{truth[absent][0]!r}"
        )
    return rows


@dataclass(frozen=True, eq=False)
class _Trial:
    """What a setting did: exact results found, and (n,) documents visited."""

    beam: int
    min_prob: float
    rerank: int
    found: int
    visited: np.ndarray

    @property
    def cost(self):
        """Documents scored, those that are scored again included."""
        return float(self.visited.mean()) + self.rerank


class _Trials:
    """Searches of the sample queries; each beam and min_prob is searched once.

    Attributes:
        truth: (n, m) rows of the exact results, padded with -1.
        wanted: how many there are.
        exact: as of Tuned.
        reranks: ascending numbers of candidates to re-rank that are tried, with 0.
        everything: the trials of all leaves.
    """

    def __init__(self, parameters, contents, queries, k, truth, threads):
        self.parameters, self.contents, self.queries = parameters, contents, queries
        self.k, self.threads, self.mask = k, threads, row_mask(contents)
        coded = parameters.codebooks is not None
        rescored = coded and contents.segments[0].rerank_vectors is not None
        most = min(contents.num_documents, max(4 * k, _MOST_RESULTS // len(queries)))
        tried = [k * m for m in _RERANKS if k * m <= most] if rescored else []
        self.reranks = [0, *tried]
        everything = self._search(parameters.num_leaves, 0.0)
        self.exact = "truth"
        if truth is None and rescored:
            truth, self.exact = _nearest(contents, queries, k, threads), "vectors"
        elif truth is None:
            truth, self.exact = everything.rows[:, :k], "codes" if coded else "vectors"
        self.truth = truth
        self.wanted = int((truth >= 0).sum())
        if not self.wanted:
            raise ValueError("truth names no document")
        self.everything = self._compared(parameters.num_leaves, 0.0, everything)
        self._done = {(parameters.num_leaves, 0.0): self.everything}

    def run(self, beam, min_prob):
        """A _Trial for each of `reranks`."""
        setting = beam, min_prob
        if setting not in self._done:
            self._done[setting] = self._compared(*setting, self._search(*setting))
        return self._done[setting]

    def _search(self, beam, min_prob):
        return search(
            self.parameters, self.contents, self.queries, max(self.k, *self.reranks),
            beam=beam, min_prob=min_prob, threads=self.threads, mask=self.mask,
        )  # fmt: skip

    def _compared(self, beam, min_prob, hits):
        rows, keys, found = hits.rows, None, []
        if len(self.reranks) > 1:
            scores = rerank_scores(self.contents, self.queries, rows, self.threads)
            keys = keys_of(scores, rows)
        for rerank in self.reranks:
            best = rows[:, : self.k]
            if rerank:
                best = unpack(smallest(keys[:, :rerank], self.k))[1]
            num = _num_common(best, self.truth)
            found.append(_Trial(beam, min_prob, rerank, num, hits.visited))
        return found


def _num_common(rows, truth):
    """How many rows of the documents (n, m) of each query are among its rows (n, k)."""
    keys = [
        (np.arange(len(part))[:, None] << 32 | part)[part >= 0]
        for part in (rows, truth)
    ]
    return int(np.isin(keys[1], keys[0]).sum())


def _nearest(contents, queries, k, threads):
    """Rows of the k documents with the best stored vectors: (n, k), padded with -1."""

    def find(part):
        step = max(256, _VALUES // max(1, len(part)))
        best = np.full((len(part), k), EMPTY)
        for segment in contents.segments:
            for start in range(0, len(segment), step):
                vectors = segment.rerank_vectors[start : start + step]
                first = segment.first_row + start
                rows = np.arange(first, first + len(vectors))
                keys = pack(part @ vectors.astype(np.float32).T, rows)
                if contents.deleted is not None:
                    keys[:, contents.deleted[rows]] = EMPTY
                best = smallest(np.concatenate([best, keys], axis=1), k)
        return unpack(best)[1]

    threads = min(threads, len(queries))
    with one_blas_thread():
        return np.concatenate(
            map_threads(find, np.array_split(queries, threads), threads)
        )


def _cheapest(trials, recall):
    """The _Trial with the lowest cost that finds enough of the truth.

    More leaves, or more candidates, find more. So for each number of candidates, from
    the largest on, the fewest leaves are bisected. Fewer candidates need as many leaves
    at least, so a number ends the loop when these leaves alone cost too much.
    """
    everything = trials.everything
    needed = math.ceil(recall * trials.wanted - 1e-9)
    goal = min(needed, max(trial.found for trial in everything))
    best = None
    for settings in _settings(trials, goal):
        low = 0
        for number in reversed(range(len(trials.reranks))):
            if everything[number].found < goal:
                break

            def enough(at, number=number, settings=settings):
                return trials.run(*settings[at])[number].found >= goal

            low = _least(enough, low, len(settings) - 1)
            trial = trials.run(*settings[low])[number]
            if best is None or trial.cost < best.cost:
                best = trial
            if trial.visited.mean() >= best.cost:
                break
    return best


def _least(works, low, high):
    """The least number from `low` to `high` that works, where all larger ones do.

    `high` is taken to work. The first steps are short, for the answer is often near.
    """
    at, step = low, 1
    while at < high and not works(at):
        low, at, step = at + 1, min(high, at + step), 2 * step
    while low < at:
        middle = (low + at) // 2
        low, at = (low, middle) if works(middle) else (middle + 1, at)
    return at


def _settings(trials, goal):
    """Lists of (beam, min_prob) that visit more and more leaves, the last one all.

    The first of each list visits about `goal` of the true documents.
    """
    num_leaves = trials.parameters.num_leaves
    if num_leaves == 1:
        return [[(1, 0.0)]]
    ranks, log_probs = _places(trials)
    order = np.sort(ranks)
    first = int(order[goal - 1]) + 1 if goal else 1
    beams = [(beam, 0.0) for beam in range(first, num_leaves + 1)]
    # The best leaf is visited whatever its probability is.
    ordered = np.sort(np.where(ranks == 0, 0, -log_probs))
    start = -ordered[goal - 1] if goal else 0.0
    steps = math.ceil((ordered[-1] + start) / math.log(2) * _HALVING) + 1
    probs = [
        _rounded_down(math.exp(start - step * math.log(2) / _HALVING))
        for step in range(min(steps, 1000))
    ]
    return [beams, [*((num_leaves, prob) for prob in probs if prob), (num_leaves, 0.0)]]


def _rounded_down(prob):
    """A probability as four digits, smaller by more than what rounding may move it."""
    prob *= 1 - 1e-4
    if prob < 1e-30:
        return 0.0
    digits = 3 - math.floor(math.log10(prob))
    return math.floor(prob * 10.0**digits) / 10.0**digits


def _places(trials):
    """Where queries find their true documents: for each the best leaf that holds it.

    Returns:
        (wanted,) rank of the leaf among those of the query, from 0 on; (wanted,)
        float64 log p(leaf | query).
    """
    parameters, truth = trials.parameters, trials.truth
    known, leaves = _leaves_of(parameters, trials.contents, np.unique(truth))
    ranks, log_probs = [], []
    step = max(1, _VALUES // parameters.num_leaves)
    with one_blas_thread():
        for start in range(0, len(truth), step):
            part = slice(start, start + step)
            found = leaf_log_probs(trials.queries[part], parameters.routing_tree)
            order = np.argsort(-found, axis=1, kind="stable")
            rank_of = np.empty_like(order)
            np.put_along_axis(rank_of, order, np.arange(found.shape[1])[None], axis=1)
            query, place = (truth[part] >= 0).nonzero()
            held = leaves[np.searchsorted(known, truth[part][query, place])]  # (j, s)
            rank = rank_of[query[:, None], held].min(axis=1)
            ranks.append(rank)
            log_probs.append(found[query, order[query, rank]].astype(np.float64))
    return np.concatenate(ranks), np.concatenate(log_probs)


def _leaves_of(parameters, contents, rows):
    """The rows >= 0 of ascending ones (u,), and the leaves that hold each (u, s)."""
    rows = rows[rows >= 0]
    wanted = np.zeros(contents.num_rows, bool)
    wanted[rows] = True
    held_rows, held_leaves = [], []
    for segment in contents.segments:
        for start in range(0, segment.num_copies, _VALUES):
            here = segment.rows(start, min(start + _VALUES, segment.num_copies))
            copies = wanted[here].nonzero()[0]
            held_rows.append(here[copies].astype(np.int64))
            leaf = np.searchsorted(segment.leaf_offsets, copies + start, side="right")
            held_leaves.append(leaf - 1)
    order = np.argsort(np.concatenate(held_rows), kind="stable")
    leaves = np.concatenate(held_leaves)[order]
    return rows, leaves.reshape(len(rows), parameters.spill)
