"""Time and memory: systems timed in turn, and the peak memory of a call."""

import ctypes
import itertools
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np

from ehi.progress import track

THREADS = (1, 2)
SINGLES = 25  # single queries of a system before the next system's turn
_SINGLE_ROUNDS = 6  # rounds of single queries for each repeat of the batches


def time_systems(systems, queries, args) -> dict:
    """Return the seconds of every repeat, by (system, probes), then by what was timed.

    The systems take turns in every round, each after the one it is compared with.
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
    """Return the wall seconds of each call, and the CPU seconds of all threads."""
    run(batches[0][:1])  # replaces the previous system's data in the CPU caches
    seconds, cpu_start = [], time.process_time()
    for batch in batches:
        start = time.perf_counter()
        run(batch)
        seconds.append(time.perf_counter() - start)
    return seconds, time.process_time() - cpu_start


def summary(timing, batch: int) -> dict:
    """Return medians in queries per second, and percentiles of single queries in ms.

    Args:
        timing: result of `time_systems` for one system and number of probes.
        batch: queries per batch.
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
    """Return ours / Faiss in queries per second on one thread; None without Faiss."""
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


def measured_build(build):
    """Call; return the result, the wall seconds, and the MB at the peak over before."""
    before = _reset_peak()
    start = time.perf_counter()
    result = build()
    seconds = time.perf_counter() - start
    peak = None if before is None else max(0.0, memory_mb("VmHWM") - before)
    return result, seconds, peak


def peak_memory(run, *, torch: bool) -> dict[str, float | None]:
    """Return the MB at the peak of a call: `host` over before, `device` in total.

    Args:
      run: the call.
      torch: whether torch does the work. Its peak is reset here; jax's cannot be reset.

    Returns:
      `host` and `device`; None if the system does not report it.
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
    """Return the MB of this process in Linux: 'VmRSS' now, 'VmHWM' at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field!r}")


def _reset_peak():
    """Reset the peak of resident memory; return the MB now, or None outside Linux."""
    try:
        # Otherwise the call could use memory that malloc kept, which is not counted.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return memory_mb("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None
