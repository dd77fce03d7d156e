"""Effectiveness, work, size and speed of one index at one setting."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ehi.eval.baselines.base import Baseline, BaselineHits
from ehi.eval.baselines.options import options_text
from ehi.eval.costs import LARGE, total_bytes_per_doc, work
from ehi.eval.metrics import (
    Qrels,
    Run,
    evaluate,
    exact_recall,
    means,
    run_from_hits,
    without_identical_ids,
    write_run,
)
from ehi.files import atomic_write_npy
from ehi.index import Hits, Index
from ehi.index.search.routing import leaf_log_probs
from ehi.index.search.search import joined, queries_at_once
from ehi.progress import Progress, track

# Results that a user looks at. Effectiveness is measured on more: `k` of `measure`.
LATENCY_K = 10
# Beams above the bisected one to try before giving up.
_LOOK_AHEAD = 4


def beam_for_budget(
    index: Index | Baseline, queries: np.ndarray, percent: float
) -> int | None:
    """Find the largest beam whose mean count of visited documents fits a budget.

    The count grows with the beam, strictly in a tree of height 1. In a deeper tree a
    wider beam can replace a large leaf by a small one, so the count may drop. After
    bisection the beam is therefore raised as long as one of the next four fits.

    Args:
        index: only routed through; no document is scored.
        queries: (N, D) embeddings; the mean is over these queries.
        percent: documents that may be visited, 0 < percent <= 100.

    Returns:
        The beam, or None if one leaf for each query is already too much.

    Raises:
        ValueError: `percent` is out of range.
    """
    _check_percent(percent)

    def fits(beam: int) -> bool:
        mean = index.count_visited(queries, beam).mean()
        # Rounding: 10% of 5,212 documents is no exact float.
        return mean <= percent / 100 * index.num_documents * (1 + 1e-9)

    if not fits(1):
        return None
    low, high = 1, index.num_leaves  # low fits; the answer is in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    last = low + _LOOK_AHEAD
    beam = low + 1
    while beam <= min(last, index.num_leaves):
        if fits(beam):
            low, last = beam, beam + _LOOK_AHEAD
        beam += 1
    return low


def shared_beam_for_budget(
    index: Baseline, queries: np.ndarray, percent: float
) -> float | None:
    """Find the beam, not a whole number, that meets a budget on average.

    It is for indexes that visit as many lists for every query. With the largest whole
    beam they would waste up to a list; so a part of the queries visits one more.

    Args:
        index: only routed through; no document is scored.
        queries: (N, D) embeddings; the mean is over these queries.
        percent: documents that may be visited, 0 < percent <= 100.

    Returns:
        The beam, or None if one list for each query is already too much.

    Raises:
        ValueError: `percent` is out of range.
    """
    low = beam_for_budget(index, queries, percent)
    if low is None or low == index.num_leaves:
        return low
    budget = percent / 100 * index.num_documents
    fewer, more = (index.count_visited(queries, b).mean() for b in (low, low + 1))
    return low + float(np.clip((budget - fewer) / (more - fewer), 0, 0.999))


def min_prob_for_budget(
    index: Index | Baseline, queries: np.ndarray, percent: float
) -> float | None:
    """Find the least leaf probability for which visiting all such leaves fits a budget.

    Each query visits its best leaf. The other leaves of all queries are sorted by
    p(leaf | query), and taken until the budget of documents is used up. No other search
    of this budget reaches more probability. If p is true and leaves have equal sizes,
    it finds the most relevant documents.

    Memory: 24 N P bytes.

    Args:
        index: only its tree, or its centroids, and the sizes of its leaves are read.
        queries: (N, D) embeddings; the mean is over these queries.
        percent: documents that may be visited, 0 < percent <= 100.

    Returns:
        `min_prob` for `Index.search` with a beam of all leaves, or None if the best
        leaf of each query is already too much.

    Raises:
        ValueError: `percent` is out of range.
    """
    _check_percent(percent)
    if isinstance(index, Baseline):
        log_probs = index.leaf_log_probs(queries)  # (N, P)
    else:
        log_probs = leaf_log_probs(queries, index.routing_tree)  # (N, P)
    sizes = index.leaf_sizes
    budget = percent / 100 * index.num_documents * len(queries) * (1 + 1e-9)
    best = log_probs.argmax(axis=1)
    budget -= sizes[best].sum()
    if budget < 0:
        return None
    np.put_along_axis(log_probs, best[:, None], -np.inf, axis=1)
    order = np.argsort(-log_probs, axis=None)
    ordered = log_probs.ravel()[order]
    fits = int(np.searchsorted(np.cumsum(sizes[order % len(sizes)]), budget, "right"))
    # Cut between two different values, so that rounding cannot move a leaf across.
    while 0 < fits < len(ordered) and ordered[fits - 1] == ordered[fits]:
        fits -= 1
    if not fits:
        return 1.0
    last, first_out = ordered[fits - 1], ordered[min(fits, len(ordered) - 1)]
    return 0.0 if first_out == -np.inf else float(np.exp((last + first_out) / 2))


def _check_percent(percent: float) -> None:
    if not 0 < percent <= 100:
        raise ValueError(f"budget must be in (0, 100] percent, not {percent}")


def rank(
    index: Index | Baseline,
    queries: np.ndarray,
    query_ids: Sequence[str],
    qrels: Qrels,
    k: int,
    *,
    ignore_identical_ids: bool | Collection[str] = False,
    **settings: Any,
) -> tuple[Run, Hits | BaselineHits]:
    """Search, and make the run that is scored: all rows of a table go through here.

    A document that is ignored is dropped before the cut at k: its query is searched
    again for k + 1 documents.

    Args:
        index: the index to search.
        queries: (N, D) embeddings.
        query_ids: names of the N queries.
        qrels: grades of the split.
        k: depth of the ranking.
        ignore_identical_ids: `ignore` of `without_identical_ids`.
        settings: further arguments of the search.

    Returns:
        The run, and the hits of the first search.
    """
    hits = _search(index, queries, k, settings)
    run = run_from_hits(query_ids, hits.ids, hits.scores)
    kept = without_identical_ids(run, qrels, ignore_identical_ids)
    again = [i for i, name in enumerate(query_ids) if len(kept[name]) < len(run[name])]
    if again:
        if settings.get("rerank"):
            settings["rerank"] += 1
        found = index.search(queries[again], k + 1, **settings)
        longer = run_from_hits([query_ids[i] for i in again], found.ids, found.scores)
        longer = without_identical_ids(longer, qrels, ignore_identical_ids)
        kept |= {name: dict(islice(docs.items(), k)) for name, docs in longer.items()}
    return kept, hits


def _search(index, queries, k, settings) -> Hits | BaselineHits:
    """Search in the batches of `Index.search`, so that progress is logged.

    The bits are those of one search. A library searches all queries in one call: its
    scores would round differently in other batches.
    """
    if isinstance(index, Baseline):
        return index.search(queries, k, **settings)
    most = settings.get("rerank") or k
    step = queries_at_once(index.parameters, settings.get("beam", 1), most)
    parts = []
    with Progress("search", len(queries), "queries", bar=False) as progress:
        for start in range(0, max(len(queries), 1), step):
            part = queries[start : start + step]
            parts.append(index.search(part, k, **settings))
            progress.update(len(part))
    if len(parts) == 1:
        return parts[0]
    found = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("ids", "scores", "visited", "nodes_scored", "rows")
    }
    return Hits(**found, leaves=joined([part.leaves for part in parts]))


def _visited(shares: np.ndarray) -> dict[str, float]:
    """Fields of the shares of the documents that queries score (N,)."""
    return {
        "docs_visited": float(shares.mean()),
        "docs_visited_p95": float(np.percentile(shares, 95)),
        "docs_visited_max": float(shares.max()),
    }


def measure(
    index: Index | Baseline,
    queries: np.ndarray,
    query_ids: Sequence[str],
    qrels: Qrels,
    *,
    beam: int,
    min_prob: float | None = None,
    tower_width: int,
    rerank: int = 0,
    k: int = 1000,
    threads: int = 1,
    latency_queries: int = 200,
    run_path: str | Path | None = None,
    ignore_identical_ids: bool | Collection[str] = False,
    unlabelled: Collection[str] | None = None,
    exact: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Search a split and return the fields of its record that depend on the index.

    Speed is that of a top-10 search of embeddings in memory, without encoding the
    query: latency of one query at a time on one thread, queries per second of a batch
    on `threads` threads.

    Args:
        index: the index to measure.
        queries: (N, D) embeddings.
        query_ids: names of the N queries.
        qrels: grades of the split.
        beam: leaves that a query visits; with `min_prob` at most so many.
        min_prob: least probability of a visited leaf, or None to visit the whole beam,
            as an index without probabilities does.
        tower_width: T; compression is relative to T floats.
        rerank: stored vectors read for each query.
        k: depth of the scored ranking, at most `rerank` if that is set.
        threads: threads of the batch search.
        latency_queries: number of queries timed one by one, spread over the N.
        run_path: path of the TREC run (`NAME.run` or `NAME.run.gz`); the values of each
            query go to `NAME.npy` beside it. None writes neither.
        ignore_identical_ids: `ignore` of `without_identical_ids`.
        unlabelled: queries that are also scored apart: see `unlabelled_queries`; None
            if nothing is known of labels.
        exact: query id -> ids of its exact nearest documents, best first; None leaves
            recall against exact search out.

    Returns:
        Keyword arguments of `Record`: its fields from `ndcg_at_10` to `threads`.
    """
    # Re-ranking returns only documents whose vectors it reads.
    depth, top = (min(k, rerank or k) for k in (k, LATENCY_K))
    settings = {"beam": beam, "rerank": rerank}
    if min_prob is not None:
        settings["min_prob"] = min_prob
    run, hits = rank(
        index, queries, query_ids, qrels, depth, threads=threads,
        ignore_identical_ids=ignore_identical_ids, **settings,
    )  # fmt: skip
    per_query = evaluate(run, qrels)
    if run_path is not None:
        write_run(run_path, run)
        atomic_write_npy(per_query_path(run_path), per_query)

    library = isinstance(index, Baseline)

    def search(rows: np.ndarray, threads: int = 1) -> None:
        index.search(rows, top, threads=threads, **settings)

    return {
        **{name.replace("@", "_at_"): v for name, v in means(per_query).items()},
        **_unlabelled(per_query, unlabelled),
        **_exact(run, exact),
        **_visited(hits.visited / index.num_documents),
        "nodes_scored": float(hits.nodes_scored.mean() / index.num_documents),
        "work": float(work(index, hits, rerank).mean()),
        "bytes_per_doc": float(index.bytes_per_doc),
        "total_bytes_per_doc": total_bytes_per_doc(index),
        "total_bytes_per_doc_1m": total_bytes_per_doc(index, LARGE),
        "compression": float(4 * tower_width / _code_bytes(index)),
        "index_bytes": int(index.index_bytes),
        "beam": beam,
        "min_prob": min_prob,
        "rerank": rerank,
        "options": options_text(index.options) if library and index.options else None,
        "leaf_load_max": index.leaf_load_max,
        "leaf_load_cv": index.leaf_load_cv,
        **_latency(search, queries, latency_queries),
        "qps_batch": _queries_per_second(lambda rows: search(rows, threads), queries),
        "threads": threads,
    }


