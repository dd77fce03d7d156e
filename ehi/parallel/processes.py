"""Several processes that train one model: how they start, agree and end.

All run the same program on the same data; a batch is spread over the devices of all.
With one process nothing here does anything.
"""

import contextlib
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

# jax has no public access to its key-value store and barriers, nor a question whether
# `initialize` would find a launcher; both names are used by orbax too.

# Exit code of a process that lost another one (EX_UNAVAILABLE of sysexits.h).
LOST = 69
# Seconds without a heartbeat after which a process counts as lost.
LOST_AFTER = 60
# Process 0 may evaluate for hours while the others wait; heartbeats tell that it lives.
_PATIENCE_MS = 7 * 24 * 3600 * 1000
# How long a process that failed waits for the others to fail of the same.
_GOODBYE_MS = 3000
_LAST_SECONDS = 1.0
# What the transports and jax's coordination service say when a process is gone.
_SIGNS_OF_LOSS = (
    "Gloo",
    "NCCL",
    "onnection closed by peer",
    "onnection reset",
    "heartbeat",
    "coordination service",
    "CoordinationService",
    "Barrier failed",
)

_calls = itertools.count()


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    lost_after: int = LOST_AFTER,
) -> bool:
    """Join the other processes, if there are any; before any other use of jax.

    There are if the three values are given, or if jax finds the environment of a
    launcher (Slurm, Open MPI, an indexed Kubernetes job, a TPU slice) that started
    more than one process.

    Args:
      coordinator: 'host:port' of process 0.
      num_processes, process_id: how many there are, and which one this is.
      timeout: seconds that a process waits for all to be there.
      lost_after: seconds after which a silent process counts as lost.

    Returns:
      whether there are others to wait for.

    Raises:
      ValueError: one or two of the three values, or values that do not fit.
    """
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{' and '.join(missing)} missing: give all of {', '.join(given)}, or none "
            "of them under a launcher (Slurm, Open MPI, Kubernetes, TPU)"
        )
    options = {
        "initialization_timeout": timeout,
        "heartbeat_timeout_seconds": lost_after,
        "shutdown_timeout_seconds": lost_after,
    }
    if not missing:
        _check_place(coordinator, num_processes, process_id)
        jax.distributed.initialize(
            coordinator, num_processes, process_id,
            cluster_detection_method="deactivate", **options,
        )  # fmt: skip
    elif _under_a_launcher():
        jax.distributed.initialize(**options)
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that evaluates, writes and speaks."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes are here; they come by in the same order."""
    if jax.process_count() > 1:
        key = f"ehi/{next(_calls)}/{name}"
        distributed.global_state.client.wait_at_barrier(key, _PATIENCE_MS)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 does it first, the others when it is done, and find it done."""
    if not is_first():
        barrier("after the first")
    try:
        yield
    finally:
        # Also after an error, which the others will run into as well.
        if is_first():
            barrier("after the first")


def said_by_first(text: str) -> str:
    """What process 0 passes here; the others' argument is ignored."""
    if jax.process_count() == 1:
        return text
    key, client = f"ehi/{next(_calls)}/said", distributed.global_state.client
    if is_first():
        client.key_value_set(key, "=" + text)  # an empty value is none
        return text
    return client.blocking_key_value_get(key, _PATIENCE_MS)[1:]


def agree(name: str, value: str) -> None:
    """Stop all processes if a value is not the same in each.

    Raises:
      ValueError: in every process, saying what differs and where.
    """
    if jax.process_count() == 1:
        return
    ours = hashlib.sha256(value.encode()).hexdigest()[:12]
    holders: dict[str, list[int]] = {}
    for process, theirs in enumerate(_exchange(name, ours)):
        holders.setdefault(theirs, []).append(process)
    if len(holders) > 1:
        groups = [
            f"{_some(processes)} with {theirs}" for theirs, processes in holders.items()
        ]
        raise ValueError(
            f"the processes differ in {name}: {', '.join(groups)}; start all with the "
            "same command, code and data"
        )


