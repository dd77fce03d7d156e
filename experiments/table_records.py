"""The records of one dataset, as the tables ask for them.

Which there are, which row is the best of its column, and how rows compare with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ehi.eval import significance
from ehi.eval.records import Cell, Record
from ehi.eval.significance import Comparison, compare_pairs
from experiments.paper_tables import PaperTable, Row, budgets_of, cells, rows_of

SEEDS = 3


@dataclass(frozen=True)
class Results:
    """Records of one dataset and split, and their per-query values.

    Attributes:
      records: (system, variant, budget) -> one record a seed.
      per_query: cell -> (N,) values of the same N queries in the same order.
    """

    dataset: str
    split: str
    records: Mapping[tuple[str, str, str], Sequence[Record]]
    per_query: Mapping[Cell, np.ndarray]

    def of(self, row: Row, budget: str) -> Sequence[Record]:
        """The records of a cell; none if it was not run."""
        return self.records.get((row.system, row.variant, budget), ())

    def row(self, system: str, variant: str, budget: str) -> significance.Row:
        """What `significance` calls the cell."""
        return (system, variant, self.dataset, self.split, budget)


def group(
    records: Iterable[Record], per_query: Mapping[Cell, np.ndarray], split: str
) -> list[Results]:
    """The records of a split, dataset by dataset.

    Raises:
        ValueError: there are none.
    """
    by_dataset: dict[str, list[Record]] = {}
    splits = set()
    for record in records:
        splits.add(record.split)
        if record.split == split:
            by_dataset.setdefault(record.dataset, []).append(record)
    if not by_dataset:
        raise ValueError(
            f"no records of split {split!r}; there are records of {sorted(splits)}"
        )
    return [_results(split, found, per_query) for found in by_dataset.values()]


def _results(split: str, records: list[Record], per_query) -> Results:
    by_cell: dict[tuple[str, str, str], list[Record]] = {}
    for r in records:
        by_cell.setdefault((r.system, r.variant, r.budget), []).append(r)
    # Values without a record are those of a run that was cut off.
    values = {r.cell: per_query[r.cell] for r in records if r.cell in per_query}
    return Results(records[0].dataset, split, by_cell, values)


def best_rows(table: PaperTable, results: Results, kind: str) -> dict[str, Row]:
    """Column -> the row of a kind with the highest mean nDCG@10, of those that ran."""
    means: dict[str, dict[Row, float]] = {}
    for row in table.rows:
        for column, budget in budgets_of(table, row).items():
            if row.kind == kind and (found := results.of(row, budget)):
                mean = float(np.mean([record.ndcg_at_10 for record in found]))
                means.setdefault(column, {})[row] = mean
    return {column: max(of, key=of.__getitem__) for column, of in means.items()}


# ('separate' or 'reference', row, column) -> the test of the row against that.
Tests = Mapping[tuple[str, Row, str], Comparison]


def tests_of(table: PaperTable, results: Results, best: Mapping[str, Row]) -> Tests:
    """Test rows against the best separate row of their column, and the reference.

    The p-values of all tests of a table are Holm-corrected together.
    """
    pairs = {}
    for row in rows_of(table):
        for column, budget in budgets_of(table, row).items():
            ours = results.row(row.system, row.variant, budget)
            if row.kind in ("joint", "control") and column in best:
                rival = best[column]
                there = budgets_of(table, rival)[column]
                theirs = results.row(rival.system, rival.variant, there)
                pairs["separate", row, column] = (ours, theirs)
            if table.reference and ours != results.row(*table.reference):
                theirs = results.row(*table.reference)
                pairs["reference", row, column] = (ours, theirs)
    found = compare_pairs(pairs.values(), results.per_query)
    return {key: found[pair] for key, pair in pairs.items() if pair in found}


def missing(table: PaperTable, results: Results) -> str | None:
    """One line on cells that were not run, with the command that makes them."""
    wanted = cells(table)
    seeds = [len(results.records.get(cell, ())) for cell in wanted]
    absent, fewer = seeds.count(0), sum(0 < n < SEEDS for n in seeds)
    if not absent and not fewer:
        return None
    what = [f"{absent} of {len(wanted)} cells not run"] * bool(absent)
    what += [f"{fewer} with fewer than {SEEDS} seeds"] * bool(fewer)
    split = "" if results.split == "test" else f" --split={results.split}"
    return (
        f"{', '.join(what)}; to make them: `python -m experiments.reproduce "
        f"--table={table.name} --dataset={_dataset_argument(results.dataset)} "
        f"--seeds={SEEDS}{split} --workdir=DIR`"
    )


def _dataset_argument(name: str) -> str:
    """How a dataset of records is opened: records have its short name only."""
    if name == "pydocs":
        return name
    # Reading the list of public sets loads tensorflow_datasets.
    from ehi.data.sources import public_sets

    return f"beir/{name}" if name in public_sets() else f"PATH/{name}"
