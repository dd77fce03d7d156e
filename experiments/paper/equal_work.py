"""Rows compared at equal work: values of each query, interpolated between budgets.

A budget names documents visited. What a query spends in all differs between rows that
have one budget, and each row meets it only about. So two rows are compared at one
work: the larger of theirs, or the largest that both reach. A row's values there are
interpolated linearly in the logarithm of the work, query by query and seed by seed,
between its records at the nearest budgets of the same bytes. Records are compared as
they are if every document is scored, since the next budget is far below, and if the
least that one row does is more than the other's most.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ehi.eval.records import Record
from experiments.paper.results import Results

# (system, variant, budget) of a cell without its seed.
Place = tuple[str, str, str]


class Point(NamedTuple):
    """Work and nDCG@10 of one record, and the nDCG@10 of each query (N,)."""

    work: float
    ndcg: float
    values: np.ndarray | None


class EqualWork:
    """The records of one dataset, as curves over work."""

    def __init__(self, results: Results):
        self._results = results
        self._curve = functools.cache(self._find_curve)
        places: dict[tuple, list[Place]] = {}
        for place in results.records:
            places.setdefault(_line(place), []).append(place)
        self._places = places

    def common(self, places: Sequence[Place]) -> float | None:
        """The work at which rows are compared; None if they have none in common.

        None also stands for a record without its work, and for budgets without visits.
        """
        if all(budget.startswith("flat") for _, _, budget in places):
            return None
        works = [self.work(place) for place in places]
        if not works or None in works:
            return None
        common = min(max(works), *map(self.most, places))
        least = max(map(self.least, places))
        return None if common < least * (1 - 1e-9) else common

    def work(self, place: Place) -> float | None:
        """The work of a cell: mean over its seeds; None if a record lacks it."""
        return _mean_work(self._results.records.get(place, ()))

    def least(self, place: Place) -> float:
        """The least work that a row does at any budget: mean over its seeds."""
        curves = self._curve(_line(place)).values()
        return float(np.mean([curve[0].work for curve in curves]))

    def most(self, place: Place) -> float:
        """The most work that a row does at any budget: mean over its seeds."""
        curves = self._curve(_line(place)).values()
        return float(np.mean([curve[-1].work for curve in curves]))

    def ndcg(self, place: Place, work: float) -> list[float]:
        """The row's nDCG@10 at a work, of each of its seeds."""
        return [at(curve, work).ndcg for _, curve in self._seeds(place)]

    def values(self, place: Place, work: float) -> dict[int, np.ndarray]:
        """Seed -> the row's values at a work (N,), of the seeds that have values."""
        found = {seed: at(curve, work).values for seed, curve in self._seeds(place)}
        return {seed: values for seed, values in found.items() if values is not None}

    def _seeds(self, place: Place):
        """The curves of the seeds that the cell itself has."""
        curves = self._curve(_line(place))
        seeds = sorted(record.seed for record in self._results.records[place])
        return [(seed, curves[seed]) for seed in seeds if seed in curves]

    def _find_curve(self, line) -> Mapping[int, list[Point]]:
        """Seed -> its records of all budgets of these bytes, by work."""
        curves: dict[int, list[Point]] = {}
        for place in self._places.get(line, ()):
            for record in self._results.records[place]:
                if record.work is not None:
                    values = self._results.per_query.get(record.cell)
                    point = Point(record.work, record.ndcg_at_10, values)
                    curves.setdefault(record.seed, []).append(point)
        return {
            seed: sorted(points, key=lambda point: point.work)
            for seed, points in curves.items()
        }


def at(curve: Sequence[Point], work: float) -> Point:
    """The point of a curve at some work: interpolated, or the end that is nearest.

    Args:
        curve: by increasing work, not empty.
        work: above 0.
    """
    if work <= curve[0].work:
        return curve[0]
    for before, after in zip(curve, curve[1:], strict=False):
        if before.work <= work < after.work:
            span = math.log(after.work / before.work)
            share = math.log(work / before.work) / span
            values = None
            if before.values is not None and after.values is not None:
                values = (1 - share) * before.values + share * after.values
            ndcg = (1 - share) * before.ndcg + share * after.ndcg
            return Point(work, ndcg, values)
    return curve[-1]


def _line(place: Place) -> Place:
    """System, variant and bytes: all budgets of a curve have the same."""
    system, variant, budget = place
    compression = re.search(r"\d+x$", budget)
    return system, variant, compression[0] if compression else ""


def _mean_work(records: Sequence[Record]) -> float | None:
    works = [record.work for record in records]
    return None if not works or None in works else float(np.mean(works))
