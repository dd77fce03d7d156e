"""What the page takes from the workdirs of finished runs."""

import gzip
import json
import urllib.parse
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ehi.eval.metrics import MEASURES
from ehi.eval.records import Cell, Record, read_records
from ehi.index import Index, open_index
from ehi.index.folder import MANIFEST
from experiments.html_report.saved import CURVES, QUESTIONS, read_json

DEPTH = 10  # hits that are shown of a query


@dataclass(frozen=True)
class Workdir:
    """A finished run.

    Attributes:
      path: the folder.
      records: of its results.jsonl.
      values: cell -> (N,) array of `ehi.eval.metrics.evaluate`, where it is there.
      curves: run -> points (share of documents visited, nDCG@10).
      training: the rows of metrics.jsonl.
      questions: of questions.json, or None.
      absent: a sentence for everything that the page has to do without.
    """

    path: Path
    records: list[Record]
    values: dict[Cell, np.ndarray] = field(repr=False)
    curves: dict[str, list]
    training: list[dict[str, Any]] = field(repr=False)
    questions: dict[str, Any] | None = field(repr=False)
    absent: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    def indexes(self) -> dict[str, Index]:
        """Return run -> its index, of the folders that hold one."""
        found = {}
        for path in (*sorted(self.path.glob("indexes/*")), self.path / "index"):
            if (path / MANIFEST).exists():
                index = open_index(path)
                found[(index.encoder or {}).get("run", path.name)] = index
        return found


def read_workdirs(paths: Sequence[Path]) -> list[Workdir]:
    """Read the workdirs of one page.

    Raises:
      FileNotFoundError: a workdir has no records.
      ValueError: a workdir is named twice, the records are of several data sets, splits
        or corpora, or were scored on other queries, or a file is damaged.
    """
    for at, path in enumerate(paths):
        if path.resolve() in [before.resolve() for before in paths[:at]]:
            raise ValueError(f"--workdirs names {path} twice")
    found = [read_workdir(path) for path in paths]
    first_of: dict[tuple[str, str], Path] = {}
    for workdir in found:
        for record in workdir.records:
            first_of.setdefault((record.dataset, record.split), workdir.path)
    if len(first_of) > 1:
        (ours, here), (theirs, there) = list(first_of.items())[:2]
        raise ValueError(
            f"a page compares results of one data set and split: {here} has "
            f"{' '.join(ours)}, {there} has {' '.join(theirs)}"
        )
    for other in found[1:]:
        _check_comparable(found[0], other)
    return found


def _check_comparable(first: Workdir, other: Workdir) -> None:
    """Refuse runs on other documents or queries: their values are no pairs."""
    corpora = [{r.corpus_sha256 for r in w.records} for w in (first, other)]
    if corpora[0].isdisjoint(corpora[1]):
        raise ValueError(
            f"{other.path} has other documents than {first.path}: their corpus_sha256 "
            f"are {min(corpora[1])[:12]} and {min(corpora[0])[:12]}"
        )
    # All cells of a run have the same queries.
    asked = [next(iter(w.values.values()), None) for w in (first, other)]
    if all(values is not None for values in asked) and not np.array_equal(
        *(values["query_id"] for values in asked)
    ):
        raise ValueError(
            f"{other.path} was scored on other queries than {first.path}: run one of "
            "them again"
        )


def read_workdir(path: Path) -> Workdir:
    """Read one workdir.

    Raises:
      FileNotFoundError: it has no records.
      ValueError: a file is damaged.
    """
    results = path / "results.jsonl"
    records = read_records(results) if results.exists() else []
    if not records:
        raise FileNotFoundError(
            f"{path} holds no records: a run of experiments.main writes results.jsonl"
        )
    values = {r.cell: v for r in records if (v := _values(path, r.cell)) is not None}
    curves, questions = read_json(path / CURVES), read_json(path / QUESTIONS)
    training = _json_lines(path / "metrics.jsonl")
    lacking = {
        "intervals and single queries (trec/*.npy)": values,
        f"curves ({CURVES})": curves is not None,
        f"texts, judgements and visited leaves of queries ({QUESTIONS})": questions,
        "losses of training (metrics.jsonl)": training,
    }
    absent = tuple(f"no {what}" for what, there in lacking.items() if not there)
    return Workdir(path, records, values, curves or {}, training, questions, absent)


def _values(path: Path, cell: Cell) -> np.ndarray | None:
    file = path / "trec" / f"{cell.stem}.npy"
    if not file.exists():
        return None
    try:
        found = np.load(file, allow_pickle=False)
        return found[["query_id", *MEASURES]]
    except (ValueError, EOFError, KeyError, IndexError) as error:
        raise ValueError(f"{file} is damaged ({error}): run the cell again") from None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file; torn lines are left out, as a killed run may leave one."""
    found = []
    lines = path.read_bytes().splitlines() if path.exists() else ()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"run", "phase", "step"} <= row.keys():
            found.append(row)
    return found


def top_hits(path: Path, wanted: Collection[str]) -> dict[str, list[str]]:
    """Return query id -> ids of its first documents, from a run file of ours.

    `ehi.eval.metrics.read_run` checks every line, which takes a second for 200,000; of
    the 1,000 documents of a query the page shows ten.

    Args:
      path: a file that `ehi.eval.metrics.write_run` wrote; without it, nothing is
        found.
      wanted: the queries.

    Raises:
      ValueError: the file is damaged.
    """
    found: dict[str, list[str]] = {name: [] for name in wanted}
    if not path.exists():
        return {}
    try:
        with gzip.open(path) as file:
            for query, doc in _first_lines(file):
                if query in found:
                    found[query].append(doc)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return found


def _first_lines(lines: Iterable[bytes]):
    decode = urllib.parse.unquote
    for line in lines:
        fields = line.split(b" ", 4)
        if len(fields[3]) <= 2 and int(fields[3]) <= DEPTH:
            yield decode(fields[0].decode()), decode(fields[2].decode())
