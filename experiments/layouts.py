"""A table laid out: rows by budgets, its cells in detail, ablations, cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ehi.eval.records import Record
from ehi.eval.significance import Comparison
from ehi.eval.table_formats import Number, Table, Value
from experiments.paper_tables import PaperTable, Row, budgets_of, rows_of
from experiments.table_records import Results, best_rows, tests_of

ALPHA = 0.05
NOT_RUN = "not run"


@dataclass(frozen=True)
class Filled:
    """A table of one dataset: the one to print first, and notes on all of them."""

    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def fill(table: PaperTable, results: Results) -> Filled:
    """Make a table of the records of one dataset.

    Returns:
        A grid and the details of its cells; of T4 and T5 the details alone.
    """
    title = f"{table.name}: {table.title}. {results.dataset}, {results.split} split"
    if table.layout == "cost":
        return Filled((_cost(table, results, title),), table.notes)
    best = best_rows(table, results, "separate")
    tests = tests_of(table, results, best)
    if table.layout == "ablations":
        absent = ("experiments.variants names no ablation.",)
        notes = table.notes + absent * (len(rows_of(table)) == 1)
        return Filled((_ablations(table, results, tests, title),), notes)
    grid = _grid(table, results, best, tests, title)
    details = _details(table, results, best, tests, title)
    named = ", ".join(f"{row.label} at {column}" for column, row in best.items())
    notes = (f"Best separate row: {named or 'none was run'}.", *table.notes)
    return Filled((grid, details), notes)


def _grid(table, results, best, tests, title) -> Table:
    """Rows by budgets, nDCG@10."""
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
    """Every cell with its work, size and tests, one a line."""
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
            tested = row.kind in ("joint", "control") and column in best
            line += [best[column].label if tested else None]
            line += _tested(tests.get(("separate", row, column)))
            if table.reference:
                line.append(_loss(found, results, table.reference))
                line.append(_tested(tests.get(("reference", row, column)))[2])
            rows.append(tuple(line))
    return Table(title, header, tuple(rows), text_columns=2)


def _measured(found: Sequence[Record]) -> list[Value]:
    """nDCG@10, R@100, percent visited and bytes a document."""
    counted = all(record.docs_visited is not None for record in found)
    visited = np.mean([100 * r.docs_visited for r in found]) if counted else None
    return [
        Number.mean([record.ndcg_at_10 for record in found]),
        Number.mean([record.recall_at_100 for record in found]),
        None if visited is None else Number(float(visited), spec=".1f"),
        Number(float(np.mean([r.bytes_per_doc for r in found])), spec=".5g"),
    ]


def _tested(test: Comparison | None) -> tuple[Value, Value, Value]:
    """Difference, sign of each seed, and corrected p-value."""
    if test is None:
        return None, None, None
    signs = "".join("-0+"[sign + 1] for sign in test.signs)
    p_value = Number(test.p_holm, spec=".3f", floor=0.001)
    return Number(test.difference, spec="+.4f"), signs, p_value


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
}


def _cost(table, results, title) -> Table:
    def cost(found: Sequence[Record], field: str, factor: float, spec: str) -> Value:
        values = [getattr(record, field) for record in found]
        if not found or None in values:
            return None
        number = Number.mean([factor * value for value in values], spec)
        # Sizes differ by a few bytes between seeds, if at all.
        steady = field in ("index_bytes", "bytes_per_doc") or not number.deviation
        return Number(number.value, spec=spec) if steady else number

    rows = []
    for row in table.rows:
        found = results.of(row, row.only)
        costs = [cost(found, *how) for how in COSTS.values()]
        if not found:
            costs[0] = NOT_RUN
        rows.append((row.label, row.only, str(len(found)), *costs))
    return Table(title, ("system", "budget", "seeds", *COSTS), tuple(rows), (), 2)
