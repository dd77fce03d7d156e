"""The end of a run: the table, three example queries, the report, what was written."""

from pathlib import Path

import numpy as np
from rich.console import Console

from ehi.eval.answers import describe_hits, format_hits
from ehi.eval.records import aligned, read_records, read_run_values
from ehi.eval.report import print_table, write_report
from ehi.eval.significance import compare
from experiments.run.evaluate import DEFAULT_PERCENT, visited_curve
from experiments.search import default_search
from experiments.systems import SYSTEMS, get_system
from experiments.tables import separate_counterparts

# What a run leaves in its workdir, in the order that one reads it.
WRITTEN = (
    "results.jsonl",
    "report.md",
    "visited.png",
    "bytes.png",
    "trec",
    "index",
    "indexes",
    "checkpoints",
    "metrics.jsonl",
    "config.json",
)


def show(config, workdir: Path, inputs, trained: dict, built: dict) -> None:
    """Print table, examples and paths; write report.md and its figures."""
    console = Console()
    if (workdir / "results.jsonl").exists():
        _report(config, workdir, inputs, trained, built, console)
    else:
        console.print(
            f"{inputs.dataset.name} has no queries in split {config.split!r}: nothing "
            "to score, the indexes are built",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    _examples(inputs, trained, built, console)
    console.print("\nwritten:")
    for name in WRITTEN:
        if (workdir / name).exists():
            path = f"  {workdir / name}"
            console.print(path, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f'\nask it: python -m experiments.search --index={workdir / "index"} "..."',
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _report(config, workdir, inputs, trained, built, console) -> None:
    order = {name: number for number, name in enumerate(SYSTEMS)}
    records = sorted(
        read_records(workdir / "results.jsonl"), key=lambda r: order[r.system]
    )
    values = aligned(read_run_values(workdir / "trec", records))
    comparisons = compare(records, values, separate_counterparts())
    curves = {
        run: visited_curve(config, built[run], trained[run], inputs, config.split)
        for run in built
        if get_system(_system_of(run)).tree
    }
    exact = {r.system: r.ndcg_at_10 for r in records if r.budget == "flat"}
    print_table(records, comparisons, console=console)
    write_report(workdir, records, comparisons, curves=curves, exact=exact)


def _system_of(run: str) -> str:
    """'ehi-pq' of the run 'ehi-pq-64x'."""
    return run if run in SYSTEMS else run.rsplit("-", 1)[0]


def _examples(inputs, trained, built, console, count: int = 3) -> None:
    """What a few queries find in the last index, and their way through its tree."""
    run = list(built)[-1]
    rows, texts = inputs.eval_rows, inputs.dataset.query_texts
    if not len(rows):
        console.print("no queries to show; ask your own with experiments.search")
        return
    index = built[run].index
    # Questions of a line's length; the longest summaries are paragraphs.
    short = [row for row in rows if 4 <= len(texts[row].split()) <= 12] or rows
    count = min(count, len(short))
    chosen = np.array(short)[np.linspace(0, len(short) - 1, count).astype(int)]
    queries, default = trained[run].queries, default_search(index)
    if index.num_leaves > 1:
        visited = index.count_visited(queries[rows], **default).mean()
        console.print(
            f"\n{run}: the default search, set for {DEFAULT_PERCENT}% without these "
            f"queries, visits {visited / index.num_documents:.1%} of the documents",
            highlight=False,
            soft_wrap=True,
        )
    hits = index.search(queries[chosen], 3, **default)
    console.print(f"\nexamples, {run}:", highlight=False)
    for number, row in enumerate(chosen):
        text = format_hits(texts[row], describe_hits(index, hits, number))
        console.print(text, highlight=False, markup=False, soft_wrap=True)
