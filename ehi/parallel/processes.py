"""Several processes that train one model: how they start, agree, share rows and end.

All processes run the same program on the same data, and a batch is spread over the
devices of all. If there is only one process, nothing here does anything.
"""

import contextlib
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

# Exit code of a process that lost another one (EX_UNAVAILABLE of sysexits.h).
LOST = 69
# A process that sends no heartbeat for this many seconds counts as lost.
LOST_AFTER = 60
# Rows that `gather_rows` exchanges at once: they bound the memory of a device.
GATHERED = 2**17
# Process 0 may evaluate for hours while the others wait. Its heartbeats tell them that
# it is alive.
_PATIENCE_MS = 7 * 24 * 3600 * 1000
# A failed process waits this long for the others to fail of the same error.
_GOODBYE_MS = 3000
_LAST_SECONDS = 1.0
# The variable without which a launcher started one process only. jax takes every
# container of a Kubernetes cluster for one of an indexed job.
_LAUNCHER_VARIABLES = {
    "SlurmCluster": "SLURM_NTASKS",
    "OmpiCluster": "OMPI_COMM_WORLD_SIZE",
    "K8sCluster": "JOB_COMPLETION_INDEX",
}
# Errors of the transports and of jax's coordination service that contain one of these
# mean that another process is gone.
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
    """Join the other processes, if there are any. Call it before any other use of jax.

    There are others if the three values are given, or if jax finds the environment of a
    launcher (Slurm, Open MPI, an indexed Kubernetes job, a TPU slice) that started more
    than one process.

    Args:
      coordinator: 'host:port' of process 0.
      num_processes, process_id: the number of processes, and the number of this one.
      timeout: seconds that a process waits until all have joined.
      lost_after: seconds after which a silent process counts as lost.

    Returns:
      whether there are other processes.

    Raises:
      ValueError: only one or two of the three values are given, they do not fit each
        other, or the variables of a launcher cannot be read.
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
    elif launcher := _launcher():
        try:
            jax.distributed.initialize(**options)
        except (KeyError, ValueError) as error:
            raise _unreadable(launcher, error) from None
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that evaluates, writes and logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes are here. All must pass barriers in the same order."""
    if jax.process_count() > 1:
        key = f"ehi/{next(_calls)}/{name}"
        _client().wait_at_barrier(key, _PATIENCE_MS)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 runs the block first; the others follow and find the work done."""
    if not is_first():
        barrier("after the first")
    try:
        yield
    finally:
        # Also after an error: the others must not wait, they will meet it too.
        if is_first():
            barrier("after the first")


def said_by_first(text: str) -> str:
    """The text that process 0 passes; what the others pass is ignored."""
    if jax.process_count() == 1:
        return text
    key, client = f"ehi/{next(_calls)}/said", _client()
    if is_first():
        client.key_value_set(key, "=" + text)  # the store takes no empty value
        return text
    return client.blocking_key_value_get(key, _PATIENCE_MS)[1:]


def agree(name: str, value: str) -> None:
    """Stop all processes unless a value is the same in each.

    Raises:
      ValueError: in every process; says what differs, and in which processes.
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


