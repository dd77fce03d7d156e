"""Search speed, recall and memory of our index beside Faiss, ScaNN and usearch.

    python -m experiments.benchmark search --peers=faiss,scann,usearch --json=FILE

All systems run in one process, with the same documents, queries and exact answers. Ours
and Faiss search the same inverted lists with the same codes, so that `ratios` (ours /
Faiss, queries/s on one thread) compare only code. Systems take turns, because the load
of the machine changes.
"""

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from ehi.eval import figures
from ehi.eval.provenance import git_commit, hardware, versions
from ehi.files import atomic_write
from ehi.index.search.blas import blas_architecture
from ehi.progress import Progress, track
from experiments.benchmarks.data import (
    exact_top,
    gaussian_mixture,
    overlap,
    real_embeddings,
)
from experiments.benchmarks.growth import benchmark_growth
from experiments.benchmarks.measure import (
    memory_mb,
    ratios,
    summary,
    time_systems,
    timed,
)
from experiments.benchmarks.peers import PEERS, build_systems, missing, train

PACKAGES = ("numpy", "threadpoolctl", "jax", "faiss-cpu", "scann", "usearch")
_CURVE_PROBES = (1, 2, 4, 8, 16, 32, 64)


def add_arguments(command) -> None:
    """Add the options of `search`."""
    command.add_argument("--n", type=int, default=200_000, help="documents")
    command.add_argument("--dim", type=int, default=384, help="width of the mixture")
    command.add_argument(
        "--peers", default=",".join(PEERS),
        help="comma-separated, of " + ", ".join(PEERS),
    )  # fmt: skip
    command.add_argument(
        "--data", choices=("mixture", "real"), default="mixture",
        help="'real' adds MiniLM embeddings of pydocs and SciFact",
    )  # fmt: skip
    command.add_argument("--lists", type=int, default=512, help="number of leaves")
    command.add_argument("--subspaces", type=int, default=48, help="bytes per code")
    command.add_argument(
        "--probes", type=int, nargs="+", default=[8, 32], help="leaves to visit"
    )
    command.add_argument("--k", type=int, default=10, help="number of results")
    command.add_argument(
        "--num-queries", type=int, default=1000, help="queries per batch"
    )
    command.add_argument("--repeats", type=int, default=7)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", type=Path, help="file for the results")
    command.add_argument(
        "--figure", type=Path, help="PNG file (default: beside --json, if given)"
    )
    command.add_argument(
        "--growth", action="store_true", help="sweep the number of documents instead"
    )
    command.add_argument(
        "--growth-sizes", type=int, nargs="+",
        default=[50_000, 200_000, 1_000_000, 5_000_000],
        help="the default needs 12 GB of memory and 8 GB of disk in TMPDIR",
    )  # fmt: skip
    command.add_argument("--growth-recall", type=float, default=0.9)
    command.add_argument(
        "--growth-clusters", choices=("grow", "fixed"), default="grow",
        help="'grow': as the square root of n, like the number of leaves",
    )  # fmt: skip
    command.set_defaults(run=benchmark_search)


def benchmark_search(args) -> dict:
    """Run the comparison or the growth sweep; write the files that were asked for."""
    peers = [peer for peer in args.peers.split(",") if peer]
    not_run = missing(peers)
    for peer, command in not_run.items():
        print(f"{peer} is not installed, so it is skipped: {command}", file=sys.stderr)
    results = {
        "arguments": {name: str(value) for name, value in vars(args).items()
                      if name not in ("run", "json", "figure") and value is not None},
        "not_run": not_run,
        "cpus": len(os.sched_getaffinity(0)),
        "hardware": hardware(),
        "blas": blas_architecture(),  # the kernels that NumPy runs
        "git_commit": git_commit(Path(__file__).parent),
        "versions": versions(PACKAGES),
    }  # fmt: skip
    if args.growth:
        results["growth"] = benchmark_growth(args)
    else:
        peers = [peer for peer in peers if peer not in not_run]
        data = {"mixture": make_mixture}
        if args.data == "real":
            data["real"] = make_real
        for name, make in data.items():
            results[name] = compare(make(args), args, peers)
        results["ratios"] = results["mixture"]["ratios"]
        figure = args.figure or (args.json and args.json.with_suffix(".png"))
        if figure:
            draw({name: results[name] for name in data}, figure)
    if args.json:
        atomic_write(args.json, (json.dumps(results, indent=2) + "\n").encode())
    return results


