"""Effectiveness, work, size and speed of one index at one setting."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ehi.eval.baselines.base import Baseline
from ehi.eval.metrics import Qrels, evaluate, means, run_from_hits, write_run
from ehi.eval.records import atomic_write_npy
from ehi.index import Index
from ehi.index.search.routing import leaf_log_probs

# Results a user looks at; effectiveness is measured on `k` of `measure` instead.
LATENCY_K = 10
# Beams above the bisected one that are tried before giving up.
_LOOK_AHEAD = 4


def beam_for_budget(
    index: Index | Baseline, queries: np.ndarray, percent: float
) -> int | None:
    """Largest beam whose counted mean of documents visited fits a budget.

    The count grows with the beam, strictly so in a tree of height 1. In a deeper tree a
    wider beam can swap a large leaf for a small one, so that the count may dip: the
    bisected beam is raised while one of the next four fits as well.

    Args:
        index: searched by routing only; no document is scored.
        queries: (N, D) embeddings of the queries that the mean is taken over.
        percent: of the documents that may be visited, 0 < percent <= 100.

    Returns:
        The beam, or None where one leaf a query is already too much.

    Raises:
        ValueError: `percent` is out of range.
    """
    _check_percent(percent)

    def fits(beam: int) -> bool:
        mean = index.count_visited(queries, beam).mean()
        # 10% of 5,212 documents is not a float: allow for the rounding.
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


def min_prob_for_budget(
    index: Index, queries: np.ndarray, percent: float
) -> float | None:
    """Leaf probability from which on visiting all leaves fits a budget.

    All leaves of all queries are put in the order of p(leaf | query), behind the best
    one of each query, and cut where their documents are as many as may be visited. Of
    searches that visit so many this one reaches the most probability, which leaves of
    equal sizes would make the best for relevant documents, if p is true.

    Memory: 24 N P bytes.

    Args:
        index: its tree and the sizes of its leaves.
        queries: (N, D) embeddings of the queries that the mean is taken over.
        percent: of the documents that may be visited, 0 < percent <= 100.

    Returns:
        `min_prob` of `Index.search` with a beam of all leaves, or None where the best
        leaf of each query is already too much.

    Raises:
        ValueError: `percent` is out of range.
    """
    _check_percent(percent)
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
    # Between two different values, so that rounding cannot move a leaf across.
    while 0 < fits < len(ordered) and ordered[fits - 1] == ordered[fits]:
        fits -= 1
    if not fits:
        return 1.0
    last, first_out = ordered[fits - 1], ordered[min(fits, len(ordered) - 1)]
    return 0.0 if first_out == -np.inf else float(np.exp((last + first_out) / 2))


def _check_percent(percent: float) -> None:
    if not 0 < percent <= 100:
        raise ValueError(f"budget must be in (0, 100] percent, not {percent}")


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
) -> dict[str, Any]:
    """Search a split and return the fields of its record that the index decides.

    Latency (one query at a time, one thread) and batch speed (`threads` threads) are
    those of a top-10 search of embeddings in memory; encoding the query is not counted.

    Args:
        index: what is measured.
        queries: (N, D) embeddings.
        query_ids: names of the N queries.
        qrels: grades of the split.
        beam: leaves a query visits, with `min_prob` at most.
        min_prob: probability from which on a leaf is visited, or None for all of the
            beam, as of an index that knows no probabilities.
        tower_width: T, the width that compression is counted against.
        rerank: stored vectors read for each query.
        k: depth of the ranking that is scored, at most `rerank` where that is set.
        threads: of the batch search.
        latency_queries: queries timed one by one, spread over the N.
        run_path: where the TREC run goes (`NAME.run`, or `NAME.run.gz`); the values
            of each query go to `NAME.npy` beside it. None writes neither.

    Returns:
        Keyword arguments of `Record`, from `ndcg_at_10` to `threads`.
    """
    # Re-ranking orders the documents whose vectors it reads; there are no others.
    depth, top = (min(k, rerank or k) for k in (k, LATENCY_K))
    settings = {"beam": beam, "rerank": rerank}
    if min_prob is not None:
        settings["min_prob"] = min_prob
    hits = index.search(queries, depth, threads=threads, **settings)
    run = run_from_hits(query_ids, hits.ids, hits.scores)
    per_query = evaluate(run, qrels)
    if run_path is not None:
        write_run(run_path, run)
        atomic_write_npy(per_query_path(run_path), per_query)

    def search(rows: np.ndarray, threads: int = 1) -> None:
        index.search(rows, top, threads=threads, **settings)

    return {
        **{name.replace("@", "_at_"): v for name, v in means(per_query).items()},
        "docs_visited": float(hits.visited.mean() / index.num_documents),
        "nodes_scored": float(hits.nodes_scored.mean() / index.num_documents),
        "bytes_per_doc": float(index.bytes_per_doc),
        "compression": float(4 * tower_width / index.bytes_per_doc),
        "index_bytes": int(index.index_bytes),
        "beam": beam,
        "min_prob": min_prob,
        "rerank": rerank,
        "leaf_load_max": index.leaf_load_max,
        "leaf_load_cv": index.leaf_load_cv,
        **_latency(search, queries, latency_queries),
        "qps_batch": _queries_per_second(lambda rows: search(rows, threads), queries),
        "threads": threads,
    }


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
    threads: int = 1,
) -> list[tuple[float, float]]:
    """nDCG@10 against the mean share of documents visited.

    Args:
        index: what is searched.
        queries: (N, D) embeddings.
        query_ids: names of the N queries.
        qrels: grades of the split.
        settings: arguments of a search, one point of the curve each.
        threads: of the search.

    Returns:
        A pair (share of documents visited, nDCG@10) for each setting.
    """
    points = []
    for setting in settings:
        hits = index.search(queries, 10, threads=threads, **setting)
        run = run_from_hits(query_ids, hits.ids, hits.scores)
        visited = float(hits.visited.mean() / index.num_documents)
        points.append((visited, float(evaluate(run, qrels)["ndcg@10"].mean())))
    return points


def _latency(
    search: Callable[[np.ndarray], None], queries: np.ndarray, count: int
) -> dict[str, float]:
    rows = np.linspace(0, len(queries) - 1, min(count, len(queries))).astype(int)
    # The first searches pay for page faults and lazy set-up, not for searching.
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
    # The fastest: other processes can only slow a search down.
    return len(queries) / min(seconds)