def code_version(*folders: Path) -> str:
    """sha256 of the Python sources of packages; it changes with every edit."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.py")):
            source = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{path.relative_to(folder)} {source};".encode())
    return found.hexdigest()


def process_slice() -> slice:
    """The rows that this one of P processes works on: every P-th row."""
    return slice(jax.process_index(), None, jax.process_count())


def gather_rows(rows: np.ndarray, num: int) -> np.ndarray:
    """The rows of all processes, in order: every process gets the same bits.

    All processes call this together.

    Args:
      rows: what this process made of its `process_slice` (about num / P, D), possibly
        no rows.
      num: number of rows of all processes together.

    Returns:
      all rows (num, D).
    """
    processes = jax.process_count()
    if processes == 1 or not num:
        return rows
    most = -(-num // processes)  # rows of the process that has most
    rows = np.pad(rows, ((0, most - len(rows)), (0, 0)))
    barrier("rows")  # wait for a late process here: collectives have a time limit
    parts = [
        # (P, n, D): row i of process p is row i P + p of all.
        multihost_utils.process_allgather(rows[i : i + GATHERED]).swapaxes(0, 1)
        for i in range(0, most, GATHERED)
    ]
    return np.concatenate(parts).reshape(-1, rows.shape[1])[:num]


def is_loss(error: BaseException) -> bool:
    """Whether an error was caused by the loss of another process."""
    return (
        jax.process_count() > 1
        and isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
        and any(sign in str(error) for sign in _SIGNS_OF_LOSS)
    )


def explain_loss(error: BaseException) -> str:
    """The message about a lost process."""
    first_line = str(error).strip().split("\n", 1)[0]
    return (
        f"process {jax.process_index()} stops: another process is lost ({first_line}); "
        "see its own output, then start all processes again: they continue from the "
        f"last checkpoint (exit code {LOST})"
    )


def leave(code: int) -> None:
    """End this process after an error.

    If there are several, the others may wait for this one in a collective. A normal
    exit would wait for them in turn.
    """
    if jax.process_count() == 1:
        raise SystemExit(code) from None
    # If all fail alike, process 0 goes last: it holds the key-value store, and jax
    # aborts every process that sees it go.
    with contextlib.suppress(Exception):
        _client().wait_at_barrier("ehi/leave", _GOODBYE_MS)
        if is_first():
            time.sleep(_LAST_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _check_place(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and 1 <= int(port) < 2**16
    # An IPv6 address stands in brackets, or its colons would be taken for the port's.
    if not host or not is_port or (":" in host and not host.startswith("[")):
        raise ValueError(
            f"--coordinator={coordinator!r} is no address; give host:port of process "
            "0, with a port of 1 to 65535, and an IPv6 host in brackets"
        )
    if num_processes < 1:
        raise ValueError(f"--num_processes={num_processes}; must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} of --num_processes={num_processes}; allowed: "
            f"0 to {num_processes - 1}"
        )


def _launcher() -> str | None:
    """The launcher that started more than one process, if jax finds one."""
    _, launchers = _private_jax()
    for launcher in launchers:
        needed = _LAUNCHER_VARIABLES.get(launcher.__name__)
        # A variable that is set to nothing counts as not set.
        if launcher.opt_in_only_method or needed and not os.environ.get(needed):
            continue
        if launcher.is_env_present():
            name = launcher.name or launcher.__name__
            try:
                count, _ = launcher.get_process_count(), launcher.get_process_id()
            except (KeyError, ValueError) as error:
                raise _unreadable(name, error) from None
            return name if count > 1 else None
    return None


def _unreadable(launcher: str, error: Exception) -> ValueError:
    return ValueError(
        f"the variables of the launcher {launcher} cannot be read ({error}): mend or "
        "unset them, or give --coordinator, --num_processes and --process_id"
    )


def _client():
    """The client of the key-value store that all processes share."""
    return _private_jax()[0].global_state.client


def _private_jax():
    """The used parts of jax's private API: its coordination service and launchers.

    jax has no public access to the key-value store and the barriers, which wait without
    a collective and therefore without its time limit. Nor can one ask whether
    `jax.distributed.initialize` would find a launcher. orbax uses both names too.
    """
    from jax._src import clusters, distributed

    return distributed, clusters.ClusterEnv._cluster_types


def _exchange(name: str, text: str) -> list[str]:
    """The texts of all processes, in their order."""
    client, folder = _client(), f"ehi/{next(_calls)}/{name}/"
    client.key_value_set(f"{folder}{jax.process_index()}", text)
    barrier(name)
    said = dict(client.key_value_dir_get(folder))
    barrier(name)  # no process leaves before all have read
    return [said[f"{folder}{process}"] for process in range(jax.process_count())]


def _some(processes: list[int]) -> str:
    """'process 3', or 'processes 0, 1, 2, ... (62)'."""
    shown = ", ".join(map(str, processes[:4]))
    if len(processes) == 1:
        return f"process {shown}"
    more = f", ... ({len(processes)})" if len(processes) > 4 else ""
    return f"processes {shown}{more}"
