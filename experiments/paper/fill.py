"""A table definition and the records of one dataset -> the filled table.

First the records: which cells were run, the best row of every column, and the tests of
rows against it. Then the layouts: rows by budgets, details, ablations, cost.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ehi.eval import significance
from ehi.eval.records import Cell, Record
from ehi.eval.significance import Comparison, compare_pairs
from ehi.eval.tables import Number, Table, Value, mean_of, tested
from experiments.paper.definitions import PaperTable, Row, budgets_of, cells, rows_of

SEEDS = 3
ALPHA = 0.05
NOT_RUN = "not run"


@dataclass(frozen=True)
class Results:
    """Records of one dataset and split, and their per-query values.

    Attributes:
      records: (system, variant, budget) -> one record per seed.
      per_query: cell -> (N,) values of the same N queries in the same order.
    """

    dataset: str
    split: str
    records: Mapping[tuple[str, str, str], Sequence[Record]]
    per_query: Mapping[Cell, np.ndarray]

    def of(self, row: Row, budget: str) -> Sequence[Record]:
        """Return the records of a cell; empty if it was not run."""
        return self.records.get((row.system, row.variant, budget), ())

    def row(self, system: str, variant: str, budget: str) -> significance.Row:
        """Return the cell's key in `ehi.eval.significance`."""
        return (system, variant, self.dataset, self.split, budget)


