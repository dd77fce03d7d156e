"""The origin of a number: versions, hardware, commit and config."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    "ehi",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tensorflow-datasets",
    "tokenizers",
    "ir_measures",
    "pytrec-eval-terrier",
)


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the installed packages, without importing them."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """One line: processor, cores that this process may use, memory, accelerators.

    Accelerators are named only if jax is already loaded: this function never loads it.
    """
    parts = [_cpu_model(), f"{_num_cores()} cores", f"{_memory_gib():.0f} GiB"]
    if jax := sys.modules.get("jax"):
        devices = [d for d in jax.local_devices() if d.platform != "cpu"]
        if devices:
            parts.append(f"{len(devices)} x {devices[0].device_kind}")
    return ", ".join(parts)


def git_commit(folder: str | Path) -> str:
    """The commit that is checked out, with '+dirty' if tracked files have changed.

    Args:
        folder: any folder of the repository.

    Returns:
        The 40 hexadecimal digits, or 'unknown' outside a repository or without git.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        dirty = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+dirty" if dirty else commit


def config_hash(
    config: Mapping[str, Any], *, without: Sequence[str] = ("seed",)
) -> str:
    """First 12 hexadecimal digits of the sha256 of a config's canonical JSON.

    Args:
        config: JSON values; the order of keys does not matter.
        without: keys to leave out, so that the seeds of one experiment share a hash.

    Raises:
        TypeError: a value is not JSON, so its hash could differ between runs.
    """
    counted = {key: value for key, value in config.items() if key not in without}
    canonical = json.dumps(counted, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
