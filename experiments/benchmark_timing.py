"""Timing of several systems in turn: seconds, percentiles and ratios."""

import itertools
import time
from collections import defaultdict

import numpy as np
from tqdm import trange

THREADS = (1, 2)
SINGLES = 25  # queries asked one by one before the next system has its turn
_SINGLE_ROUNDS = 6  # of singles, for each repeat of the batches


def time_systems(systems, queries, args) -> dict:
    """Seconds of every repeat, by (system, probes) and then by what was timed.

    The systems take turns within every round, each after the one it is compared with.
    """
    timings = defaultdict(lambda: defaultdict(list))
    batches = [(threads, probes) for threads in THREADS for probes in args.probes]
    asked = itertools.cycle([queries[row : row + 1] for row in range(len(queries))])

    def take_turns(name, probes, threads, calls):
        for system in systems:
            run = system.prepare(probes, threads)
            seconds, cpu = timed(run, calls)
            timing = timings[system.name, probes]
            timing[name, "seconds"].append(sum(seconds))
            timing[name, "cpu_seconds"].append(cpu)
            timing[name, "latencies"] += seconds

    for _ in trange(args.repeats, desc="time", disable=None):
        for threads, probes in batches:
            take_turns(f"batch_{threads}", probes, threads, [queries])
        for probes in args.probes:
            for _ in range(_SINGLE_ROUNDS):
                calls = list(itertools.islice(asked, SINGLES))
                take_turns("single", probes, 1, calls)
    return timings


def timed(run, batches):
    """Wall seconds of each call, and CPU seconds of all, threads included."""
    run(batches[0][:1])  # the caches still hold what the system before it read
    seconds, cpu_start = [], time.process_time()
    for batch in batches:
        start = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - start)
    return seconds, time.process_time() - cpu_start


def summary(timing, batch: int) -> dict:
    """Medians as queries per second, and percentiles of single queries in ms.

    Args:
        timing: of one system and number of probes, from `time_systems`.
        batch: queries of a batch.
    """
    latencies = 1000 * np.array(timing["single", "latencies"])
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]).tolist()
    batches = {
        str(threads): batch / float(np.median(timing[f"batch_{threads}", "seconds"]))
        for threads in THREADS
    }
    return {
        "qps_single": SINGLES / float(np.median(timing["single", "seconds"])),
        "qps_batch": batches,
        "latency_ms": {"p50": p50, "p95": p95, "p99": p99},
    }


def ratios(timings, probes, what) -> dict[str, float] | None:
    """Ours over Faiss in queries per second on one thread; None without Faiss."""
    if ("faiss raw", probes[0]) not in timings:
        return None
    found = {}
    for kind in ("raw", "pq"):
        asked = [(f"batch_{p}", p, "batch_1") for p in probes]
        for name, p, key in [*asked, ("single", probes[0], "single")]:
            ours, theirs = (
                np.median(timings[f"{system} {kind}", p][key, what])
                for system in ("ehi", "faiss")
            )
            found[f"{kind}_{name}"] = float(theirs / ours)
    return found
