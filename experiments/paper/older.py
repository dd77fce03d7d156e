"""Records of an older recipe: what a new one replaces, and what waits to be made again.

`renew` merges the records of a new recipe into the results folder. Older records of the
same data set are dropped, except those that take longest to make: the ablations of T4,
with the default that they are compared with, and the joint rows of T1. These go to the
folder `older` in it. The tables show them, marked, as long as a row has nothing newer.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from ehi.eval.records import (
    Cell,
    Record,
    Values,
    read_records,
    read_values,
    write_records,
    write_values,
)
from experiments.paper.definitions import TABLES, PaperTable, budgets_of, cells, rows_of
from experiments.paper.results import SCORED, Results

OLDER = "older"
WAITING = ("joint", "control")  # kinds of rows of T1


def renew(results: Path, newer: Iterable[Path]) -> list[Path]:
    """Merge newer results folders into one; its older records wait or are dropped.

    Args:
        results: the results folder.
        newer: results folders with records of recipe `SCORED` or later.

    Returns:
        Paths of the files written.

    Raises:
        FileNotFoundError: a folder has no records.
        ValueError: a record of them is of an older recipe.
    """
    written = []
    for folder in newer:
        paths = sorted(folder.glob("*.jsonl"))
        if not paths:
            raise FileNotFoundError(f"no *.jsonl in {folder}")
        for path in paths:
            found = read_records(path)
            for record in found:
                if record.recipe < SCORED:
                    raise ValueError(
                        f"{path}: {tuple(record.cell)} is of recipe {record.recipe}; "
                        f"expected at least {SCORED}"
                    )
            values = read_values(path.with_suffix(".per_query.npz"))
            written += _renew_one(results / path.name, found, values)
    return list(dict.fromkeys(written))


def _renew_one(path: Path, newer: list[Record], newer_values: Values) -> list[Path]:
    """Renew one data set. What waits is written first: a crash then loses nothing."""
    records = read_records(path) if path.exists() else []
    values = read_values(path.with_suffix(".per_query.npz"))
    waiting = [r for r in records if r.recipe < SCORED and waits(r.cell)]
    written = []
    if waiting:
        written.append(path.parent / OLDER / path.name)
        written[-1].parent.mkdir(exist_ok=True)
        _write(written[-1], waiting, values)
    kept = {r.cell: r for r in records if r.recipe >= SCORED}
    _write(path, (kept | {r.cell: r for r in newer}).values(), values | newer_values)
    return [*written, path]


def _write(path: Path, records: Iterable[Record], values: Values) -> None:
    """Write records, and the values of those that have some, in place of a file."""
    records = list(records)
    known = {r.cell: values[r.cell] for r in records if r.cell in values}
    write_values(path.with_suffix(".per_query.npz"), known, replace=True)
    write_records(path, records, replace=True)


def waits(cell: Cell) -> bool:
    """Whether an older record of a cell is kept: of T4, or of a joint row of T1."""
    place = (cell.system, cell.variant, cell.budget)
    if place in cells(TABLES["T4"]):
        return True
    rows = [row for row in TABLES["T1"].rows if row.kind in WAITING]
    return place in {
        (row.system, row.variant, budget)
        for row in rows
        for budget in budgets_of(TABLES["T1"], row).values()
    }


def with_older(table: PaperTable, results: Results, older: Results | None) -> Results:
    """Return what a table shows: the results, and the older rows that wait.

    Args:
        table: the definition.
        results: of the current recipe.
        older: of the folder `older`, or None.
    """
    if older is None:
        return results
    if table.layout == "ablations":
        # They are compared with a default of their own recipe.
        ablations = [row for row in rows_of(table) if row.variant]
        return results if _any(table, ablations, results) else older
    if table.name != "T1":
        return results
    rows = [row for row in table.rows if row.kind in WAITING]
    waiting = [row for row in rows if not _any(table, [row], results)]
    names = {(row.system, row.variant, budget) for row in waiting
             for budget in budgets_of(table, row).values()}  # fmt: skip
    records = {place: found for place, found in older.records.items() if place in names}
    values = {
        cell: found
        for cell, found in older.per_query.items()
        if (cell.system, cell.variant, cell.budget) in names
    }
    return dataclasses.replace(
        results,
        records={**results.records, **records},
        per_query={**results.per_query, **values},
    )


def _any(table: PaperTable, rows, results: Results) -> bool:
    """Whether any cell of some rows has a record."""
    return any(
        results.of(row, budget)
        for row in rows
        for budget in budgets_of(table, row).values()
    )
