"""A table definition and the records of one dataset -> the filled tables.

`contest` decides what is compared. Here are the layouts: rows by budgets, by work and
by all bytes; every cell on a line; ablations; cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ehi.eval.records import Record
from ehi.eval.significance import Comparison, compare_values
from ehi.eval.tables import (
    Number,
    Table,
    Value,
    columns,
    mean_of,
    tested,
    without_empty,
)
from experiments.paper.contest import Contest, Test, columns_of
from experiments.paper.definitions import PaperTable, Row, budgets_of, rows_of
from experiments.paper.equal_work import Place
from experiments.paper.results import Results, recipes_of

ALPHA = 0.05
NOT_RUN = "not run"
# More bytes a document than the column names, by this factor: second copies or links.
OVER_BYTES = 1.1
TOO_MANY, OUTGROWN = "§", "¶"


@dataclass(frozen=True)
class Filled:
    """The tables of one definition.

    Attributes:
      short: what the README shows, without rows of which nothing was run.
      details: further tables of its own file.
      wide: every cell on a line, with all columns, for CSV.
      notes: lines under the tables.
      names: row -> its name, with the recipe of an older one.
    """

    short: tuple[Table, ...]
    details: tuple[Table, ...]
    wide: Table
    notes: tuple[str, ...]
    names: Mapping[Row, str]


def fill(table: PaperTable, results: Results) -> Filled:
    """Fill a table with the records of one dataset."""
    contest = Contest(table, results)
    return fill_contest(contest, compare_values(contest.pairs()))


def fill_contest(contest: Contest, comparisons: Mapping[tuple, Comparison]) -> Filled:
    """Fill a table, given the comparisons of the pairs that it tests."""
    return _Layout(contest, contest.tests(comparisons)).fill()


class _Layout:
    """The layouts of one table.

    Args:
      contest: the table and its records.
      tests: of `contest`.
    """

    def __init__(self, contest: Contest, tests: Mapping[tuple, Test]):
        self._contest, self._tests = contest, tests
        self._table, self._results = contest.table, contest.results
        self._rows = [row for row in rows_of(self._table) if self._records(row)]
        table, results = self._table, self._results
        self._title = f"{table.name}: {table.title}. {results.dataset}, "
        self._title += f"{results.split} split"
        older = {r: f" ({recipes_of(self._records(r))})" for r in contest.older}
        self._names = {row: row.label + older.get(row, "") for row in self._rows}

    def _records(self, row: Row) -> list[Record]:
        budgets = budgets_of(self._table, row).values()
        return [r for budget in budgets for r in self._results.of(row, budget)]

    def fill(self) -> Filled:
        if self._table.layout == "cost":
            wide = self._cost()
            return self._filled(_split_cost(wide), (), wide)
        if self._table.layout == "ablations":
            wide = self._ablations()
            return self._filled((wide,), (), wide)
        wide = self._details()
        best = self._contest.best_separate.items()
        named = ", ".join(f"{row.label} at {column}" for column, row in best)
        note = f"Best separate row: {named or 'none was run'}."
        short = (
            self._grid(), self._recall(), self._by_work(), self._by_bytes(),
            self._unlabelled(),
        )  # fmt: skip
        shown = tuple(filter(None, short))
        return self._filled(shown, _split_details(wide), wide, note)

    def _filled(self, short, details, wide: Table, *notes: str) -> Filled:
        all_notes = (*notes, *self._table.notes)
        return Filled(tuple(short), details, wide, all_notes, self._names)

    def _laid_out(self, title: str, cell, between=None) -> Table:
        """A grid of rows by budgets.

        Args:
          title: of the table.
          cell: makes a value of a row, a column and its records. A row without a column
            has None, a cell that was not run says so.
          between: column -> values of a row, between its kind and its budgets.
        """
        names = columns_of(self._table)
        between = between or {}

        def value(row: Row, column: str) -> Value:
            budgets = budgets_of(self._table, row)
            if column not in budgets:
                return None
            found = self._results.of(row, budgets[column])
            return cell(row, column, found) if found else NOT_RUN

        rows = tuple(
            (
                self._names[row], row.kind,
                *(make(row) for make in between.values()),
                *(value(row, column) for column in names),
            )
            for row in self._rows
        )  # fmt: skip
        header = ("system", "kind", *between, *names)
        return without_empty(Table(title, header, rows, text_columns=2), between)

    def _grid(self) -> Table:
        """nDCG@10 of rows by budgets, with the bytes that a document takes."""
        contest = self._contest

        def cell(row: Row, column: str, found: Sequence[Record]) -> Number:
            style = "italic" if contest.best_separate.get(column) == row else ""
            sign = _sign(self._tests.get(("separate", row, column)))
            return Number.mean(
                [record.ndcg_at_10 for record in found],
                ".3f",
                style="bold" if contest.best_joint.get(column) == row else style,
                sign=sign
                + _over(found)
                + OUTGROWN * int(contest.outgrown(row, column)),
            )

        between = {
            name: lambda row, field=field: self._bytes(row, field)
            for name, field in self._table.sizes.items()
        }
        return self._laid_out(self._title, cell, between)

    def _bytes(self, row: Row, field: str) -> str | None:
        """Bytes of a document: at one budget, or from the least to the most of all."""
        budgets = list(budgets_of(self._table, row).values())
        if self._table.sized_at in budgets:
            budgets = [self._table.sized_at]
        means = [mean_of(self._results.of(row, b), field) for b in budgets]
        sizes = [f"{mean.value:.0f}" for mean in means if mean]
        found = sorted(set(sizes), key=float)
        return "–".join(found[:: max(1, len(found) - 1)]) if found else None

    def _recall(self) -> Table:
        def cell(_, __, found: Sequence[Record]) -> Value:
            return mean_of(found, "recall_at_100", ".3f")

        return self._laid_out("R@100 of the same rows", cell)

    def _unlabelled(self) -> Table | None:
        """nDCG@10 on queries whose answers train does not know.

        None if these are all queries, or no record knows.
        """

        def cell(_, __, found: Sequence[Record]) -> Value:
            return mean_of(found, "ndcg_at_10_unlabelled", ".3f", deviation=True)

        records = [record for row in self._rows for record in self._records(row)]
        known = [r for r in records if r.ndcg_at_10_unlabelled is not None]
        if all(r.ndcg_at_10_unlabelled == r.ndcg_at_10 for r in known):
            return None
        queries = known[0].unlabelled_queries
        title = f"nDCG@10 of the {queries} queries whose documents are no answers in "
        return self._laid_out(title + "train", cell)

    def _by_work(self) -> Table | None:
        """nDCG@10 by the work of a query, interpolated between the budgets."""
        equal = self._contest.equal

        bytes_of = self._table.sized_at.rpartition("-")[2]

        def ndcg(row: Row, percent: float) -> list[float] | None:
            places = [p for p in self._places(row) if p[2].endswith(bytes_of)]
            if not places or equal.work(places[0]) is None:
                return None
            within = equal.least(places[0]) <= percent / 100 <= equal.most(places[0])
            return equal.ndcg(places[0], percent / 100) if within else None

        names = {f"work {percent:g}%": percent for percent in self._table.works}
        title = "nDCG@10 at equal work, between the budgets"
        title += f" of {bytes_of}" if bytes_of else ""
        return self._ranked(title, names, ndcg)

    def _by_bytes(self) -> Table | None:
        """The best nDCG@10 of a row whose bytes, all counted, are within a limit."""

        def ndcg(row: Row, limit: float) -> list[float] | None:
            best: list[float] = []
            for place in self._places(row):
                found = self._results.records[place]
                total = mean_of(found, "total_bytes_per_doc")
                values = [record.ndcg_at_10 for record in found]
                if total and total.value <= limit:
                    best = max(best, values, key=lambda v: np.mean(v) if v else -1)
            return best or None

        names = {f"at most {limit}": limit for limit in self._table.limits}
        title = "Best nDCG@10 with so many bytes a document, codebooks and all counted"
        return self._ranked(title, names, ndcg)

    def _places(self, row: Row) -> list[Place]:
        places = [(row.system, row.variant, budget)
                  for budget in budgets_of(self._table, row).values()]  # fmt: skip
        return [place for place in places if place in self._results]

    def _ranked(self, title: str, names: Mapping[str, float], ndcg) -> Table | None:
        """A grid of `ndcg` (row, value of a column), with the best rows of each column.

        Rows that are in no column, older ones and exact search are left out.
        """
        rows = [row for row in self._rows if row not in self._contest.older]
        rows = [row for row in rows if row.kind != "exact"]
        found = {row: [ndcg(row, at) for at in names.values()] for row in rows}
        found = {row: values for row, values in found.items() if any(values)}
        if not found or not names:
            return None
        best = set()
        for column in range(len(names)):
            for kind in ("separate", "joint"):
                means = {
                    row: np.mean(values[column])
                    for row, values in found.items()
                    if row.kind == kind and values[column]
                }
                if means:
                    best.add((max(means, key=means.__getitem__), column))

        def cell(row: Row, column: int, values) -> Value:
            style = {"separate": "italic", "joint": "bold"}.get(row.kind, "")
            if not values:
                return None
            chosen = style if (row, column) in best else ""
            return Number.mean(values, ".3f", style=chosen)

        lines = tuple(
            (self._names[row], row.kind,
             *(cell(row, i, v) for i, v in enumerate(values)))
            for row, values in found.items()
        )  # fmt: skip
        return Table(title, ("system", "kind", *names), lines, text_columns=2)

    def _details(self) -> Table:
        """Every cell on a line, with its work, size and tests."""
        contest, reference = self._contest, self._table.reference
        header = (*DETAILS, "best separate", *TEST, *AGAINST_PEER)
        header += LOSS * bool(reference)
        rows = []
        for row in self._rows:
            for column, budget in budgets_of(self._table, row).items():
                found = self._results.of(row, budget)
                line = [self._names[row], budget, str(len(found))]
                if not found:
                    rows.append((*line, NOT_RUN, *[None] * (len(header) - 4)))
                    continue
                line += _measured(found)
                against = {
                    "separate": contest.separate(row, column),
                    "peer": contest.peer(row, column),
                }
                for kind, rival in against.items():
                    line += _against(rival, self._tests.get((kind, row, column)))
                if reference:
                    line.append(_loss(found, self._results, reference))
                    test = self._tests.get(("reference", row, column))
                    line.append(_tested(test)[2])
                rows.append(tuple(line))
        filled = Table(self._title, header, tuple(rows), text_columns=2)
        return without_empty(filled, (*MEASURED, *AGAINST_PEER))

    def _ablations(self) -> Table:
        header = ("variant", "what changes", "seeds", "nDCG@10", "visited %", *TEST)
        rows = []
        for row in self._rows:
            for column, budget in budgets_of(self._table, row).items():
                found = self._results.of(row, budget)
                ndcg, _, visited, *_ = _measured(found)
                test = _tested(self._tests.get(("reference", row, column)))
                line = (self._names[row], row.note, str(len(found)))
                rows.append((*line, ndcg, visited, *test))
        return Table(self._title, header, tuple(rows), text_columns=2)

    def _cost(self) -> Table:
        rows = []
        for row in self._rows:
            found = self._results.of(row, row.only)
            costs = [_cost_of(found, *how) for how in COSTS.values()]
            rows.append((self._names[row], row.only, str(len(found)), *costs))
        header = ("system", "budget", "seeds", *COSTS)
        filled = Table(self._title, header, tuple(rows), (), 2)
        return without_empty(filled, ("all bytes", "at 1M", "work %"))


def _over(found: Sequence[Record]) -> str:
    """The mark of records with more bytes than their budget names."""
    budget = found[0].budget.rpartition("-")[2]
    times = float(budget.removesuffix("x")) if budget.endswith("x") else 1.0
    compression = np.mean([record.compression for record in found])
    return TOO_MANY if times > OVER_BYTES * compression else ""


def _sign(test: Test | None) -> str:
    if test is None or test.comparison.p_holm >= ALPHA:
        return ""
    return "†" if test.comparison.difference > 0 else "‡"


# Column of the details -> field of a record, factor and format.
MEASURED = {
    "R@100": ("recall_at_100", 1, ".4f"),
    "visited %": ("docs_visited", 100, ".1f"),
    "p95 %": ("docs_visited_p95", 100, ".1f"),
    "most %": ("docs_visited_max", 100, ".1f"),
    "work %": ("work", 100, ".1f"),
    "bytes/doc": ("bytes_per_doc", 1, ".5g"),
    "all bytes": ("total_bytes_per_doc", 1, ".5g"),
    "at 1M": ("total_bytes_per_doc_1m", 1, ".5g"),
}
DETAILS = ("system", "budget", "seeds", "nDCG@10", *MEASURED)
TEST = ("difference", "signs", "p")
AGAINST_PEER = ("best joint peer", "to peer", "peer signs", "peer p")
LOSS = ("loss %", "p of loss")


def _split_details(wide: Table) -> tuple[Table, ...]:
    """What was measured, then the tests: each narrow enough to be read."""
    tests = ("system", "budget", "best separate", *TEST, *AGAINST_PEER, *LOSS)
    return columns(wide, DETAILS, "Every cell"), columns(wide, tests, "Tests")


def _split_cost(wide: Table) -> tuple[Table, ...]:
    making = ("train s", "examples/s", "build s", "leaf max", "leaf cv")
    first = columns(wide, ("system", "budget", "seeds", *making), wide.title)
    searching = [name for name in COSTS if name not in making]
    names = ("system", "budget", *searching)
    return first, columns(wide, names, "Search, and size")


def _against(rival: Row | None, test: Test | None) -> tuple[Value, ...]:
    """The rival of a row, with the works of both, and the test of its kind."""
    label = rival and rival.label
    if rival and test and test.works:
        ours, theirs = (f"{100 * work:.1f}%" for work in test.works)
        label += f" at work {ours}" if ours == theirs else f" ({ours} to {theirs})"
    return label, *_tested(test)


def _tested(test: Test | None) -> tuple[Value, Value, Value]:
    return tested(test and test.comparison)


def _measured(found: Sequence[Record]) -> list[Value]:
    """nDCG@10, and the columns of `MEASURED`."""
    return [
        mean_of(found, "ndcg_at_10", deviation=True),
        *(
            mean_of(found, field, spec, factor=factor, deviation=name == "R@100")
            for name, (field, factor, spec) in MEASURED.items()
        ),
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
    "all bytes": ("total_bytes_per_doc", 1, ".5g"),
    "at 1M": ("total_bytes_per_doc_1m", 1, ".5g"),
    "work %": ("work", 100, ".3g"),
}


def _cost_of(found: Sequence[Record], field: str, factor: float, spec: str) -> Value:
    # Sizes differ by a few bytes between seeds, if at all.
    steady = field == "index_bytes" or "bytes_per_doc" in field
    number = mean_of(found, field, spec, factor=factor, deviation=not steady)
    # Values that are equal for all seeds are shown as one number.
    same = number is not None and not number.deviation
    return Number(number.value, spec=spec) if same else number
