"""Timing of several systems in turn: seconds, percentiles and ratios."""

import ctypes
import itertools
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np

from ehi.progress import track

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

    for _ in track(range(args.repeats), "time", "rounds"):
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


# MERGED experiments_benchmark_memory: Memory of this process, as Linux counts it, and
# of its device.


def measured_build(build):
    """Result of a call, its wall seconds, and its peak of memory over before in MB."""
    before = _reset_peak()
    start = time.perf_counter()
    result = build()
    seconds = time.perf_counter() - start
    peak = None if before is None else max(0.0, memory_mb("VmHWM") - before)
    return result, seconds, peak


def peak_memory(run, *, torch: bool) -> dict[str, float | None]:
    """MB at the peak of a call: `host` over before, `device` with all that it holds.

    Args:
      run: the call.
      torch: whether torch does the work. Its count starts anew here; jax's never falls.

    Returns:
      both, None where nobody tells.
    """
    cuda = torch and jax.default_backend() == "gpu"
    if cuda:
        from torch import cuda as torch_memory

        torch_memory.reset_peak_memory_stats()
    _, _, host = measured_build(run)
    if cuda:
        device = torch_memory.max_memory_allocated()
    else:
        stats = {} if torch else jax.local_devices()[0].memory_stats() or {}
        device = stats.get("peak_bytes_in_use")
    return {"host": host, "device": device and device / 2**20}


def memory_mb(field: str) -> float:
    """A figure of this process as Linux gives it: 'VmRSS' now, 'VmHWM' at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field!r}")


def _reset_peak():
    """Start a new peak of resident memory; MB now, or None where that is not Linux."""
    try:
        # Memory freed but kept by malloc would hide what the call takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return memory_mb("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None