def _unlabelled(per_query: np.ndarray, ids: Collection[str] | None) -> dict[str, Any]:
    """Fields of `Record` on the queries of some ids; empty if `ids` is None."""
    if ids is None:
        return {}
    chosen = per_query[np.isin(per_query["query_id"], list(ids))]
    fields = {"unlabelled_queries": len(chosen)}
    if len(chosen):
        fields["ndcg_at_10_unlabelled"] = float(chosen["ndcg@10"].mean())
        fields["recall_at_100_unlabelled"] = float(chosen["recall@100"].mean())
    return fields


def _exact(run: Run, exact: Mapping[str, Sequence[str]] | None) -> dict[str, float]:
    """Fields of `Record` against exact search; empty if `exact` is None."""
    found = {} if exact is None else exact_recall(run, exact)
    return {f"exact_recall_at_{k}": value for k, value in found.items()}


def _code_bytes(index: Index | Baseline) -> float:
    """Bytes per document that a budget limits: codes or vectors without factors."""
    ours = isinstance(index, Index)
    return index.code_bytes_per_doc if ours else index.bytes_per_doc


def per_query_path(run_path: str | Path) -> Path:
    """`NAME.npy` for `NAME.run` or `NAME.run.gz`."""
    run_path = Path(run_path)
    name = run_path.name.removesuffix(".gz").removesuffix(".run")
    return run_path.with_name(f"{name}.npy")


