"""Per-query values of many cells, kept for the paired tests of later tables.

A run folder holds one `.npy` a cell (all measures, written by `measure`). What is kept
with the records is nDCG@10 alone, of all cells of one dataset in one `.npz`: an array a
cell, and the query ids of each split once.
"""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ehi.eval.records import Cell, Record, atomic_write

MEASURE = "ndcg@10"
_SEPARATOR = "|"

# A cell's values with the ids of its queries, sorted by them.
Values = dict[Cell, tuple[np.ndarray, np.ndarray]]


def read_run_values(folder: str | Path, records: Iterable[Record]) -> Values:
    """Read the `.npy` of each record that has one in a run folder.

    Args:
        folder: holds `<record.cell.stem>.npy`.
        records: of one run.

    Returns:
        cell -> query ids (N,), nDCG@10 (N,).
    """
    found = {}
    for record in records:
        path = Path(folder) / f"{record.cell.stem}.npy"
        if path.exists():
            try:
                per_query = np.load(path, allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise ValueError(
                    f"{path} is damaged: delete it and results.jsonl beside its folder,"
                    f" and run again ({error})"
                ) from None
            found[record.cell] = (per_query["query_id"], per_query[MEASURE])
    return found


def read_values(path: str | Path) -> Values:
    """Read an `.npz` of `write_values`; empty where there is none."""
    if not Path(path).exists():
        return {}
    found = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            if key.startswith("queries" + _SEPARATOR):
                continue
            system, variant, dataset, split, seed, budget = key.split(_SEPARATOR)
            cell = Cell(system, variant, dataset, split, int(seed), budget)
            found[cell] = (arrays[_queries_key(cell)], arrays[key])
    return found


def write_values(path: str | Path, values: Values) -> None:
    """Add cells to an `.npz`, replacing those it has; rewritten whole and renamed.

    Raises:
        ValueError: two cells of one split have other queries (as in `aligned`).
    """
    merged = read_values(path) | values
    aligned(merged)
    arrays = {}
    for cell, (query_ids, ndcg) in merged.items():
        arrays[_queries_key(cell)] = query_ids
        arrays[_SEPARATOR.join(map(str, cell))] = ndcg.astype(np.float32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    atomic_write(path, buffer.getvalue())


def aligned(values: Mapping[Cell, tuple[np.ndarray, np.ndarray]]) -> dict:
    """Drop the query ids after checking that all cells of a split have the same.

    Returns:
        cell -> (N,) values, as `significance.compare` takes them.

    Raises:
        ValueError: two cells of one dataset and split were scored on other queries.
    """
    first_of: dict[tuple[str, str], Cell] = {}
    for cell, (query_ids, _) in values.items():
        first = first_of.setdefault((cell.dataset, cell.split), cell)
        if not np.array_equal(query_ids, values[first][0]):
            raise ValueError(
                f"{tuple(cell)} was scored on other queries than {tuple(first)}: "
                "another version of the dataset? Re-run one of them"
            )
    return {cell: ndcg for cell, (_, ndcg) in values.items()}


def _queries_key(cell: Cell) -> str:
    return _SEPARATOR.join(("queries", cell.dataset, cell.split))
