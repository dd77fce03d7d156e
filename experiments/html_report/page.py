"""Workdirs -> the page: one HTML file with its data, its code and plotly inside."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ehi.eval.metrics import MEASURES
from ehi.eval.records import MEASURE
from ehi.files import atomic_write
from experiments.html_report.rows import (
    EXACT,
    Row,
    chosen_pair,
    described_rows,
    rows_of,
    winners,
)
from experiments.html_report.saved import run_of
from experiments.html_report.trees import (
    Documents,
    described_tree,
    rows_by_id,
    shown_by,
)
from experiments.html_report.workdirs import Workdir, read_workdirs, top_hits

REPORT = "report.html"
HERE = Path(__file__).parent
INSTALL = "python -m pip install -e '.[report]'"
SCRIPTS = ("common.js", "results.js", "queries.js", "tree.js")


def write_html(
    path: Path, workdirs: Sequence[Path], *, compare: Sequence[str] = ()
) -> Path:
    """Write the page of one or several finished runs of one data set and split.

    Args:
      path: of the file.
      workdirs: of the runs.
      compare: two systems whose queries are compared when the page opens.

    Raises:
      ImportError: the extra `report` is not installed.
      FileNotFoundError: a workdir has no records.
      ValueError: the records are of several data sets or splits, a system of `compare`
        is in no record, or a file is damaged.
    """
    render = renderer()  # before a minute of reading
    page = render(page_data(read_workdirs(workdirs), compare))
    atomic_write(path, page.encode())
    return path


def renderer():
    """Return a function: data of the page -> its HTML.

    Raises:
      ImportError: the extra `report` is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(f"{REPORT} needs plotly and jinja2: {INSTALL}") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # `tojson` escapes <, >, & and '. ASCII has neither U+2028 nor a lone surrogate.
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": True, "allow_nan": False, "separators": (",", ":"),
    }  # fmt: skip
    template = environment.get_template("page.html.jinja")
    return functools.partial(
        template.render,
        plotly=Markup(get_plotlyjs()),
        style=Markup((HERE / "page.css").read_text()),
        scripts=[Markup((HERE / name).read_text()) for name in SCRIPTS],
    )


def page_data(workdirs: Sequence[Workdir], compare: Sequence[str] = ()) -> dict:
    """Return everything that the page shows, as JSON values."""
    counterparts, kinds = _of_systems()
    rows = rows_of(workdirs)
    records = [record for workdir in workdirs for record in workdir.records]
    labels = {row.label: row.system for row in rows}
    documents = Documents()
    trees, tree_of = _trees(rows, documents)
    queries = _queries(rows, documents)
    if queries:
        for number, details in queries["rows"].items():
            details["tree"] = tree_of.get(number)
    absent = [
        f"{workdir.path}: {sentence}."
        for workdir in workdirs
        for sentence in workdir.absent
    ]
    measures = [*MEASURES, EXACT]
    known = [n for n in measures if any(_knows(record, n) for record in records)]
    return {
        "data": {
            "measures": known,
            "systems": [
                {"name": label, "kind": kinds.get(system, "other")}
                for label, system in labels.items()
            ],
            "rows": described_rows(rows, _budget),
            "winners": winners(rows),
            "pair": chosen_pair(rows, counterparts, compare),
            "curves": _curves(rows),
            "training": _training(workdirs),
            "documents": documents.shown,
            "queries": queries,
            "trees": trees,
        },
        "head": _head(records, workdirs, len(queries["names"]) if queries else 0),
        "absent": absent,
    }


def _knows(record, measure: str) -> bool:
    return getattr(record, measure.replace("@", "_at_")) is not None


def _of_systems() -> tuple[dict[str, str], dict[str, str]]:
    """Return joint system -> its separate counterpart, and system -> its kind."""
    from experiments.systems import SYSTEMS  # it loads jax

    counterparts = {n: s.counterpart for n, s in SYSTEMS.items() if s.counterpart}
    kinds = {
        name: "joint"
        if system.counterpart
        else "separate"
        if system.tree or system.pq or system.library
        else "exact"
        for name, system in SYSTEMS.items()
    }
    return counterparts, kinds


def _budget(name: str) -> tuple[float | None, int | None]:
    from experiments.systems import Budget

    budget = Budget.parse(name)
    return budget.visit, budget.compression