def curve(
    index: Index | Baseline,
    queries: np.ndarray,
    query_ids: Sequence[str],
    qrels: Qrels,
    settings: Iterable[Mapping[str, Any]],
    *,
    ignore_identical_ids: bool | Collection[str] = False,
) -> list[tuple[float, float]]:
    """Measure nDCG@10 and the mean share of documents visited, at some settings.

    Args:
        index: the index to search.
        queries: (N, D) embeddings.
        query_ids: names of the N queries.
        qrels: grades of the split.
        settings: arguments of one search for each point of the curve.
        ignore_identical_ids: `ignore` of `without_identical_ids`.

    Returns:
        A pair (share of documents visited, nDCG@10) for each setting.
    """
    points = []
    for setting in track(settings, "curve", "points", bar=False):
        run, hits = rank(
            index, queries, query_ids, qrels, 10,
            ignore_identical_ids=ignore_identical_ids, **setting,
        )  # fmt: skip
        visited = float(hits.visited.mean() / index.num_documents)
        points.append((visited, float(evaluate(run, qrels)["ndcg@10"].mean())))
    return points


def _latency(
    search: Callable[[np.ndarray], None], queries: np.ndarray, count: int
) -> dict[str, float]:
    rows = np.linspace(0, len(queries) - 1, min(count, len(queries))).astype(int)
    # Warm up: the first searches include page faults and lazy set-up.
    for row in rows[:10]:
        search(queries[row : row + 1])
    milliseconds = []
    for row in rows:
        query = queries[row : row + 1]
        start = time.perf_counter()
        search(query)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    points = np.percentile(milliseconds, (50, 95, 99)).tolist()
    return dict(
        zip(("latency_ms_p50", "latency_ms_p95", "latency_ms_p99"), points, strict=True)
    )


def _queries_per_second(
    search: Callable[[np.ndarray], None], queries: np.ndarray, repeats: int = 3
) -> float:
    search(queries[:10])
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        search(queries)
        seconds.append(time.perf_counter() - start)
    # Other processes can only slow a search down, so the fastest run counts.
    return len(queries) / min(seconds)
