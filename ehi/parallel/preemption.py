"""Preemption: at SIGTERM a run finishes its step, saves a checkpoint and ends.

A scheduler that wants its machine back sends SIGTERM and, some seconds later, SIGKILL.
The exit code says that the same command continues from the checkpoint.
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
# A process puts its wish to stop into a batch, and all processes read it so many steps
# later. By then that step is done, so that reading does not wait for the device.
LAG = 2

_asked, _finishing = threading.Event(), threading.Event()


class Preempted(SystemExit):
    """The run was asked to end and did so. Its exit code is `EXIT_CODE`."""

    def __init__(self, message: str):
        super().__init__(EXIT_CODE)
        self.message = f"{message}; the same command goes on (exit code {EXIT_CODE})"


def listen() -> None:
    """Take SIGTERM as a request to end. Call it after `processes.initialize`."""
    # jax installs its own handler when processes join, which would only take a note.
    signal.signal(signal.SIGTERM, _on_sigterm)


@contextlib.contextmanager
def finishing_steps() -> Iterator[None]:
    """In this block a run finishes its step before it ends; elsewhere it ends at once.

    Nothing is lost elsewhere: files are written under another name, then renamed.
    """
    _finishing.set()
    try:
        yield
    finally:
        _finishing.clear()
    _end_if_asked()


class Stop:
    """Whether to stop after a step: the same answer in all processes.

    Each process puts its own flag into the batch, the step takes the maximum, and all
    read it `LAG` steps later. So all stop after the same step, although one may be
    ahead of another when the signal comes.
    """

    def __init__(self):
        self._flags: deque = deque()

    def flag(self) -> np.ndarray:
        """This process's entry of the batch: (local devices,) int32."""
        return np.full(jax.local_device_count(), _asked.is_set(), np.int32)

    def after(self, metrics: dict) -> bool:
        """Whether to stop now; takes the flag out of the metrics of a step."""
        if "stop" not in metrics:
            return _asked.is_set()
        self._flags.append(metrics.pop("stop"))
        return len(self._flags) > LAG and bool(np.asarray(self._flags.popleft()))


def _on_sigterm(number, frame) -> None:
    _asked.set()
    if not _finishing.is_set():
        _end_if_asked()


def _end_if_asked() -> None:
    # One of several processes continues until training, where all stop together. If it
    # left alone, the others would end with an error.
    if _asked.is_set() and jax.process_count() == 1:
        raise Preempted("stopped by SIGTERM: what was complete is kept")