def _head(records, workdirs: Sequence[Workdir], shown: int) -> dict[str, Any]:
    """Return what the top of the page and its last section say."""
    first = records[0]

    def distinct(values: Iterable[Any]) -> list[str]:
        return [str(value) for value in dict.fromkeys(values)]

    versions = (", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in records)
    queries = {len(v) for workdir in workdirs for v in workdir.values.values()}
    return {
        "dataset": first.dataset,
        "split": first.split,
        "seeds": distinct(sorted({record.seed for record in records})),
        "systems": distinct(record.system for record in records),
        "queries": max(queries, default=None),
        "queries_shown": shown,
        "hardware": distinct(record.hardware for record in records),
        "versions": distinct(versions),
        "commits": distinct(record.git_commit for record in records),
        "corpora": distinct(record.corpus_sha256 for record in records),
        "workdirs": [str(workdir.path) for workdir in workdirs],
    }


def _curves(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the curves of the first workdir of each label and run."""
    found: dict[tuple[str, str], dict] = {}
    for row in rows:
        run = run_of(row.system, row.budget)
        points = row.sources[0].curves.get(run)
        if points:
            points = sorted(points)
            entry = {"system": row.label, "run": run, "points": points}
            found.setdefault((row.label, run), entry)
    return list(found.values())


def _training(workdirs: Sequence[Workdir]) -> list[dict[str, Any]]:
    """Return the logged metrics of each phase of each run, as columns."""
    found = []
    for workdir in workdirs:
        phases: dict[tuple[str, str], list[dict]] = {}
        for row in workdir.training:
            phases.setdefault((row["run"], row["phase"]), []).append(row)
        for (run, phase), rows in phases.items():
            rows.sort(key=lambda row: row["step"])
            names = dict.fromkeys(name for row in rows for name in row)
            columns = {
                name: [_number(row.get(name)) for row in rows]
                for name in names
                if name not in ("run", "phase", "step")
            }
            run = run if len(workdirs) == 1 else f"{run} ({workdir.name})"
            steps = [row["step"] for row in rows]
            found.append({"run": run, "phase": phase, "steps": steps, "of": columns})
    return found


def _number(value: Any) -> float | None:
    finite = isinstance(value, int | float) and abs(value) < float("inf")
    return value if finite else None


def _trees(rows: Sequence[Row], documents: Documents) -> tuple[list[dict], dict]:
    """Return the trees of the rows, and row number -> tree number."""
    trees: list[dict] = []
    tree_of: dict[int, int] = {}
    number_of: dict[tuple[Path, str], int | None] = {}
    opened: dict[Path, Mapping] = {}
    for number, row in enumerate(rows):
        workdir, run = row.sources[0], run_of(row.system, row.budget)
        key = (workdir.path, run)
        if key not in number_of:
            if workdir.path not in opened:
                opened[workdir.path] = workdir.indexes()
            index = opened[workdir.path].get(run)
            number_of[key] = None
            if index is not None and index.num_leaves > 1:
                number_of[key] = len(trees)
                name = row.label.replace(row.system, run, 1)
                trees.append(described_tree(name, index, documents))
        if number_of[key] is not None:
            tree_of[number] = number_of[key]
    return trees, tree_of


def _queries(rows: Sequence[Row], documents: Documents) -> dict[str, Any] | None:
    """Return the queries and, for each row that knows them, what it answers.

    A row of several seeds shows the answers of its first one. Without texts, queries
    are those of the per-query values.
    """
    known = {row.sources[0].path: row.sources[0] for row in rows}
    asked = next((w.questions for w in known.values() if w.questions), None)
    names = [query[0] for query in asked["queries"]] if asked else []
    if not names:
        values = next((v for w in known.values() for v in w.values.values()), None)
        names = [] if values is None else values["query_id"].tolist()[:MOST]
    if not names:
        return None
    look_up = _looked_up(known.values())

    def number(doc_id: str) -> int:
        return documents.number(doc_id, lambda: look_up(doc_id))

    found: dict[int, dict] = {}
    for position, row in enumerate(rows):
        answers = _answers(row, names, number)
        if answers:
            found[position] = answers
    asked_of = asked["queries"] if asked else [[name, "", {}] for name in names]
    return {
        "names": names,
        "texts": [text or None for _, text, _ in asked_of],
        "judged": [
            [[number(doc), grade] for doc, grade in judged.items()]
            for _, _, judged in asked_of
        ],
        "rows": found,
    }


MOST = 2000  # queries, where no questions.json has chosen them


def _answers(row: Row, names: Sequence[str], number) -> dict[str, Any] | None:
    """Return value, hits and visited leaves of each query in a row's first seed."""
    record, workdir = row.records[0], row.sources[0]
    values = workdir.values.get(record.cell)
    if values is None:
        return None
    ids = values["query_id"].tolist()
    value_of = dict(zip(ids, values[MEASURE].tolist(), strict=True))
    if not set(names) <= value_of.keys():
        return None
    hits = top_hits(workdir.path / "trec" / f"{record.cell.stem}.run.gz", names)
    asked = workdir.questions or {}
    visits = asked.get("visits", {}).get(record.cell.stem, {})
    if [query[0] for query in asked.get("queries", ())] != list(names):
        visits = {}
    return {
        "seed": record.seed,
        "values": [round(value_of[name], 4) for name in names],
        "hits": [[number(doc) for doc in hits.get(name, ())] for name in names],
        "leaves": visits.get("leaves"),
        "visited": visits.get("documents"),
    }


def _looked_up(workdirs: Iterable[Workdir]):
    """Return a function: document id -> what an index of the workdirs shows of it."""
    for workdir in workdirs:
        for index in workdir.indexes().values():
            rows = rows_by_id(index)
            if rows:
                return lambda doc_id: (
                    shown_by(index, rows[doc_id]) if doc_id in rows else None
                )
    return lambda doc_id: None
