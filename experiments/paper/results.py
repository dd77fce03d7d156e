"""The results folder: collects the records of finished runs, reads and groups them.

Each dataset has `<dataset>.jsonl` and `<dataset>.per_query.npz`. A folder `older` in it
has the same of an older recipe, for rows that wait to be made again: see
`experiments.paper.older`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.eval.records import (
    Cell,
    Record,
    Values,
    read_records,
    read_run_values,
    read_values,
    write_records,
    write_values,
)
from ehi.eval.significance import row_of

# Folder of a workdir that has the run files and per-query values.
RUN_VALUES = "trec"


def collect(run_folders: Iterable[Path], results: Path) -> list[Path]:
    """Merge runs into the results folder; new records replace old ones of their cell.

    Returns:
        Paths of the files written.

    Raises:
        FileNotFoundError: a folder has no results.jsonl.
        ValueError: a record is not valid, or its run was scored on other queries than
            the existing cells.
    """
    records: dict[str, list[Record]] = {}
    values: dict[str, Values] = {}
    for folder in run_folders:
        found = read_records(folder / "results.jsonl")
        found_values = read_run_values(folder / RUN_VALUES, found)
        for record in found:
            records.setdefault(record.dataset, []).append(record)
            if record.cell in found_values:
                of_dataset = values.setdefault(record.dataset, {})
                of_dataset[record.cell] = found_values[record.cell]
    written = []
    for dataset, found in records.items():
        # Values first. A crash in between then leaves values without a record, which
        # no table reads, instead of a record with the values of an older run.
        if dataset in values:
            written.append(results / f"{dataset}.per_query.npz")
            write_values(written[-1], values[dataset])
        written.append(results / f"{dataset}.jsonl")
        write_records(written[-1], found)
    return written


def read_results(folder: Path, *, mix: bool = False) -> tuple[list[Record], Values]:
    """Read all records of a folder, and the per-query values beside them.

    Args:
        folder: holds `*.jsonl` and perhaps `*.per_query.npz`.
        mix: average records that differ in config or recipe.

    Raises:
        FileNotFoundError: the folder has no records.
        ValueError: two records of a row differ in `config_hash` or `recipe`.
    """
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"no *.jsonl in {folder}")
    records: list[Record] = []
    values: Values = {}
    for path in paths:
        records += read_records(path)
        values |= read_values(path.with_suffix(".per_query.npz"))
    if not mix:
        check_same_origin(records)
    # If two files have the same cell, the later file counts, as for the values.
    return list({record.cell: record for record in records}.values()), values


# From this recipe on, the score of quantised documents is chosen: see `leaves.score`.
SCORED = 4


def check_same_origin(records: Iterable[Record]) -> None:
    """Refuse to average or compare records that were not made alike.

    Raises:
        ValueError: two seeds of a row differ in `config_hash` or `recipe`, or quantised
            rows of one split were scored in two ways.
    """
    first_of: dict = {}
    scored: dict[tuple[str, str], dict[bool, Record]] = {}
    for record in records:
        first = first_of.setdefault(row_of(record.cell), record)
        for name in ("config_hash", "recipe"):
            ours, theirs = getattr(record, name), getattr(first, name)
            if ours != theirs:
                raise ValueError(
                    f"{tuple(record.cell)} has {name} {ours}, but {tuple(first.cell)} "
                    f"has {theirs}: run one of them again, or pass --mix"
                )
        if is_quantised(record):
            kinds = scored.setdefault((record.dataset, record.split), {})
            kinds.setdefault(record.recipe >= SCORED, record)
            if len(kinds) == 2:
                older, newer = kinds[False], kinds[True]
                raise ValueError(
                    f"{tuple(older.cell)} of recipe {older.recipe} scores codes by "
                    f"inner product, {tuple(newer.cell)} of recipe {newer.recipe} as "
                    "was chosen on dev: make the older one again, or pass --mix"
                )


def recipes_of(records: Iterable[Record]) -> str:
    """Return 'recipe 2', or 'recipes 2 and 3'."""
    found = sorted({record.recipe for record in records})
    return f"recipe{'s' * (len(found) > 1)} {' and '.join(map(str, found))}"


def is_quantised(record: Record) -> bool:
    """Whether the record's documents are codes, as its budget says."""
    return record.budget.endswith("x")


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

    def of(self, row, budget: str) -> Sequence[Record]:
        """Return the records of a cell; empty if it was not run."""
        return self.records.get((row.system, row.variant, budget), ())

    def __contains__(self, place: tuple[str, str, str] | None) -> bool:
        """Whether a (system, variant, budget) was run."""
        return bool(self.records.get(place))


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
