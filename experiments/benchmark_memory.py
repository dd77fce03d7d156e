"""Memory of this process, as Linux counts it, and of its device."""

import ctypes
import time
from pathlib import Path

import jax


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
