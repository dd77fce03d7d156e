"""Resident memory of this process, as Linux counts it."""

import ctypes
import time
from pathlib import Path


def measured_build(build):
    """Result of a call, its wall seconds, and its peak of memory over before in MB."""
    before = _reset_peak()
    start = time.perf_counter()
    result = build()
    seconds = time.perf_counter() - start
    peak = None if before is None else max(0.0, memory_mb("VmHWM") - before)
    return result, seconds, peak


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
