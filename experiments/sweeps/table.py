"""The table of a sweep: a row for each cell, means over the seeds, the best first."""

import json
import statistics
from collections.abc import Iterable, Sequence

from ehi.eval.records import Record, read_records
from ehi.files import atomic_write
from experiments.sweeps.plan import Sweep

METRICS = (
    "ndcg@10", "rr@10", "recall@10", "recall@100", "recall@1000",
    "exact_recall@1", "exact_recall@10", "exact_recall@100",
)  # fmt: skip
OTHERS = ("docs_visited", "train_seconds")


def write_tables(sweep: Sweep) -> str:
    """Write sweep.md and sweep.jsonl of the finished cells; return the Markdown."""
    results = (sweep.workdir / "results").glob("*.jsonl")
    records = [r for path in sorted(results) for r in read_records(path)]
    rows = {name: table_rows(sweep, name, records) for name in sweep.budgets}
    text = "\n".join(_markdown(sweep, name, own) for name, own in rows.items())
    lines = [json.dumps(row) + "\n" for own in rows.values() for row in own]
    atomic_write(sweep.workdir / "sweep.md", text.encode())
    atomic_write(sweep.workdir / "sweep.jsonl", "".join(lines).encode())
    return text


def table_rows(sweep: Sweep, system: str, records: Sequence[Record]) -> list[dict]:
    """Return a row for each cell of a system: means over the seeds, the best first."""
    rows = []
    for cell, changed in sweep.columns(system).items():
        config = sweep.config(system, cell, sweep.seeds[0])
        wanted = (system, config.variant, config.split, sweep.budgets[system])
        own = [
            record
            for record in records
            if (record.system, record.variant, record.split, record.budget) == wanted
            and record.seed in sweep.seeds
        ]
        row = {"system": system, "budget": sweep.budgets[system], "cell": cell}
        row |= {"changed": changed, "seeds": len(own)}
        row["state"] = _state(sweep, system, cell)
        for name in dict.fromkeys((sweep.metric, *METRICS, *OTHERS)):
            values = [getattr(record, name.replace("@", "_at_")) for record in own]
            if values and None not in values:
                row[name] = statistics.fmean(values)
                # As in the other tables: of a sample, and none of a single seed.
                row[f"{name} sd"] = statistics.stdev(values) if values[1:] else None
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get(sweep.metric, float("-inf")))


def _state(sweep: Sweep, system: str, cell: str) -> str:
    """Return what the seeds of a cell lack; '' if all have a record."""
    ends = [sweep.finished(seed, system, cell) for seed in sweep.seeds]
    said = [word for end in ends for word in (["not finished"] if end is None else end)]
    return ", ".join(dict.fromkeys(said))


def _markdown(sweep: Sweep, system: str, rows: Sequence[dict]) -> str:
    """Return the table of a system."""
    measures = dict.fromkeys((sweep.metric, "recall@100"))
    changed = list(rows[0]["changed"]) if rows else []
    split = sweep.base(sweep.seeds[0]).split
    lines = [
        f"{system}, {sweep.budgets[system]}: means on {split}, best {sweep.metric} "
        "first\n",
        _line([*changed, *measures, "visited %", "train s", "seeds", ""]),
        "|---" * (len(changed) + len(measures) + 4) + "|",
    ]
    for row in rows:
        cells = [
            repr(value) if value == "" else value for value in row["changed"].values()
        ]
        for name in measures:
            spread = f" ± {row[f'{name} sd']:.4f}" if row["seeds"] > 1 else ""
            cells.append(f"{row[name]:.4f}{spread}" if name in row else "-")
        visited, seconds = row.get("docs_visited"), row.get("train_seconds")
        cells.append("-" if visited is None else f"{100 * visited:.1f}")
        cells.append("-" if seconds is None else f"{seconds:.0f}")
        lines.append(_line([*cells, row["seeds"], row["state"]]))
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
