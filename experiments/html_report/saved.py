"""What a run saves for its page: the curves, the questions, and the leaves they visit.

`curves.json`: run -> points (share of documents visited, nDCG@10).
`questions.json`: the scored queries with texts and judgements, and for each cell with a
tree the leaves that each query visits and how many documents it scores there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ehi.eval.records import Record
from ehi.files import atomic_write

CURVES, QUESTIONS = "curves.json", "questions.json"
# More queries make a page of tens of megabytes. They are evenly spaced.
MOST_QUERIES = 2000


def write_curves(workdir: Path, curves: Mapping[str, Sequence]) -> None:
    """Write curves.json; curves of runs that are not given stay."""
    found = read_json(workdir / CURVES) or {}
    found |= {run: [[float(x), float(y)] for x, y in c] for run, c in curves.items()}
    _write(workdir / CURVES, found)


def write_questions(experiment, records: Sequence[Record]) -> None:
    """Write questions.json; leaves of cells that this run has not built stay.

    Args:
      experiment: the finished `Experiment`.
      records: of its workdir.
    """
    inputs, path = experiment.inputs, experiment.workdir / QUESTIONS
    dataset, qrels = inputs.dataset, inputs.dataset.qrels[experiment.config.split]
    rows = inputs.eval_rows[:: -(-len(inputs.eval_rows) // MOST_QUERIES)]
    names = [dataset.query_ids[row] for row in rows]
    old = read_json(path) or {}
    found: dict[str, Any] = {
        "split": experiment.config.split,
        "scored": len(inputs.eval_rows),
        "queries": [
            [name, dataset.query_texts[row], dict(qrels[name])]
            for name, row in zip(names, rows, strict=True)
        ],
        "visits": {},
    }
    if [query[0] for query in old.get("queries", ())] == names:
        found["visits"] = old["visits"]
    for record in records:
        run = run_of(record.system, record.budget)
        built = experiment.built.get(run)
        if built is not None and built.index.num_leaves > 1:
            queries = experiment.trained[run].queries[rows]
            found["visits"][record.cell.stem] = _visits(built.index, queries, record)
    _write(path, found)


def _visits(index, queries: np.ndarray, record: Record) -> dict[str, list]:
    """Leaves that each query visits, best first, and the documents that it scores."""
    setting = {} if record.min_prob is None else {"min_prob": record.min_prob}
    hits = index.search(queries, 1, beam=record.beam, **setting)
    leaves = [row[row >= 0].tolist() for row in hits.leaves]
    return {"leaves": leaves, "documents": hits.visited.tolist()}


def run_of(system: str, budget: str) -> str:
    """Return the run that makes a cell.

    >>> run_of("ehi-pq", "visit-10-64x"), run_of("ehi", "visit-10")
    ('ehi-pq-64x', 'ehi')
    """
    last = budget.rsplit("-", 1)[-1]
    return f"{system}-{last}" if last.endswith("x") else system


def read_json(path: Path) -> Any:
    """Return the value in a file, or None without the file.

    Raises:
      ValueError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it and run experiments.main again"
        ) from None


def _write(path: Path, value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # A surrogate that stands for no byte is written as an escape sequence.
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = json.dumps(value, separators=(",", ":")).encode()
    atomic_write(path, data)
