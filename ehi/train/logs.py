"""Metrics as JSON lines, one object per logged step; and as TensorBoard events."""

import contextlib
import json
from pathlib import Path

from ehi.files import atomic_write


class MetricLog:
    """Appends to `metrics.jsonl`; a resumed run drops the lines that it writes again.

    Args:
      path: the file.
      tensorboard: a folder for TensorBoard events (extra `tensorboard`), or None.
      writes: False for a process that only reads the file.
    """

    def __init__(
        self, path: Path, tensorboard: Path | None = None, *, writes: bool = True
    ):
        # A later change of the working directory must not move the log.
        self._path, self._writes = Path(path).absolute(), writes
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = None
        if tensorboard is not None and writes:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoard events need the extra: pip install -e '.[tensorboard]'"
                ) from error
            self._writer = SummaryWriter(str(tensorboard))

    def rewind(self, run: str, phase: str, step: int) -> None:
        """Drop the lines of a phase beyond a step; they will be written again."""
        if not self._writes or not self._path.exists():
            return
        kept = [
            line
            for line, row in self._lines()
            if (row["run"], row["phase"]) != (run, phase) or row["step"] <= step
        ]
        atomic_write(self._path, "".join(line + "\n" for line in kept).encode())

    def write(self, run: str, phase: str, step: int, metrics: dict) -> None:
        """Append one line: run, phase, step (steps done so far) and the metrics."""
        if not self._writes:
            return
        row = {"run": run, "phase": phase, "step": step}
        row |= {name: float(f"{value:.6g}") for name, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(f"{run}/{phase}/{name}", value, step)

    def seconds(self, run: str, phase: str) -> float:
        """Training time of a phase, summed over all sessions."""
        return sum(row.get("seconds", 0.0) for row in self._rows(run, phase))

    def examples_per_second(self, run: str, phase: str) -> float | None:
        """Queries per second of a phase; None if it has not run."""
        rows = self._rows(run, phase)
        examples = sum(
            row.get("examples_per_second", 0.0) * row.get("seconds", 0.0)
            for row in rows
        )
        seconds = self.seconds(run, phase)
        return examples / seconds if seconds else None

    def _rows(self, run: str, phase: str) -> list[dict]:
        rows = [row for _, row in self._lines()]
        return [row for row in rows if (row["run"], row["phase"]) == (run, phase)]

    def _lines(self) -> list[tuple[str, dict]]:
        """Lines of metrics and their objects, without torn, empty or foreign lines."""
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8-sig", errors="replace")
        found = []
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if isinstance(row, dict) and _is_metrics(row):
                    found.append((line, row))
        return found


def _is_metrics(row: dict) -> bool:
    named = isinstance(row.get("run"), str) and isinstance(row.get("phase"), str)
    return named and isinstance(row.get("step"), int)
