"""A table definition and the records of one dataset -> the filled table.

First the records: which cells were run, the best row of every column, and the tests of
rows against their best rivals. Then the layouts: rows by budgets, details, ablations,
cost.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ehi.eval.records import Record
from ehi.eval.significance import Comparison, compare_values
from ehi.eval.tables import Number, Table, Value, mean_of, tested, without_empty
from experiments.paper.definitions import PaperTable, Row, budgets_of, cells, rows_of
from experiments.paper.equal_work import EqualWork
from experiments.paper.results import Results

SEEDS = 3
ALPHA = 0.05
NOT_RUN = "not run"


def best_rows(
    table: PaperTable, results: Results, chosen: Callable[[Row], bool]
) -> dict[str, Row]:
    """Return column -> the row with the highest mean nDCG@10 at equal work.

    Args:
      table: the definition.
      results: the records.
      chosen: whether a row competes.
    """
    equal, best = EqualWork(results), {}
    for column in dict.fromkeys(
        column for row in table.rows for column in budgets_of(table, row)
    ):
        places = {row: _place(table, row, column) for row in table.rows if chosen(row)}
        places = {row: place for row, place in places.items() if place in results}
        work = equal.common(list(places.values()))
        means = {
            row: np.mean(_ndcg(results, equal, place, work))
            for row, place in places.items()
        }
        if means:
            best[column] = max(means, key=means.__getitem__)
    return best


def _ndcg(results: Results, equal: EqualWork, place, work: float | None) -> list[float]:
    """nDCG@10 of each seed, at some work or as recorded."""
    if work is not None:
        return equal.ndcg(place, work)
    return [record.ndcg_at_10 for record in results.records[place]]


class Rivals:
    """The rows that those of a table are tested against, column by column."""

    def __init__(self, table: PaperTable, results: Results):
        self._table, self._results = table, results
        self._equal = EqualWork(results)

    def separate(self, row: Row, column: str) -> Row | None:
        """The best separate row for a joint row and for a control."""
        if row.kind not in ("joint", "control"):
            return None
        return self._best(row, column, lambda other: other.kind == "separate")

    def peer(self, row: Row, column: str) -> Row | None:
        """The best joint row of others for one of ours, and the other way round."""
        if row.kind != "joint":
            return None
        return self._best(
            row, column, lambda other: other.kind == "joint" and other.own != row.own
        )

    def _best(self, row: Row, column: str, chosen) -> Row | None:
        """The row that is most ahead of this one, or least behind, at equal work."""
        ours = _place(self._table, row, column)
        if ours not in self._results:
            return None
        leads = {}
        for other in self._table.rows:
            theirs = _place(self._table, other, column)
            if chosen(other) and theirs in self._results:
                work = self._equal.common([ours, theirs])
                lead = _ndcg(self._results, self._equal, theirs, work)
                own = _ndcg(self._results, self._equal, ours, work)
                leads[other] = np.mean(lead) - np.mean(own)
        return max(leads, key=leads.__getitem__) if leads else None


def _place(table: PaperTable, row: Row, column: str):
    """(system, variant, budget) of a row in a column; None if it has no such column."""
    budget = budgets_of(table, row).get(column)
    return budget and (row.system, row.variant, budget)


@dataclass(frozen=True)
class Test:
    """A comparison, and the works of both rows; None if a record lacks its work."""

    comparison: Comparison
    works: tuple[float, float] | None


# ('separate', 'peer' or 'reference', row, column) -> test of the row against that one.
Tests = Mapping[tuple[str, Row, str], Test]


def tests_of(table: PaperTable, results: Results, rivals: Rivals) -> Tests:
    """Test rows against the best separate and joint rows of a column and the reference.

    Rivals are compared at equal work. The p-values of all tests of a table are
    Holm-corrected together.
    """
    pairs, works = {}, {}
    equal = EqualWork(results)
    plain = {}
    for cell, values in results.per_query.items():
        place = (cell.system, cell.variant, cell.budget)
        plain.setdefault(place, {})[cell.seed] = values
    for row in rows_of(table):
        for column, budget in budgets_of(table, row).items():
            ours = (row.system, row.variant, budget)
            found = {
                "separate": rivals.separate(row, column),
                "peer": rivals.peer(row, column),
            }
            for kind, rival in found.items():
                if rival is not None:
                    theirs, key = _place(table, rival, column), (kind, row, column)
                    pairs[key], works[key] = _pair(equal, plain, ours, theirs)
            if table.reference and ours != table.reference:
                values = plain.get(ours, {}), plain.get(table.reference, {})
                pairs["reference", row, column] = (table.reference[0], *values)
    return {
        key: Test(comparison, works.get(key))
        for key, comparison in compare_values(pairs).items()
    }


def _pair(equal: EqualWork, plain, ours, theirs):
    """The values of two places at equal work, and the works; else as recorded."""
    work = equal.common([ours, theirs])
    if work is None:
        return (theirs[0], plain.get(ours, {}), plain.get(theirs, {})), None
    values = [equal.values(place, work) for place in (ours, theirs)]
    works = tuple(max(work, equal.least(place)) for place in (ours, theirs))
    return (theirs[0], *values), works


def missing(table: PaperTable, results: Results) -> str | None:
    """Return a line on the cells that were not run, with the command that runs them."""
    wanted = cells(table)
    seeds = [len(results.records.get(cell, ())) for cell in wanted]
    absent, fewer = seeds.count(0), sum(0 < n < SEEDS for n in seeds)
    if not absent and not fewer:
        return None
    what = [f"{absent} of {len(wanted)} cells not run"] * bool(absent)
    what += [f"{fewer} with fewer than {SEEDS} seeds"] * bool(fewer)
    usual = results.split in ("test", table.split)
    split = "" if usual else f" --split={results.split}"
    return (
        f"{', '.join(what)}; to make them: `python -m experiments.reproduce "
        f"--table={table.name} --dataset={_dataset_argument(results.dataset)} "
        f"--seeds={SEEDS}{split} --workdir=DIR`"
    )


def _dataset_argument(name: str) -> str:
    """Return the --dataset argument for the name of a data set in records."""
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
    rivals = Rivals(table, results)
    tests = tests_of(table, results, rivals)
    if table.layout == "ablations":
        return Filled((_ablations(table, results, tests, title),), table.notes)
    best = best_rows(table, results, lambda row: row.kind == "separate")
    grid = _grid(table, results, best, tests, title)
    details = _details(table, results, rivals, tests, title)
    named = ", ".join(f"{row.label} at {column}" for column, row in best.items())
    notes = (f"Best separate row: {named or 'none was run'}.", *table.notes)
    more = [_unlabelled(table, results, title), _by_work(table, results, title)]
    return Filled((grid, *filter(None, more), details), notes)


def _columns(table: PaperTable) -> tuple[str, ...]:
    """Return the columns of a grid: those that only some rows have come first."""
    budgets = (b for row in table.rows for b in budgets_of(table, row))
    extra = [b for b in dict.fromkeys(budgets) if b not in table.budgets]
    return (*extra, *table.budgets)


def _grid(table, results, best, tests, title) -> Table:
    """Lay out nDCG@10, with R@100 beside it, of rows by budgets."""
    best_joint = best_rows(table, results, lambda row: row.kind == "joint")

    def cell(row: Row, column: str, found: Sequence[Record]) -> Number:
        style = "italic" if best.get(column) == row else ""
        return Number.mean(
            [record.ndcg_at_10 for record in found],
            ".3f",
            style="bold" if best_joint.get(column) == row else style,
            sign=_sign(tests.get(("separate", row, column))),
            beside=mean_of(found, "recall_at_100", ".3f"),
        )

    return _laid_out(table, results, cell, title)


def _laid_out(table, results, cell, title) -> Table:
    """A grid of rows by budgets; `cell` makes a value of a row, a column, its records.

    A row without a column has None, a cell that was not run says so.
    """
    columns = _columns(table)

    def value(row: Row, column: str) -> Value:
        budgets = budgets_of(table, row)
        if column not in budgets:
            return None
        found = results.of(row, budgets[column])
        return cell(row, column, found) if found else NOT_RUN

    rows = tuple((r.label, *(value(r, c) for c in columns)) for r in table.rows)
    return Table(title, ("system", *columns), rows)


def _unlabelled(table, results, title) -> Table | None:
    """Lay out nDCG@10 on queries whose answers train does not know.

    None if these are all queries, or no record knows.
    """

    def cell(row: Row, column: str, found: Sequence[Record]) -> Value:
        number = mean_of(found, "ndcg_at_10_unlabelled", ".3f", deviation=True)
        beside = mean_of(found, "recall_at_100_unlabelled", ".3f")
        return number and dataclasses.replace(number, beside=beside)

    records = [r for cell in cells(table) for r in results.records.get(cell, ())]
    known = [r for r in records if r.ndcg_at_10_unlabelled is not None]
    if all(r.ndcg_at_10_unlabelled == r.ndcg_at_10 for r in known):
        return None
    queries = known[0].unlabelled_queries
    title += f", the {queries} queries whose documents are no answers in train"
    return _laid_out(table, results, cell, title)


def _by_work(table, results, title) -> Table | None:
    """Lay out nDCG@10 by the work of a query, interpolated between the budgets."""
    equal, lines = EqualWork(results), []
    columns = {f"work {percent}%": percent / 100 for percent in table.works}
    for row in table.rows:
        budgets = budgets_of(table, row).values()
        places = [(row.system, row.variant, budget) for budget in budgets]
        places = [place for place in places if place in results]
        known = bool(places) and equal.common(places[:1]) is not None
        line = [row.label]
        for work in columns.values():
            reached = known and equal.least(places[0]) <= work <= equal.most(places[0])
            ndcg = equal.ndcg(places[0], work) if reached else None
            line.append(ndcg and Number.mean(ndcg, ".3f"))
        lines.append(tuple(line))
    if not columns or all(value is None for line in lines for value in line[1:]):
        return None
    return Table(f"{title}, at equal work", ("system", *columns), tuple(lines))


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


def _details(table, results, rivals, tests, title) -> Table:
    """Lay out every cell on a line, with its work, size and tests."""
    header = DETAILS + ("best separate", *TEST) + AGAINST_PEER
    header += ("loss %", "p of loss") * bool(table.reference)
    rows = []
    for row in table.rows:
        for column, budget in budgets_of(table, row).items():
            found = results.of(row, budget)
            line = [row.label, budget, str(len(found))]
            if not found:
                rows.append((*line, NOT_RUN, *[None] * (len(header) - 4)))
                continue
            line += _measured(found)
            against = {
                "separate": rivals.separate(row, column),
                "peer": rivals.peer(row, column),
            }
            for kind, rival in against.items():
                line += _against(rival, tests.get((kind, row, column)))
            if table.reference:
                line.append(_loss(found, results, table.reference))
                line.append(_tested(tests.get(("reference", row, column)))[2])
            rows.append(tuple(line))
    filled = Table(title, header, tuple(rows), text_columns=2)
    return without_empty(filled, (*MEASURED, *AGAINST_PEER))


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
            ndcg, _, visited, *_ = _measured(found)
            test = _tested(tests.get(("reference", row, column)))
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
    "all bytes": ("total_bytes_per_doc", 1, ".5g"),
    "at 1M": ("total_bytes_per_doc_1m", 1, ".5g"),
    "work %": ("work", 100, ".3g"),
}


def _cost(table, results, title) -> Table:
    def cost(found: Sequence[Record], field: str, factor: float, spec: str) -> Value:
        # Sizes differ by a few bytes between seeds, if at all.
        steady = field == "index_bytes" or "bytes_per_doc" in field
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
    header = ("system", "budget", "seeds", *COSTS)
    filled = Table(title, header, tuple(rows), (), 2)
    return without_empty(filled, ("all bytes", "at 1M", "work %"))
