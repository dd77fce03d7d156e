"""What was tried on dev, and what was kept: the committed trials and their table.

Three commands leave trials in their workdirs: `experiments.sweep` (rates, steps, pool),
the library rows of any run (`trials.jsonl`), and `experiments.run.scores`
(`scores.jsonl`). They are collected in `results/dev`, so that the table can be made
again.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.eval.records import read_records, write_records
from ehi.eval.tables import Table
from ehi.files import atomic_write

DEV = "dev"
KINDS = {"trials.jsonl": "library options", "scores.jsonl": "score"}
SWEPT = "training"  # kind of the trials of a sweep
AS_IT_IS = "as-it-is"
# System -> the trial that became its recipe; the others stay as they are.
KEPT: dict[str, str] = {
    "distill-vq": "heads-triple",
    "jpq": "index-third",
    "poeem": "index-triple",
}
_CELL = ("system", "variant", "dataset", "seed", "budget", "queries")


@dataclass(frozen=True)
class Trial:
    """One setting of one system, and its nDCG@10 on queries that choose.

    Attributes:
      kind: 'training', 'library options' or 'score'.
      queries: the split that it was measured on.
      name: the setting.
      ndcg: nDCG@10; below 0 if the search exceeds the budget.
      kept: whether the records use it.
    """

    kind: str
    system: str
    dataset: str
    queries: str
    seed: int
    budget: str
    name: str
    ndcg: float
    kept: bool


def collect_choices(workdirs: Iterable[Path], folder: Path) -> list[Path]:
    """Add the trials of workdirs to the committed ones; those of a cell are replaced.

    Args:
        workdirs: of sweeps, of `experiments.reproduce`, or of `experiments.run.scores`.
        folder: `results/dev`.

    Returns:
        Paths of the files written.

    Raises:
        FileNotFoundError: a workdir has no trials.
        ValueError: a line is no trial, or a record of a sweep is no valid record.
    """
    written = []
    for workdir in workdirs:
        found = [path for name in KINDS for path in sorted(workdir.rglob(name))]
        swept = sorted((workdir / "results").glob("*.jsonl"))
        if not found and not swept:
            raise FileNotFoundError(
                f"no {' or '.join(KINDS)} in {workdir}, and no results of a sweep"
            )
        for path in found:
            target = folder / path.name
            _replace(target, read_lines(path))
            written.append(target)
        for path in swept:
            records = [r for r in read_records(path) if r.split == DEV]
            target = folder / f"{SWEPT}-{path.name}"
            write_records(target, records)
            written.append(target)
    return list(dict.fromkeys(written))


def read_lines(path: Path) -> list[dict]:
    """Read a file of trials.

    Raises:
        ValueError: a line is no JSON object with the fields of a trial.
    """
    lines = []
    for number, text in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            missing = {*_CELL, "options", "ndcg@10", "kept"} - set(line)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if missing:
            raise ValueError(f"{path}, line {number}: missing {min(missing)!r}")
        lines.append(line)
    return lines


def _replace(path: Path, lines: Sequence[dict]) -> None:
    """Add lines to a file; all lines of a cell are replaced."""
    cells = {tuple(line[name] for name in _CELL) for line in lines}
    kept = read_lines(path) if path.exists() else []
    kept = [line for line in kept if tuple(line[n] for n in _CELL) not in cells]
    text = "".join(json.dumps(line) + "\n" for line in (*kept, *lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.encode())


def read_choices(folder: Path) -> list[Trial]:
    """Read the committed trials; [] if there are none."""
    trials = [
        Trial(SWEPT, r.system, r.dataset, r.split, r.seed, r.budget, r.variant,
              r.ndcg_at_10, r.variant == KEPT.get(r.system, AS_IT_IS))
        for path in sorted(folder.glob(f"{SWEPT}-*.jsonl"))
        for r in read_records(path)
    ]  # fmt: skip
    for name, kind in KINDS.items():
        if not (path := folder / name).exists():
            continue
        trials += [
            Trial(kind, _labelled(line), line["dataset"], line["queries"],
                  line["seed"], line["budget"], line["options"], line["ndcg@10"],
                  line["kept"])
            for line in read_lines(path)
        ]  # fmt: skip
    return trials


def _labelled(line: dict) -> str:
    return ":".join(part for part in (line["system"], line["variant"]) if part)


def choices_table(trials: Sequence[Trial]) -> Table:
    """The table of choices: a line for each system, data set and kind of trial.

    Means are over the budgets and seeds at which every trial was within the budget, so
    that the trials of a line can be compared.
    """
    groups: dict[tuple[str, ...], list[Trial]] = {}
    for t in trials:
        groups.setdefault((t.kind, t.system, t.dataset, t.queries), []).append(t)
    rows = []
    for (kind, system, dataset, queries), group in sorted(groups.items()):
        means, cells = _means(group)
        shown = sorted(means, key=lambda name: -means[name])
        tried = ", ".join(f"{name} {means[name]:.4f}" for name in shown)
        count = str(len({t.name for t in group}))
        where = f"{dataset} {queries}, {_places(cells)}"
        rows.append((system, kind, where, count, tried or "-", _kept(group)))
    header = ("system", "what was tried", "measured on", "trials", "nDCG@10", "kept")
    title = "What was tried on dev, and kept"
    return Table(title, header, tuple(rows), tuple(_notes(trials)), 6)


def _notes(trials: Sequence[Trial]) -> Iterator[str]:
    # Importing the systems loads jax.
    from experiments.systems import SYSTEMS

    yield (
        "Trials of training change one thing of every phase: see "
        "`experiments.sweep --help`. Means of nDCG@10 over the budgets and seeds at "
        "which every trial was within the budget; library options are kept for each "
        "budget and seed apart."
    )
    swept = {trial.system for trial in trials if trial.kind == SWEPT}
    trained = [name for name, system in SYSTEMS.items() if system.phases]
    if lacking := [name for name in trained if name not in swept]:
        yield f"Trained without a trial here: {', '.join(lacking)}."


def _means(group: Sequence[Trial]) -> tuple[dict[str, float], list[tuple[int, str]]]:
    """Name of a trial -> mean nDCG@10 over the (seed, budget)s that all trials have."""
    values: dict[tuple[int, str], dict[str, float]] = {}
    for t in group:
        values.setdefault((t.seed, t.budget), {})[t.name] = t.ndcg
    names = dict.fromkeys(t.name for t in group)
    cells = [
        cell
        for cell, found in values.items()
        if found.keys() == names.keys() and min(found.values()) >= 0
    ]
    if not cells:  # trials that are never all within the budget: each by itself
        own = {n: [f[n] for f in values.values() if f.get(n, -1) >= 0] for n in names}
        return {n: float(np.mean(v)) for n, v in own.items() if v}, list(values)
    return {n: float(np.mean([values[c][n] for c in cells])) for n in names}, cells


def _places(cells: Sequence[tuple[int, str]]) -> str:
    """'visit-10-64x, seed 0', or the numbers of budgets and seeds."""
    seeds, budgets = ({cell[i] for cell in cells} for i in (0, 1))
    budget = min(budgets) if len(budgets) == 1 else f"{len(budgets)} budgets"
    seed = f"seed {min(seeds)}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"{budget}, {seed}"


def _kept(group: Sequence[Trial]) -> str:
    """The trial that was kept, or how often each was, budget by budget."""
    counts: dict[str, int] = {}
    for trial in group:
        if trial.kept and trial.ndcg >= 0:  # else no trial was within the budget
            counts[trial.name] = counts.get(trial.name, 0) + 1
    if len(counts) <= 1:
        return next(iter(counts), "-")
    total = sum(counts.values())
    often = sorted(counts, key=lambda name: -counts[name])
    return ", ".join(f"{name} ({counts[name]} of {total})" for name in often)
