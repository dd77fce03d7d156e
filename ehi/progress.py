"""Progress of work that takes minutes: a bar on a terminal, lines of the log elsewhere.

A bar is unreadable in a file, and half an hour without a word looks like a hang. So
where stderr is not a terminal, a thread logs a line every 30 seconds:

    shards: 1,232,896 of 8,841,823 documents (14%), 412 documents/s, 5:07:51 left

It does so even while a single call computes for longer than that, such as one that
builds or searches a library's index. The line then has the time so far instead of a
count. Work that takes less than 30 seconds logs nothing. The logger is `ehi`, the level
INFO.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

LOG = logging.getLogger("ehi")

EVERY = 30.0  # seconds between two lines

T = TypeVar("T")


class Progress:
    """A count of what is done, shown while the `with` block runs.

        with Progress("shards", total=64, unit="shards") as progress:
            for number in range(64):
                encode(number)
                progress.update()

    Args:
      what: the work.
      total: how much there is to do, or None if nobody knows.
      unit: what is counted, in the plural. None for one call that counts nothing: a
        terminal shows nothing then, and the log says how long it has been running.
      start: how much was done before.
      bar: False shows nothing on a terminal.
      silent: show nothing anywhere.
      clock: seconds, as of `time.monotonic`.
      wait: (seconds) -> whether the work ended meanwhile; for tests.
    """

    def __init__(
        self, what: str, total: int | None = None, unit: str | None = None, *,
        start: int = 0, bar: bool = True, silent: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ):  # fmt: skip
        self._what, self._total, self._unit = what, total, unit
        self._start, self._done, self._note = start, start, ""
        self._clock, self._began = clock, clock()
        self._ended, self._spoke, self._thread = threading.Event(), False, None
        self._wait = wait or self._ended.wait
        terminal = _is_terminal(sys.stderr)
        self._bar = tqdm(
            total=total, initial=start, desc=what, unit=f" {unit}",
            unit_scale=total is None or total >= 10_000,
            disable=silent or not terminal or not bar or unit is None,
        )  # fmt: skip
        if not silent and not terminal:
            self._thread = threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> "Progress":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._ended.set()
        self._bar.close()
        if self._thread is not None:
            self._thread.join()
        if self._spoke and kind is None:
            LOG.info("%s: done in %s", self._what, _interval(self._seconds()))

    @property
    def done(self) -> int:
        """The amount that is done."""
        return self._done

    def update(self, amount: int = 1) -> None:
        """Count what was done since the last call."""
        self._done += amount
        self._bar.update(amount)

    def note(self, name: str, value: float) -> None:
        """Show a number beside the count, such as the loss."""
        self._note = f", {name} {value:.3f}"
        self._bar.set_postfix({name: f"{value:.3f}"})

    def line(self) -> str:
        """The line that the log gets now."""
        seconds = self._seconds()
        so_far = f"{_interval(seconds)} so far"
        if self._unit is None:
            return f"{self._what}: {so_far}"
        counted = f"{self._done:,} {self._unit}"
        if self._total is not None:
            counted = f"{self._done:,} of {self._total:,} {self._unit}"
            if self._total:
                counted += f" ({self._done / self._total:.0%})"
        speed = (self._done - self._start) / max(seconds, 1e-9)
        if speed:
            counted += f", {_short(speed)} {self._unit}/s"
            if self._total is not None:
                left = max(self._total - self._done, 0) / speed
                so_far = f"{_interval(left)} left"
        return f"{self._what}: {counted}{self._note}, {so_far}"

    def _seconds(self) -> float:
        return self._clock() - self._began

    def _speak(self) -> None:
        while not self._wait(EVERY):
            self._spoke = True
            LOG.info("%s", self.line())


def track(items: Iterable[T], what: str, unit: str, **options: Any) -> Iterator[T]:
    """Yield the items and count each when it is done; `options` of `Progress`."""
    options = {"total": len(items) if hasattr(items, "__len__") else None} | options
    with Progress(what, unit=unit, **options) as progress:
        for item in items:
            yield item
            progress.update()


def log_to_stderr(level: int = logging.INFO) -> None:
    """Write what `ehi` logs to stderr, each line behind its time of day."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    LOG.setLevel(level)
    LOG.addHandler(handler)
    LOG.propagate = False


def _is_terminal(stream) -> bool:
    """Whether somebody can watch a bar. stderr may be None, closed, or replaced."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _short(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def _interval(seconds: float) -> str:
    """'0:30', or '5:07:51'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"
