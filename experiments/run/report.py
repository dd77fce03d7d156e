"""The end of a run: its table, three example queries, its report, its files."""

import shlex

import numpy as np
from rich.console import Console

from ehi.eval.answers import describe_hits, format_hits
from ehi.eval.records import aligned, read_records, read_run_values
from ehi.eval.report import print_table, write_report
from ehi.eval.significance import compare
from experiments.html_report.page import REPORT, write_html
from experiments.html_report.saved import write_curves, write_questions
from experiments.run.evaluate import (
    DEFAULT_PERCENT,
    budget_queries,
    smallest_visited,
    visited_curve,
)
from experiments.run.experiment import Experiment
from experiments.search import default_search
from experiments.systems import SYSTEMS, get_system
from experiments.tables import separate_counterparts

# Files that a run writes into its workdir, in reading order.
WRITTEN = (
    "results.jsonl",
    "report.md",
    REPORT,
    "visited.png",
    "bytes.png",
    "trec",
    "index",
    "indexes",
    "checkpoints",
    "metrics.jsonl",
    "config.json",
)


def show(experiment: Experiment) -> None:
    """Print table, examples and paths; write both reports and the figures."""
    workdir, console = experiment.workdir, Console()
    if (workdir / "results.jsonl").exists():
        _report(experiment, console)
    else:
        _say(console, why_nothing_is_scored(experiment))
    _examples(experiment, console)
    _say(console, "\nwritten:")
    for name in WRITTEN:
        if (workdir / name).exists():
            _say(console, f"  {workdir / name}")
    if (workdir / "index").exists() and experiment.inputs.query_tokens is None:
        index = str(workdir / "index")
        _say(console, f"\nask it: ehi.load({index!r}).search(vectors) in Python")
    elif (workdir / "index").exists():
        index = shlex.quote(str(workdir / "index"))
        _say(console, f'\nask it: python -m experiments.search --index={index} "..."')


def why_nothing_is_scored(experiment: Experiment) -> str:
    """Return the reason why a run has no record, in one sentence."""
    config, inputs = experiment.config, experiment.inputs
    if not len(inputs.eval_rows):
        return (
            f"{inputs.dataset.name} has no queries in split {config.split!r}: nothing "
            "to score, the indexes are built"
        )
    smallest = []
    for run, built in experiment.built.items():
        rows = budget_queries(inputs, config.split)[1]
        queries = experiment.trained[run].queries[rows]
        percent = 100 * smallest_visited(built.index, queries)
        smallest.append(f"{run} visits at least {percent:.2f}% of the documents")
    return (
        f"no budget of {', '.join(config.budgets)} could be reached: nothing to score, "
        f"the indexes are built; {', '.join(smallest) or 'see the warnings above'}"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _report(experiment: Experiment, console: Console) -> None:
    config, workdir = experiment.config, experiment.workdir
    order = {name: number for number, name in enumerate(SYSTEMS)}
    records = sorted(
        read_records(workdir / "results.jsonl"),
        key=lambda r: order.get(r.system, len(order)),  # it may have been removed
    )
    values = aligned(read_run_values(workdir / "trec", records))
    comparisons = compare(records, values, separate_counterparts())
    curves = {
        run: visited_curve(
            config, built, experiment.trained[run], experiment.inputs, config.split
        )
        for run, built in experiment.built.items()
        if get_system(_system_of(run)).tree
    }
    exact = {r.system: r.ndcg_at_10 for r in records if r.budget == "flat"}
    print_table(records, comparisons, console=console)
    write_report(
        workdir, records, comparisons, curves=curves, exact=exact,
        notes=_notes(experiment.inputs),
    )  # fmt: skip
    write_curves(workdir, curves)
    write_questions(experiment, records)
    try:
        write_html(workdir / REPORT, [workdir])
    except ImportError as error:  # the run is complete without
        _say(console, str(error))


def _notes(inputs) -> list[str]:
    """Return what a reader of the report must know of the data."""
    notes = [f"{note}." for note in inputs.dataset.notes]
    if dropped := len(inputs.identical_ids):
        notes.append(
            f"{dropped:,} of {len(inputs.eval_rows):,} queries have the id of a "
            "document, which is not ranked for them (ignore_identical_ids)."
        )
    return notes


def _system_of(run: str) -> str:
    """'ehi-pq' of the run 'ehi-pq-64x'."""
    return run if run in SYSTEMS else run.rsplit("-", 1)[0]


def _examples(experiment: Experiment, console: Console, count: int = 3) -> None:
    """Print what a few queries find in the last index, and the leaves they visit."""
    inputs = experiment.inputs
    rows, texts = inputs.eval_rows, inputs.dataset.query_texts
    if not len(rows):
        _say(console, "no queries to show; ask your own with experiments.search")
        return
    if not experiment.built:  # a library's index is not saved
        return
    run = list(experiment.built)[-1]
    index = experiment.built[run].index
    # Questions of a line's length; the longest summaries are paragraphs.
    short = [row for row in rows if 4 <= len(texts[row].split()) <= 12] or rows
    count = min(count, len(short))
    chosen = np.array(short)[np.linspace(0, len(short) - 1, count).astype(int)]
    queries, default = experiment.trained[run].queries, default_search(index)
    if index.num_leaves > 1:
        routes = {name: default[name] for name in ("beam", "min_prob")}
        visited = index.count_visited(queries[rows], **routes).mean()
        _say(
            console,
            f"\n{run}: the default search, set for {DEFAULT_PERCENT}% without these "
            f"queries, visits {visited / index.num_documents:.1%} of the documents",
        )
    hits = index.search(queries[chosen], 3, **default)
    _say(console, f"\nexamples, {run}:")
    for number, row in enumerate(chosen):
        _say(console, format_hits(texts[row], describe_hits(index, hits, number)))
