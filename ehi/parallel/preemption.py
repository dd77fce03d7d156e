"""Preemption: at SIGTERM the step is finished, a checkpoint saved, and the run ends.

A scheduler that wants its machine back sends SIGTERM and, some seconds later, SIGKILL.
The exit code says that the same command goes on from there.
"""

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Iterator

import jax
import numpy as np

# EX_TEMPFAIL of sysexits.h: try again.
EXIT_CODE = 75
# Steps between a process saying that it must stop and all of them stopping: the flag is
# read when its step is long done, so that no step waits for it.
LAG = 2

_asked, _finishing = threading.Event(), threading.Event()


class Preempted(SystemExit):
    """The run was asked to end, and did so; with the exit code that says so."""

    def __init__(self, message: str):
        super().__init__(EXIT_CODE)
        self.message = f"{message}; the same command goes on (exit code {EXIT_CODE})"


def listen() -> None:
    """Take SIGTERM as a request to end; after `processes.initialize`, if at all."""
    # jax installs a handler of its own, which leaves it to the program to ask for it.
    signal.signal(signal.SIGTERM, _on_sigterm)


@contextlib.contextmanager
def finishing_steps() -> Iterator[None]:
    """Steps that end before the run does; elsewhere it ends at once.

    Elsewhere everything is written to another file and renamed, so nothing is lost.
    """
    _finishing.set()
    try:
        yield
    finally:
        _finishing.clear()
    _end_if_asked()


class Stop:
    """Whether to stop after a step: the same answer in all processes.

    Each puts its own flag into the batch, the step takes the maximum, and all read it
    two steps later; the step that a process is at may differ, what it reads may not.
    """

    def __init__(self):
        self._flags: deque = deque()

    def flag(self) -> np.ndarray:
        """What this process puts into the batch (local devices,)."""
        return np.full(jax.local_device_count(), _asked.is_set(), np.int32)

    def after(self, metrics: dict) -> bool:
        """Take the answer out of the metrics of a step, and give one."""
        if "stop" not in metrics:
            return _asked.is_set()
        self._flags.append(metrics.pop("stop"))
        return len(self._flags) > LAG and bool(np.asarray(self._flags.popleft()))


def _on_sigterm(number, frame) -> None:
    _asked.set()
    if not _finishing.is_set():
        _end_if_asked()


def _end_if_asked() -> None:
    # One of several processes goes on to the next step of training, where all stop; if
    # it left alone, the others would end with an error.
    if _asked.is_set() and jax.process_count() == 1:
        raise Preempted("stopped by SIGTERM: what was complete is kept")