def digest(arrays: Mapping) -> str:
    """sha256 of named arrays."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype} {array.shape};".encode())
        found.update(array.data.cast("B") if array.size else b"")
    return found.hexdigest()


def code_version(*folders: Path) -> str:
    """sha256 of the Python sources of packages, which tells edited ones apart too."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.py")):
            source = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{path.relative_to(folder)} {source};".encode())
    return found.hexdigest()


def is_loss(error: BaseException) -> bool:
    """Whether an error is what the loss of another process looks like."""
    return (
        jax.process_count() > 1
        and isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
        and any(sign in str(error) for sign in _SIGNS_OF_LOSS)
    )


def explain_loss(error: BaseException) -> str:
    """One sentence about a lost process."""
    first_line = str(error).strip().split("\n", 1)[0]
    return (
        f"process {jax.process_index()} stops: another process is lost ({first_line}); "
        "see its own output, then start all again: they go on from the last checkpoint "
        f"(exit code {LOST})"
    )


def leave(code: int) -> None:
    """End after an error. One of several does not wait for those that wait for it."""
    if jax.process_count() == 1:
        raise SystemExit(code) from None
    # Where all fail alike, process 0, which holds the key-value store, goes last.
    with contextlib.suppress(Exception):
        distributed.global_state.client.wait_at_barrier("ehi/leave", _GOODBYE_MS)
        if is_first():  # jax aborts a process that sees it go
            time.sleep(_LAST_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_place(coordinator: str, num_processes: int, process_id: int) -> None:
    if not coordinator.rpartition(":")[0] or not coordinator.split(":")[-1].isdigit():
        raise ValueError(
            f"--coordinator={coordinator!r} is no address; give host:port of process 0"
        )
    if num_processes < 1:
        raise ValueError(f"--num_processes={num_processes}; must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} of --num_processes={num_processes}; allowed: "
            f"0 to {num_processes - 1}"
        )


def _under_a_launcher() -> bool:
    """Whether jax finds a launcher that started more than one process."""
    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.opt_in_only_method:
            continue
        # jax takes any container of a Kubernetes cluster for one of an indexed job.
        indexed = "JOB_COMPLETION_INDEX" in os.environ
        if cluster.__name__ == "K8sCluster" and not indexed:
            continue
        if cluster.is_env_present():
            return cluster.get_process_count() > 1
    return False


def _exchange(name: str, text: str) -> list[str]:
    """What every process says, in their order."""
    client, folder = distributed.global_state.client, f"ehi/{next(_calls)}/{name}/"
    client.key_value_set(f"{folder}{jax.process_index()}", text)
    barrier(name)
    said = dict(client.key_value_dir_get(folder))
    barrier(name)  # nobody leaves before all have read
    return [said[f"{folder}{process}"] for process in range(jax.process_count())]


def _some(processes: list[int]) -> str:
    """'process 3', or 'processes 0, 1, 2, ... (62)'."""
    shown = ", ".join(map(str, processes[:4]))
    if len(processes) == 1:
        return f"process {shown}"
    more = f", ... ({len(processes)})" if len(processes) > 4 else ""
    return f"processes {shown}{more}"


# MERGED ehi_train_shares: Rows shared over the processes: of P each does every P-th,
# and all get all.

# Rows that a process shows the others at once, on their devices.
GATHERED = 2**17


def process_slice() -> slice:
    """The rows that this process does: every P-th, and all where it is alone."""
    return slice(jax.process_index(), None, jax.process_count())


def gather_rows(rows: np.ndarray, num: int) -> np.ndarray:
    """What each process made of its own share, put together: the same bits in all.

    Several processes call this together.

    Args:
      rows: of this process's share (about num / P, D), maybe none.
      num: rows of all processes together.

    Returns:
      all rows (num, D).
    """
    processes = jax.process_count()
    if processes == 1 or not num:
        return rows
    share = -(-num // processes)
    rows = np.pad(rows, ((0, share - len(rows)), (0, 0)))
    barrier("rows")  # one that is late is waited for here, not inside a collective
    parts = [
        # (P, n, D): row i of process p is row i P + p of all.
        multihost_utils.process_allgather(rows[i : i + GATHERED]).swapaxes(0, 1)
        for i in range(0, share, GATHERED)
    ]
    return np.concatenate(parts).reshape(-1, rows.shape[1])[:num]
