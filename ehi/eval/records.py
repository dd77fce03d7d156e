"""Result records, and the per-query values beside them.

A record is one line of `results.jsonl`: one evaluated cell. Records are the only source
of tables. A file holds each cell once; writing a cell again replaces it.

A run folder holds one `.npy` for each cell, with all measures of each query. Paired
tests need nDCG@10 only, so one `.npz` for each dataset keeps that beside the records:
an array for each cell, and the query ids of each split once.
"""

import dataclasses
import io
import json
import math
import types
import typing
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ehi.files import atomic_write

MEASURE = "ndcg@10"  # the value that is kept for each query
_SEPARATOR = "|"  # between the parts of a cell, in the names of an .npz


class Cell(NamedTuple):
    """The fields that identify a record."""

    system: str
    variant: str
    dataset: str
    split: str
    seed: int
    budget: str

    @property
    def stem(self) -> str:
        """Stem of the file names of this cell, such as 'ehi.pydocs.test.0.flat'."""
        return ".".join(str(part) for part in self if part != "")


# Errors that NumPy raises for a damaged `.npz`.
_UNREADABLE = (
    ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
# Cell -> ids of its queries (N,), sorted, and their values (N,).
Values = dict[Cell, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One evaluated cell. JSON writes `_at_` of a field as `@`: `ndcg@10`.

    A field is None if the system cannot know it, such as the leaf load of a graph.
    """

    # The cell. `variant` is '' by default; `budget` is 'flat', 'visit-10-64x', ...
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
    # Share of the k exact nearest documents among the first k; data sets of vectors.
    exact_recall_at_1: float | None = None
    exact_recall_at_10: float | None = None
    exact_recall_at_100: float | None = None
    # Queries whose relevant documents are no answers in train, and means over them.
    unlabelled_queries: int | None = None
    ndcg_at_10_unlabelled: float | None = None
    recall_at_100_unlabelled: float | None = None
    # Work of a query: documents and tree nodes scored / documents in the corpus; `work`
    # has both, and everything else that a query multiplies: see `ehi.eval.costs`.
    docs_visited: float | None
    docs_visited_p95: float | None = None
    docs_visited_max: float | None = None
    nodes_scored: float | None
    work: float | None = None
    # Size: `compression` is 4 x tower width / bytes_per_doc. The totals also have what
    # codes need to be searched, shared by this corpus or by a million documents.
    bytes_per_doc: float
    total_bytes_per_doc: float | None = None
    total_bytes_per_doc_1m: float | None = None
    compression: float
    index_bytes: int
    # Settings of the search, and its speed (milliseconds; queries a second).
    # `budget_queries` set beam and min_prob to meet the budget: 'train', 'dev', ...
    budget_queries: str | None = None
    beam: int | float | None  # 3.4: 40% of the queries visit 4 leaves, others 3
    min_prob: float | None = None  # least p of a visited leaf, if one is set
    rerank: int
    options: str | None = None  # a library index's: 'metric=l2 residual=False'
    leaf_load_max: int | None
    leaf_load_cv: float | None
    latency_ms_p50: float
    latency_ms_p95: float
    latency_ms_p99: float
    qps_batch: float
    threads: int
    # Cost of making it.
    train_seconds: float
    build_seconds: float
    examples_per_second: float | None = None  # speed of training, if any
    # Origin. `recipe` is raised whenever the numbers of a system change.
    config_hash: str
    recipe: int
    git_commit: str
    versions: dict[str, str]
    hardware: str
    corpus_sha256: str

    def __post_init__(self) -> None:
        for name, allowed in _FIELD_TYPES.items():
            value = getattr(self, name)
            # Python takes a bool for an int; a record does not.
            if not isinstance(value, allowed) or isinstance(value, bool):
                expected = " or ".join(kind.__name__ for kind in allowed)
                raise ValueError(f"{_key(name)}: expected {expected}, found {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{_key(name)}: expected a finite number, not {value}")

    @property
    def cell(self) -> Cell:
        return Cell(*(getattr(self, name) for name in Cell._fields))

    def to_json(self) -> dict[str, Any]:
        """JSON object in field order, floats rounded to 6 significant digits.

        Records of texts have no exact recall, and no field for it.
        """
        fields = (
            (_key(name), getattr(self, name))
            for name in _FIELD_TYPES
            if not (name.startswith("exact_") and getattr(self, name) is None)
        )
        return {
            key: float(f"{value:.6g}") if isinstance(value, float) else value
            for key, value in fields
        }

    @classmethod
    def from_json(cls, data: Any) -> "Record":
        """Check and read one JSON object.

        Raises:
            ValueError: `data` is not an object, a field is unknown or missing (fields
                that older records lack may be missing), or a value has the wrong type.
        """
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, found {data!r:.40}")
        known = {_key(name): name for name in _FIELD_TYPES}
        if unknown := sorted(set(data) - set(known)):
            raise ValueError(f"unknown field {unknown[0]!r}; fields are {list(known)}")
        if missing := sorted(set(known) - set(data) - _ADDED_LATER):
            raise ValueError(f"missing field {missing[0]!r}")
        return cls(**{known[key]: value for key, value in data.items()})


# Records of earlier commits lack these fields.
_ADDED_LATER = {
    "examples_per_second",
    "min_prob",
    "exact_recall@1",
    "exact_recall@10",
    "exact_recall@100",
    "unlabelled_queries",
    "ndcg@10_unlabelled",
    "recall@100_unlabelled",
    "docs_visited_p95",
    "docs_visited_max",
    "work",
    "total_bytes_per_doc",
    "total_bytes_per_doc_1m",
    "budget_queries",
    "options",
}


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


def read_records(path: str | Path) -> list[Record]:
    """Read a file of records.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a valid record, or repeats an earlier line's cell; the
            message names file and line.
    """
    line_of: dict[Cell, int] = {}
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            record = Record.from_json(json.loads(line.decode()))
            if (first := line_of.setdefault(record.cell, number)) != number:
                raise ValueError(f"same cell as line {first}: {tuple(record.cell)}")
        except RecursionError:
            raise ValueError(
                f"{path}, line {number}: the JSON is nested too deeply"
            ) from None
        except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
            raise ValueError(f"{path}, line {number}: {error}") from None
        records.append(record)
    return records


def write_records(
    path: str | Path, records: Iterable[Record], *, replace: bool = False
) -> None:
    """Add records to a file; a record of a cell that is there is replaced.

    The whole file is written anew and renamed: a crash leaves the old or the new file.

    Args:
        path: of the file.
        records: each of a cell of its own.
        replace: drop the records that the file has.
    """
    path = Path(path)
    there = [] if replace or not path.exists() else read_records(path)
    merged = {record.cell: record for record in there}
    merged |= {record.cell: record for record in records}
    lines = [
        json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False) + "\n"
        for record in merged.values()
    ]
    atomic_write(path, "".join(lines).encode())


def read_run_values(folder: str | Path, records: Iterable[Record]) -> Values:
    """Read the `.npy` of each record that has one in a run folder.

    Args:
        folder: may hold `<record.cell.stem>.npy` for each record.
        records: of one run.

    Returns:
        cell -> query ids (N,), nDCG@10 (N,), of the records that have a file.

    Raises:
        ValueError: a file is damaged.
    """
    found = {}
    for record in records:
        path = Path(folder) / f"{record.cell.stem}.npy"
        if path.exists():
            try:
                per_query = np.load(path, allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}): delete it and the results.jsonl "
                    "beside its folder, and run again"
                ) from None
            found[record.cell] = (per_query["query_id"], per_query[MEASURE])
    return found


def read_values(path: str | Path) -> Values:
    """Read an `.npz` of `write_values`; a missing file is an empty one.

    Raises:
        ValueError: the file is damaged, or of another format.
    """
    if not Path(path).exists():
        return {}
    try:
        return _read_values(path)
    except _UNREADABLE as error:
        raise ValueError(f"{path} holds no values of records: {error}") from None


def _read_values(path: str | Path) -> Values:
    found = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            if key.startswith("queries" + _SEPARATOR):
                continue
            system, variant, dataset, split, seed, budget = key.split(_SEPARATOR)
            cell = Cell(system, variant, dataset, split, int(seed), budget)
            found[cell] = (arrays[_queries_key(cell)], arrays[key])
    return found


def write_values(path: str | Path, values: Values, *, replace: bool = False) -> None:
    """Add cells to an `.npz`; a cell that is there is replaced.

    Args:
        path: of the file.
        values: of each cell.
        replace: drop the cells that the file has.

    Raises:
        ValueError: two cells of one split have different queries (see `aligned`).
    """
    merged = values if replace else read_values(path) | values
    aligned(merged)
    arrays = {}
    for cell, (query_ids, ndcg) in merged.items():
        arrays[_queries_key(cell)] = query_ids
        arrays[_SEPARATOR.join(map(str, cell))] = ndcg.astype(np.float32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    atomic_write(path, buffer.getvalue())


def aligned(values: Mapping[Cell, tuple[np.ndarray, np.ndarray]]) -> dict:
    """Check that all cells of a split have the same query ids, and drop the ids.

    Returns:
        cell -> (N,) values, the argument of `significance.compare`.

    Raises:
        ValueError: two cells of one dataset and split have different queries.
    """
    first_of: dict[tuple[str, str], Cell] = {}
    for cell, (query_ids, _) in values.items():
        first = first_of.setdefault((cell.dataset, cell.split), cell)
        if not np.array_equal(query_ids, values[first][0]):
            raise ValueError(
                f"{tuple(cell)} was scored on other queries than {tuple(first)}, "
                "perhaps of another version of the dataset: run one of them again"
            )
    return {cell: ndcg for cell, (_, ndcg) in values.items()}


def _queries_key(cell: Cell) -> str:
    return _SEPARATOR.join(("queries", cell.dataset, cell.split))
