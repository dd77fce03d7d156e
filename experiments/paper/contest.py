"""Who competes in a table: the best row of every column, and the tests of each row.

Rows are compared at equal work. Two kinds of cells are shown and do not compete: rows
of an older recipe than others of the table, and cells whose codes and codebooks are
together no smaller than the raw vectors.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ehi.eval.significance import Comparison, ValuePair
from experiments.paper.definitions import PaperTable, Row, budgets_of, rows_of
from experiments.paper.equal_work import EqualWork, Place
from experiments.paper.results import SCORED, Results

# ('separate', 'peer' or 'reference', row, column): a test of the row against that one.
Key = tuple[str, Row, str]


@dataclass(frozen=True)
class Test:
    """A comparison, and the works of both rows; None if a record lacks its work."""

    comparison: Comparison
    works: tuple[float, float] | None


class Contest:
    """One table and the records of one dataset."""

    def __init__(self, table: PaperTable, results: Results):
        self.table, self.results = table, results
        self.equal = EqualWork(results)
        self.older = older_rows(table, results)
        raw = results.records.get(("dense", "", "flat"), ())
        self._raw = np.mean([r.bytes_per_doc for r in raw]) if raw else None
        self.best_separate = self._best_rows("separate")
        self.best_joint = self._best_rows("joint")

    def place(self, row: Row, column: str) -> Place | None:
        """(system, variant, budget) of a row in a column; None if it has none there."""
        budget = budgets_of(self.table, row).get(column)
        return budget and (row.system, row.variant, budget)

    def outgrown(self, row: Row, column: str) -> bool:
        """Whether codes and codebooks are together no smaller than raw vectors."""
        place = self.place(row, column)
        if place is None or not place[2].endswith("x") or self._raw is None:
            return False
        totals = [r.total_bytes_per_doc for r in self.results.records.get(place, ())]
        return bool(totals) and None not in totals and np.mean(totals) >= self._raw

    def competes(self, row: Row, column: str) -> bool:
        """Whether a row was run in a column, and is compared there."""
        place = self.place(row, column)
        run = place is not None and place in self.results
        return run and row not in self.older and not self.outgrown(row, column)

    def _best_rows(self, kind: str) -> dict[str, Row]:
        """Column -> the row of a kind with the highest mean nDCG@10 at equal work."""
        best = {}
        for column in columns_of(self.table):
            places = {
                row: self.place(row, column)
                for row in self.table.rows
                if row.kind == kind and self.competes(row, column)
            }
            work = self.equal.common(list(places.values()))
            means = {row: np.mean(self._ndcg(p, work)) for row, p in places.items()}
            if means:
                best[column] = max(means, key=means.__getitem__)
        return best

    def _ndcg(self, place: Place, work: float | None) -> list[float]:
        """nDCG@10 of each seed, at some work or as recorded."""
        if work is not None:
            return self.equal.ndcg(place, work)
        return [record.ndcg_at_10 for record in self.results.records[place]]

    def separate(self, row: Row, column: str) -> Row | None:
        """The best separate row for a joint row and for a control."""
        if row.kind not in ("joint", "control"):
            return None
        return self._rival(row, column, lambda other: other.kind == "separate")

    def peer(self, row: Row, column: str) -> Row | None:
        """The best joint row of others for one of ours, and the other way round."""
        if row.kind != "joint":
            return None
        return self._rival(
            row, column, lambda other: other.kind == "joint" and other.own != row.own
        )

    def _rival(self, row: Row, column: str, chosen) -> Row | None:
        """The row that is most ahead of this one, or least behind, at equal work."""
        if not self.competes(row, column):
            return None
        ours, leads = self.place(row, column), {}
        for other in self.table.rows:
            if chosen(other) and self.competes(other, column):
                theirs = self.place(other, column)
                work = self.equal.common([ours, theirs])
                lead = np.mean(self._ndcg(theirs, work))
                leads[other] = lead - np.mean(self._ndcg(ours, work))
        return max(leads, key=leads.__getitem__) if leads else None

    @functools.cached_property
    def _found(self) -> dict[Key, tuple[ValuePair, tuple[float, float] | None]]:
        """The values of every test, and the works at which they are."""
        found = {}
        plain: dict[Place, dict[int, np.ndarray]] = {}
        for cell, values in self.results.per_query.items():
            place = (cell.system, cell.variant, cell.budget)
            plain.setdefault(place, {})[cell.seed] = values
        reference = self.table.reference
        if reference and reference[:2] in {(r.system, r.variant) for r in self.older}:
            reference = None
        for row in rows_of(self.table):
            for column in budgets_of(self.table, row):
                ours = self.place(row, column)
                rivals = {
                    "separate": self.separate(row, column),
                    "peer": self.peer(row, column),
                }
                for kind, rival in rivals.items():
                    if rival is not None:
                        theirs = self.place(rival, column)
                        found[kind, row, column] = self._pair(plain, ours, theirs)
                if reference and ours != reference and row not in self.older:
                    values = plain.get(ours, {}), plain.get(reference, {})
                    found["reference", row, column] = (reference[0], *values), None
        return found

    def _pair(self, plain, ours: Place, theirs: Place):
        """The values of two places at equal work, and the works; else as recorded."""
        work = self.equal.common([ours, theirs])
        if work is None:
            both = self.equal.work(ours), self.equal.work(theirs)
            pair = theirs[0], plain.get(ours, {}), plain.get(theirs, {})
            return pair, None if None in both else both
        values = [self.equal.values(place, work) for place in (ours, theirs)]
        return (theirs[0], *values), (work, work)

    def pairs(self) -> dict[Key, ValuePair]:
        """The values of every test; all of a table are Holm-corrected together."""
        return {key: pair for key, (pair, _) in self._found.items()}

    def tests(self, comparisons: Mapping[Key, Comparison]) -> dict[Key, Test]:
        """The results of the tests of `pairs`, with the works of both rows."""
        return {key: Test(c, self._found[key][1]) for key, c in comparisons.items()}


def columns_of(table: PaperTable) -> tuple[str, ...]:
    """Return the columns of a grid: those that only some rows have come first."""
    budgets = (b for row in table.rows for b in budgets_of(table, row))
    extra = [b for b in dict.fromkeys(budgets) if b not in table.budgets]
    return (*extra, *table.budgets)


def older_rows(table: PaperTable, results: Results) -> frozenset[Row]:
    """Return the rows with records before recipe `SCORED`, if others are newer."""
    newer = {
        row: {r.recipe >= SCORED for b in budgets_of(table, row).values()
              for r in results.of(row, b)}
        for row in rows_of(table)
    }  # fmt: skip
    if not any(True in found for found in newer.values()):
        return frozenset()
    return frozenset(row for row, found in newer.items() if False in found)
