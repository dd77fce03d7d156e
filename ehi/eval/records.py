"""Result records: one line of `results.jsonl` for one evaluated cell.

Records are the only source of tables. A file is rewritten whole and a cell appears in
it once: writing the same cell again replaces it.
"""

import dataclasses
import io
import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Cell(NamedTuple):
    """What identifies a record."""

    system: str
    variant: str
    dataset: str
    split: str
    seed: int
    budget: str

    @property
    def stem(self) -> str:
        """Name, without ending, of the files of this cell: 'ehi.pydocs.test.0.flat'."""
        return ".".join(str(part) for part in self if part != "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One evaluated cell. `_at_` in a field is written `@` in JSON: `ndcg@10`.

    Fields that a system cannot know (documents visited inside a library, leaf load of
    a graph) are None.
    """

    # The cell. `variant` is '' for the default; `budget` is 'flat', 'visit-10-64x', ...
    system: str
    variant: str = ""
    dataset: str
    split: str
    seed: int
    budget: str
    # Effectiveness: means over queries.
    ndcg_at_10: float
    rr_at_10: float
    recall_at_10: float
    recall_at_100: float
    recall_at_1000: float
    # Work: documents, and tree nodes, scored by a query / documents in the corpus.
    docs_visited: float | None
    nodes_scored: float | None
    # Size: `compression` is 4 x tower width / bytes_per_doc.
    bytes_per_doc: float
    compression: float
    index_bytes: int
    # How it was searched, and how fast (milliseconds; queries a second).
    beam: int | None
    min_prob: float | None = None  # of leaves visited; None where the beam alone says
    rerank: int
    leaf_load_max: int | None
    leaf_load_cv: float | None
    latency_ms_p50: float
    latency_ms_p95: float
    latency_ms_p99: float
    qps_batch: float
    threads: int
    # What it cost to make.
    train_seconds: float
    build_seconds: float
    examples_per_second: float | None = None  # of training, where there is any
    # Where it comes from. `recipe` is raised when the numbers of a system change.
    config_hash: str
    recipe: int
    git_commit: str
    versions: dict[str, str]
    hardware: str
    corpus_sha256: str

    def __post_init__(self) -> None:
        for name, allowed in _FIELD_TYPES.items():
            value = getattr(self, name)
            # bool is an int to Python, never to a record.
            if not isinstance(value, allowed) or isinstance(value, bool):
                expected = " or ".join(kind.__name__ for kind in allowed)
                raise ValueError(f"{_key(name)}: expected {expected}, found {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{_key(name)}: expected a finite number, not {value}")

    @property
    def cell(self) -> Cell:
        return Cell(*(getattr(self, name) for name in Cell._fields))

    def to_json(self) -> dict[str, Any]:
        """JSON object in field order, floats rounded to 6 significant digits."""
        fields = ((_key(name), getattr(self, name)) for name in _FIELD_TYPES)
        return {
            key: float(f"{value:.6g}") if isinstance(value, float) else value
            for key, value in fields
        }

    @classmethod
    def from_json(cls, data: Any) -> "Record":
        """Check and read one JSON object.

        Raises:
            ValueError: it is no object, a field is unknown or missing (unless older
              records lack it), or its value has the wrong type.
        """
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, found {data!r:.40}")
        known = {_key(name): name for name in _FIELD_TYPES}
        if unknown := sorted(set(data) - set(known)):
            raise ValueError(f"unknown field {unknown[0]!r}; fields are {list(known)}")
        if missing := sorted(set(known) - set(data) - _ADDED_LATER):
            raise ValueError(f"missing field {missing[0]!r}")
        return cls(**{known[key]: value for key, value in data.items()})


def read_records(path: str | Path) -> list[Record]:
    """Read a file of records.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a valid record, or repeats the cell of an earlier line
          (file and line named).
    """
    line_of: dict[Cell, int] = {}
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            record = Record.from_json(json.loads(line.decode()))
            if (first := line_of.setdefault(record.cell, number)) != number:
                raise ValueError(f"same cell as line {first}: {tuple(record.cell)}")
        except ValueError as error:  # also of UnicodeDecodeError and JSONDecodeError
            raise ValueError(f"{path}, line {number}: {error}") from None
        records.append(record)
    return records


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Add records to a file, replacing those of the same cells in place.

    The file is rewritten whole and renamed, so that a crash leaves the old or the new.
    """
    path = Path(path)
    merged = {r.cell: r for r in read_records(path)} if path.exists() else {}
    merged |= {record.cell: record for record in records}
    lines = [
        json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False) + "\n"
        for record in merged.values()
    ]
    atomic_write(path, "".join(lines).encode())


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a file so that readers, and a crash, see the old content or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; results are as readable as any other file.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def atomic_write_npy(path: str | Path, array: np.ndarray) -> None:
    """`np.save` through `atomic_write`."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    atomic_write(path, buffer.getvalue())


# Fields that records of earlier commits do not have.
_ADDED_LATER = {"examples_per_second", "min_prob"}


def _key(field_name: str) -> str:
    return field_name.replace("_at_", "@")


def _allowed_types(annotation: Any) -> tuple[type, ...]:
    if isinstance(annotation, types.UnionType):
        return sum((_allowed_types(part) for part in typing.get_args(annotation)), ())
    if annotation is float:
        return (float, int)
    return (typing.get_origin(annotation) or annotation,)


_FIELD_TYPES = {
    field.name: _allowed_types(field.type) for field in dataclasses.fields(Record)
}


# MERGED ehi_eval_per_query: Per-query values of many cells, kept for the paired tests
# of later tables.
#
# A run folder holds one `.npy` a cell (all measures, written by `measure`). What is
# kept
# with the records is nDCG@10 alone, of all cells of one dataset in one `.npz`: an
# array a
# cell, and the query ids of each split once.
#

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