def group(
    records: Iterable[Record], per_query: Mapping[Cell, np.ndarray], split: str
) -> list[Results]:
    """Return the records of a split, dataset by dataset.

    Raises:
        ValueError: the split has no records.
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
    # An interrupted run can leave values without a record.
    values = {r.cell: per_query[r.cell] for r in records if r.cell in per_query}
    return Results(records[0].dataset, split, by_cell, values)


def best_rows(table: PaperTable, results: Results, kind: str) -> dict[str, Row]:
    """Return column -> the row of a kind with the highest mean nDCG@10."""
    means: dict[str, dict[Row, float]] = {}
    for row in table.rows:
        for column, budget in budgets_of(table, row).items():
            if row.kind == kind and (found := results.of(row, budget)):
                mean = float(np.mean([record.ndcg_at_10 for record in found]))
                means.setdefault(column, {})[row] = mean
    return {column: max(of, key=of.__getitem__) for column, of in means.items()}


# ('separate' or 'reference', row, column) -> test of the row against that one.
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
    """Return a line on the cells that were not run, with the command that runs them."""
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
    """Return the --dataset argument for a dataset, of which records have the name."""
    if name == "pydocs":
        return name
    # Reading the list of public sets loads tensorflow_datasets.
    from ehi.data.download import public_sets

    return f"beir/{name}" if name in public_sets() else f"PATH/{name}"


@dataclass(frozen=True)
class Filled:
    """The tables of one definition, the first to print first, and their notes."""

    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def fill(table: PaperTable, results: Results) -> Filled:
    """Fill a table with the records of one dataset.

    Returns:
        The grid and the details of its cells; for T4 and T5 the details alone.
    """
    title = f"{table.name}: {table.title}. {results.dataset}, {results.split} split"
    if table.layout == "cost":
        return Filled((_cost(table, results, title),), table.notes)
    best = best_rows(table, results, "separate")
    tests = tests_of(table, results, best)
    if table.layout == "ablations":
        return Filled((_ablations(table, results, tests, title),), table.notes)
    grid = _grid(table, results, best, tests, title)
    details = _details(table, results, best, tests, title)
    named = ", ".join(f"{row.label} at {column}" for column, row in best.items())
    notes = (f"Best separate row: {named or 'none was run'}.", *table.notes)
    return Filled((grid, details), notes)


def _grid(table, results, best, tests, title) -> Table:
    """Lay out nDCG@10 of rows by budgets."""
    best_joint = best_rows(table, results, "joint")
    budgets = (b for row in table.rows for b in budgets_of(table, row))
    extra = [b for b in dict.fromkeys(budgets) if b not in table.budgets]
    columns = (*extra, *table.budgets)

    def cell(row: Row, column: str) -> Value:
        places = budgets_of(table, row)
        if column not in places:
            return None
        found = results.of(row, places[column])
        if not found:
            return NOT_RUN
        style = "italic" if best.get(column) == row else ""
        test = tests.get(("separate", row, column))
        return Number.mean(
            [record.ndcg_at_10 for record in found],
            ".3f",
            style="bold" if best_joint.get(column) == row else style,
            sign=_sign(test),
        )

    rows = tuple((r.label, *(cell(r, c) for c in columns)) for r in table.rows)
    return Table(title, ("system", *columns), rows)


def _sign(test: Comparison | None) -> str:
    if test is None or test.p_holm >= ALPHA:
        return ""
    return "†" if test.difference > 0 else "‡"


DETAILS = ("system", "budget", "seeds", "nDCG@10", "R@100", "visited %", "bytes/doc")
TEST = ("difference", "signs", "p")


def _details(table, results, best, tests, title) -> Table:
    """Lay out every cell on a line, with its work, size and tests."""
    header = (
        DETAILS
        + ("best separate", *TEST)
        + ("loss %", "p of loss") * bool(table.reference)
    )
    rows = []
    for row in table.rows:
        for column, budget in budgets_of(table, row).items():
            found = results.of(row, budget)
            line = [row.label, budget, str(len(found))]
            if not found:
                rows.append((*line, NOT_RUN, *[None] * (len(header) - 4)))
                continue
            line += _measured(found)
            has_rival = row.kind in ("joint", "control") and column in best
            line += [best[column].label if has_rival else None]
            line += tested(tests.get(("separate", row, column)))
            if table.reference:
                line.append(_loss(found, results, table.reference))
                line.append(tested(tests.get(("reference", row, column)))[2])
            rows.append(tuple(line))
    return Table(title, header, tuple(rows), text_columns=2)


def _measured(found: Sequence[Record]) -> list[Value]:
    """nDCG@10, R@100, percent visited and bytes a document."""
    return [
        mean_of(found, "ndcg_at_10", deviation=True),
        mean_of(found, "recall_at_100", deviation=True),
        mean_of(found, "docs_visited", ".1f", factor=100),
        mean_of(found, "bytes_per_doc", ".5g"),
    ]


def _loss(found: Sequence[Record], results: Results, reference: tuple) -> Value:
    """100 (1 - nDCG@10 / the reference's), over the seeds that both have."""
    theirs = {r.seed: r.ndcg_at_10 for r in results.records.get(reference, ())}
    losses = [
        100 * (1 - record.ndcg_at_10 / theirs[record.seed])
        for record in found
        if theirs.get(record.seed)
    ]
    own = (found[0].system, found[0].variant, found[0].budget) == reference
    return Number.mean(losses, ".1f") if losses and not own else None


def _ablations(table, results, tests, title) -> Table:
    header = ("variant", "what changes", "seeds", "nDCG@10", "visited %", *TEST)
    rows = []
    for row in rows_of(table):
        for column, budget in budgets_of(table, row).items():
            found = results.of(row, budget)
            line = (row.label, row.note, str(len(found)))
            if not found:
                rows.append((*line, NOT_RUN, *[None] * 4))
                continue
            ndcg, _, visited, _ = _measured(found)
            test = tested(tests.get(("reference", row, column)))
            rows.append((*line, ndcg, visited, *test))
    return Table(title, header, tuple(rows), text_columns=2)


# Column of T5 -> field of a record, factor and format.
COSTS = {
    "train s": ("train_seconds", 1, ".3g"),
    "examples/s": ("examples_per_second", 1, ".4g"),
    "build s": ("build_seconds", 1, ".3g"),
    "leaf max": ("leaf_load_max", 1, ".4g"),
    "leaf cv": ("leaf_load_cv", 1, ".2f"),
    "p50 ms": ("latency_ms_p50", 1, ".3g"),
    "queries/s": ("qps_batch", 1, ",.0f"),
    "index MB": ("index_bytes", 1e-6, ".3g"),
    "bytes/doc": ("bytes_per_doc", 1, ".5g"),
}


def _cost(table, results, title) -> Table:
    def cost(found: Sequence[Record], field: str, factor: float, spec: str) -> Value:
        # Sizes differ by a few bytes between seeds, if at all.
        steady = field in ("index_bytes", "bytes_per_doc")
        number = mean_of(found, field, spec, factor=factor, deviation=not steady)
        # Values that are equal for all seeds are shown as one number.
        same = number is not None and not number.deviation
        return Number(number.value, spec=spec) if same else number

    rows = []
    for row in table.rows:
        found = results.of(row, row.only)
        costs = [cost(found, *how) for how in COSTS.values()]
        if not found:
            costs[0] = NOT_RUN
        rows.append((row.label, row.only, str(len(found)), *costs))
    return Table(title, ("system", "budget", "seeds", *COSTS), tuple(rows), (), 2)
