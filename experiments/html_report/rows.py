"""Rows of the page: records of several seeds together, with intervals and winners."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ehi.eval.metrics import MEASURES
from ehi.eval.records import MEASURE, Record
from ehi.eval.significance import holm, randomisation_tests
from experiments.html_report.workdirs import Workdir

DRAWS = 2000  # resamplings of the queries for an interval
# Fields of a record that a row shows, as means over its seeds.
COSTS = (
    "docs_visited", "docs_visited_p95", "work", "bytes_per_doc", "total_bytes_per_doc",
    "compression", "latency_ms_p50", "latency_ms_p95", "qps_batch", "train_seconds",
    "build_seconds",
)  # fmt: skip
EXACT = "exact_recall@10"  # of data sets of vectors


@dataclass
class Row:
    """Records of one system and budget; each comes with the workdir that made it.

    Attributes:
      label: system and variant, and the workdir where two were made differently.
      budget: name of the budget.
      records: of the seeds.
      sources: the workdir of each record.
    """

    label: str
    budget: str
    records: list[Record] = field(default_factory=list)
    sources: list[Workdir] = field(default_factory=list, repr=False)

    @property
    def system(self) -> str:
        """The system without variant and workdir."""
        return self.records[0].system

    def values(self) -> np.ndarray | None:
        """(N, measures): mean over the seeds for each query; None without the files."""
        found = [
            source.values.get(record.cell)
            for record, source in zip(self.records, self.sources, strict=True)
        ]
        if any(values is None or len(values) != len(found[0]) for values in found):
            return None
        return np.mean([[v[name] for name in MEASURES] for v in found], axis=0).T


def rows_of(workdirs: Sequence[Workdir]) -> list[Row]:
    """Group the records of workdirs: seeds of one origin share a row.

    A row that two workdirs made by other configs or recipes, or twice for one seed, is
    a row for each of them, and their labels name the workdirs.
    """
    made: dict[tuple[str, str], set] = {}
    for workdir in workdirs:
        for r in workdir.records:
            made.setdefault((_label(r), r.budget), set()).add((r.config_hash, r.recipe))
    seeds = [(_label(r), r.budget, r.seed) for w in workdirs for r in w.records]
    twice = {cell[:2] for cell in seeds if seeds.count(cell) > 1}
    apart = {
        key[0] for key, origins in made.items() if len(origins) > 1 or key in twice
    }
    names = _folder_names(workdirs)
    rows: dict[tuple[str, str], Row] = {}
    for workdir, name in zip(workdirs, names, strict=True):
        for record in workdir.records:
            label = _label(record)
            if label in apart:
                label += f" ({name})"
            row = rows.setdefault((label, record.budget), Row(label, record.budget))
            row.records.append(record)
            row.sources.append(workdir)
    return list(rows.values())


def _label(record: Record) -> str:
    return ":".join(part for part in (record.system, record.variant) if part)


def _folder_names(workdirs: Sequence[Workdir]) -> list[str]:
    """Names of the folders, or whole paths if two have one name."""
    names = [workdir.name for workdir in workdirs]
    return names if len(set(names)) == len(names) else [str(w.path) for w in workdirs]


def described_rows(rows: Iterable[Row], budgets) -> list[dict[str, Any]]:
    """Return the rows as JSON values: measures with intervals, and costs.

    Args:
      rows: from `rows_of`.
      budgets: function of a budget's name -> (percent visited or None, compression).
    """
    found = []
    for row in rows:
        visit, compression = budgets(row.budget)
        measures = {
            name: [_mean(row.records, name), *(interval or (None, None))]
            for name, interval in _intervals(row.values()).items()
        }
        if (exact := _mean(row.records, EXACT)) is not None:
            measures[EXACT] = [exact, None, None]
        found.append(
            {
                "system": row.label,
                "budget": row.budget,
                "visit": visit,
                "codes": compression,
                "seeds": [record.seed for record in row.records],
                "measures": measures,
                "costs": {name: _mean(row.records, name) for name in COSTS},
            }
        )
    return found


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [getattr(record, name.replace("@", "_at_")) for record in records]
    return None if None in values else float(np.mean(values))


def _intervals(values: np.ndarray | None) -> dict[str, tuple[float, float] | None]:
    """Measure -> its interval, or None for each if the values are not there."""
    if values is None:
        return dict.fromkeys(MEASURES)
    low, high = bootstrap(values)
    return {n: (float(low[i]), float(high[i])) for i, n in enumerate(MEASURES)}


def bootstrap(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return the 95% interval of means over queries.

      2.5 and 97.5% quantiles of mean_q v[drawn q], over `DRAWS` draws of N queries

    Args:
      values: (N, columns) value of each query.
      seed: of the draws.

    Returns:
      (2, columns) lower and upper ends.

    Source: Efron, The Annals of Statistics 7, 1979; the percentile interval.
    """
    rng, number = np.random.default_rng(seed), len(values)
    # How often each query is drawn is multinomial.
    means = [
        rng.multinomial(number, np.full(number, 1 / number)) @ values / number
        for _ in range(DRAWS)
    ]
    return np.quantile(means, (0.025, 0.975), axis=0)


def winners(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return, for each budget, the rows from the best nDCG@10 down, and a test.

    The test is a paired randomisation test of the best row against the next one, Holm-
    corrected over the budgets; 'p' is None where the queries are not known.
    """
    by_budget: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_budget.setdefault(row.budget, []).append(number)
    column = list(MEASURES).index(MEASURE)
    found, tested, differences = [], [], []
    for numbers in by_budget.values():
        numbers = sorted(numbers, key=lambda n: -_mean(rows[n].records, MEASURE))
        found.append({"rows": numbers, "p": None})
        pair = [rows[n].values() for n in numbers[:2]]
        same = len(pair) == 2 and all(v is not None for v in pair)
        if same and len(pair[0]) == len(pair[1]):
            tested.append(found[-1])
            differences.append((pair[0] - pair[1])[:, column])
    if tested:
        corrected = holm(randomisation_tests(differences))
        for entry, p_value in zip(tested, corrected, strict=True):
            entry["p"] = float(p_value)
    return found


def chosen_pair(
    rows: Sequence[Row], counterparts: Mapping[str, str], compare: Sequence[str]
) -> list[int]:
    """Return the numbers of the two rows whose queries are compared at first.

    They are those of the systems `compare`, else a joint system and its separate
    counterpart; at the first budget that both have.

    Raises:
      ValueError: a system of `compare` is in no record.
    """
    labels = list(dict.fromkeys(row.label for row in rows))
    for name in compare:
        if name not in labels:
            raise ValueError(
                f"--compare names {name!r}, which is in no record; the systems are "
                f"{', '.join(labels)}"
            )
    number = {(row.label, row.budget): n for n, row in enumerate(rows)}
    joint = [row for row in rows if row.system in counterparts]
    pairs = (
        [tuple(compare)]
        if compare
        else [
            (row.label, row.label.replace(row.system, counterparts[row.system], 1))
            for row in joint
        ]
    )
    for ours, theirs in pairs:
        for row in rows:
            if row.label == ours and (theirs, row.budget) in number:
                return [number[ours, row.budget], number[theirs, row.budget]]
    if compare:
        return [_first(rows, name) for name in compare]
    return [0, min(1, len(rows) - 1)]


def _first(rows: Sequence[Row], label: str) -> int:
    """Return the number of the first row of a label."""
    return next(number for number, row in enumerate(rows) if row.label == label)