def make_mixture(args):
    """Return the Gaussian mixture."""
    return gaussian_mixture(
        args.n, args.dim, num_queries=args.num_queries, seed=args.seed
    )


def make_real(args):
    """Return the MiniLM embeddings."""
    return real_embeddings(args.n, num_queries=args.num_queries, seed=args.seed)


def compare(collection, args, peers) -> dict:
    """Compare all systems on one collection: rows of results, ratios, a curve."""
    documents, queries = collection.documents, collection.queries
    exact = exact_top(documents, queries, args.k)
    start = time.perf_counter()
    centroids, codebooks = train(documents, args.lists, args.subspaces, args.seed)
    train_seconds = time.perf_counter() - start
    systems = []
    count = 3 + 3 * ("faiss" in peers) + ("scann" in peers) + ("usearch" in peers)
    made = build_systems(documents, centroids, codebooks, k=args.k, peers=peers)
    systems.extend(track(made, f"{collection.name}: build", "systems", total=count))
    timings = time_systems(systems, queries, args)
    rows, found = [], {}
    for system in systems:
        for probes in args.probes:
            rows_found = system.prepare(probes, 1)(queries)
            found[system.name, probes] = rows_found
            rows.append(
                {
                    "system": system.name,
                    **system.setting(probes),
                    "recall@k": overlap(rows_found, exact),
                    **summary(timings[system.name, probes], len(queries)),
                    "bytes_per_doc": system.bytes_per_doc,
                    "build_seconds": system.build_seconds,
                    "peak_build_mb": system.peak_build_mb,
                }
            )
    return {
        "documents": len(documents),
        "width": documents.shape[1],
        "lists": len(centroids),
        "queries": len(queries),
        "k": args.k,
        "train_seconds": train_seconds,
        "systems": rows,
        "same_top10": same_answers(found, args.probes),
        "ratios": ratios(timings, args.probes, "seconds"),
        # CPU time of all threads: other programs on the machine disturb it less.
        "cpu_ratios": ratios(timings, args.probes, "cpu_seconds"),
        "two_threads_over_one": thread_ratios(rows),
        "curve": curve(systems, queries, exact, args),
        "peak_mb": memory_mb("VmHWM"),
    }


def thread_ratios(rows) -> dict[str, float]:
    """Return queries/s on two threads over one thread, by system and setting."""
    found = {}
    for row in rows:
        setting = row.get("probes", row.get("expansion"))
        one, two = (row["qps_batch"][threads] for threads in ("1", "2"))
        found[f"{row['system']} {setting}"] = two / one
    return found


def same_answers(found, probes) -> dict[str, float]:
    """Return the share of Faiss's results that ours also returned, by probes."""
    return {
        f"{kind}_{p}": overlap(found[f"ehi {kind}", p], found[f"faiss {kind}", p])
        for kind in ("raw", "pq")
        for p in probes
        if (f"faiss {kind}", p) in found
    }


def curve(systems, queries, exact, args) -> list[dict]:
    """Measure recall and queries/s of a batch on one thread over many settings."""
    points = []
    probes = [p for p in _CURVE_PROBES if p <= args.lists]
    with Progress("curve", len(probes) * len(systems), "points") as progress:
        for p in probes:
            for system in systems:
                run = system.prepare(p, 1)
                recall = overlap(run(queries), exact)
                seconds = np.median([timed(run, [queries])[0][0] for _ in range(2)])
                point = {"recall@k": recall, "qps_batch": len(queries) / float(seconds)}
                points.append({"system": system.name, **system.setting(p), **point})
                progress.update()
    return points


def draw(results, path: Path) -> None:
    """Draw throughput against recall, one file per collection: PATH and PATH-real."""
    for name, result in results.items():
        title = f"{result['documents']:,} x {result['width']}, {name}, 1 thread"
        figure, axes = figures.new_axes(title)
        axes.set_ylabel(f"queries per second, batches of {result['queries']:,}")
        axes.set_xlabel(f"recall@{result['k']} of the exact answer")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("")
        points = defaultdict(list)
        for point in result["curve"]:
            points[point["system"]].append((point["recall@k"], point["qps_batch"]))
        styles = figures.styles()
        for system, line in points.items():
            axes.plot(*zip(*line, strict=True), label=system, **next(styles))
        axes.legend(frameon=False, fontsize=8)
        suffix = "" if name == "mixture" else f"-{name}"
        figures.save(figure, path.with_stem(path.stem + suffix))
