"""The results folder: collects the records of finished runs, and reads them.

Each dataset has `<dataset>.jsonl` and `<dataset>.per_query.npz`.
"""

from collections.abc import Iterable
from pathlib import Path

from ehi.eval.records import (
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


def check_same_origin(records: Iterable[Record]) -> None:
    """Refuse to average seeds of a row that differ in config or recipe.

    Raises:
        ValueError: two seeds of a row differ in `config_hash` or `recipe`.
    """
    first_of: dict = {}
    for record in records:
        first = first_of.setdefault(row_of(record.cell), record)
        for name in ("config_hash", "recipe"):
            ours, theirs = getattr(record, name), getattr(first, name)
            if ours != theirs:
                raise ValueError(
                    f"{tuple(record.cell)} has {name} {ours}, but {tuple(first.cell)} "
                    f"has {theirs}: run one of them again, or pass --mix"
                )
