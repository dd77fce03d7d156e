"""Committed records -> the tables and figures of the paper and of the README.

    python -m experiments.tables --results=DIR --out=DIR [--mix] \\
        [--readme README.md DIR/README.md] [--figures=DIR/figures]
    python -m experiments.tables --results=DIR --collect RUN_DIR ...

The first form writes OUT/<dataset>/T1 ... T6 as .md, .csv and .tex, for T1 and T2 also
as .png; OUT/<dataset>-<split>.md, which has every record; and OUT/published.md, which
has the numbers that papers print. --readme fills the blocks `summary` and `speed`
(small tables) and `tables` (all tables) of files; --figures draws the three figures of
the README.

The second form merges the records of finished runs, and their per-query values, into
the results folder: `<dataset>.jsonl` and `<dataset>.per_query.npz`.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ehi.eval.figures import figure_rows
from ehi.eval.records import Record, Values, aligned
from ehi.eval.report import HEADER, markdown_table
from ehi.eval.significance import compare
from ehi.eval.tables import Table, latex, markdown, to_csv
from ehi.files import atomic_write
from experiments.command import accept_any_text, exit_code, user_path
from experiments.paper.ageing import ageing_table
from experiments.paper.architecture import draw as draw_architecture
from experiments.paper.definitions import TABLES, PaperTable, budgets_of, cells
from experiments.paper.fill import Filled, fill, missing
from experiments.paper.published import published_table
from experiments.paper.readme import draw_figures, fill_blocks, speed, summary
from experiments.paper.results import (
    SCORED,
    Results,
    collect,
    group,
    is_quantised,
    read_results,
)

HEADER_OF_RECORDS = (*HEADER[:2], "seeds", *HEADER[2:])

# Data sets of the block `tables`; those without records are skipped.
README_DATASETS = ("pydocs", "scifact", "squad-dev")
SEARCH_RECORD = Path("benchmarks", "search.json")
README_LEGEND = (
    "nDCG@10, mean ± standard deviation over the seeds, and R@100 in parentheses. "
    "Italic: best separate row of a column; bold: best joint row; † better, ‡ worse "
    "than the best separate row with p < 0.05, at equal work if the records know it."
)

# Notes beside every table of a data set.
DATASET_NOTES = {
    "pydocs": "No document of pydocs is an answer both in train and in test.",
    "scifact": "Of SciFact's 283 relevant test documents 181 are answers in its train "
    "split too.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_arguments(argv)
    accept_any_text()
    return exit_code(functools.partial(_run, args))


def _run(args: argparse.Namespace) -> None:
    """Write the tables and figures, or merge the records of runs."""
    if args.collect:
        for path in collect(args.collect, args.results):
            print(path)
        return
    records, values = read_results(args.results, mix=args.mix)
    found = {r.dataset: r for r in group(records, aligned(values), args.split)}
    choices = {}
    if any(record.split == "dev" for record in records):
        choices = {r.dataset: r for r in group(records, aligned(values), "dev")}
    short, grids = {}, {}
    for name, results in found.items():
        of_dataset = choices.get(name)
        short[name], grids[name] = write_tables(args.out, results, of_dataset)
        ageing = ageing_table(name, args.split, records, aligned(values))
        if ageing is not None:
            short[name] += f"\n\n{write_ageing(args.out / name, ageing)}"
    print("\n\n".join((README_LEGEND, *short.values())))
    write_records_and_published(args.out, records, values)
    if args.readme:
        shown = [short[name] for name in README_DATASETS if name in short]
        if not shown:
            raise ValueError(
                f"--readme shows {' and '.join(README_DATASETS)}; the records are "
                f"of {', '.join(short)}"
            )
        full = "\n\n".join((README_LEGEND, *shown))
        blocks = {"tables": full, "summary": summary(found, grids)}
        if (measured := args.results / SEARCH_RECORD).exists():
            blocks["speed"] = speed(measured)
        for path in args.readme:
            fill_blocks(path, blocks)
    if args.figures:
        draw_architecture(args.figures / "architecture.svg")
        draw_figures(args.figures, found)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake ends the program with a usage message."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tables")
    parser.add_argument(
        "--results", required=True, type=user_path, help="folder of records"
    )
    parser.add_argument("--out", type=user_path, help="folder for the full tables")
    parser.add_argument(
        "--readme", nargs="+", type=user_path, help="files whose tables are replaced"
    )
    parser.add_argument(
        "--figures", type=user_path, help="folder for the figures of the README"
    )
    parser.add_argument("--split", default="test", help="split that T1-T5 show (test)")
    parser.add_argument(
        "--mix",
        action="store_true",
        help="average records of different configs or recipes",
    )
    parser.add_argument(
        "--collect",
        nargs="+",
        type=user_path,
        metavar="RUN_DIR",
        help="merge the records of finished runs into --results",
    )
    args = parser.parse_args(argv)
    if not args.collect and not args.out:
        parser.error("give --out=DIR, or --collect RUN_DIR ...")
    return args


def separate_counterparts() -> dict[str, str]:
    """Return joint system -> the separate system that it is tested against."""
    from experiments.systems import SYSTEMS

    return {name: s.counterpart for name, s in SYSTEMS.items() if s.counterpart}


def write_tables(
    folder: Path, results: Results, choices: Results | None = None
) -> tuple[str, Table]:
    """Write T1-T5 of one dataset.

    Args:
        folder: receives a folder named after the dataset.
        results: results of the dataset.
        choices: its results on dev, for the tables of choices; None if there are none.

    Returns:
        The tables in short form as Markdown, and the grid of T3.
    """
    short, grids = [], {}
    for table in TABLES.values():
        if table.datasets and results.dataset not in table.datasets:
            continue
        shown = choices if choices and table.split == "dev" else results
        filled = fill(table, shown)
        todo = missing(table, shown)
        write_table(folder / results.dataset, table, filled, todo, shown)
        grids[table.name] = filled.tables[0]
        heading = f"### {table.name}, {results.dataset}: {table.title}"
        short += [heading, *_short(filled), *([f"{todo}."] if todo else [])]
    note = DATASET_NOTES.get(results.dataset)
    return "\n\n".join([note, *short] if note else short), grids["T3"]


def _short(filled: Filled) -> list[str]:
    """Return the tables of a definition without the details of its cells."""
    first, *more = filled.tables[:-1] or filled.tables
    titled = [f"{table.title}:\n\n{markdown(table)}" for table in more]
    return [markdown(first), *titled]


def write_table(
    folder: Path, table: PaperTable, filled: Filled, todo: str | None, results: Results
) -> None:
    """Write one table as .md, .csv and .tex, and draw its figure if it has one."""
    notes = [*filled.notes, *_origin(table, results), *([f"{todo}."] if todo else [])]
    first, last = filled.tables[0], filled.tables[-1]
    parts = [f"# {first.title}", markdown(first)]
    for other in filled.tables[1:]:
        if other.title != first.title:
            parts.append(f"{other.title}:")
        parts.append(markdown(other))
    if table.across and (rows := _drawn(table, results)):
        exact = {row.label: rows.pop(row) for row in list(rows) if row.kind == "exact"}
        figures = {table.name: table.across}
        if table.works and any(r.work for found in rows.values() for r in found):
            figures[f"{table.name}-work"] = "work"
        for name, across in figures.items():
            figure_rows(
                folder / f"{name}.png",
                {row.label: found for row, found in rows.items()},
                across=across,
                exact=exact,
                title=first.title,
            )
            parts.append(f"![{first.title}]({name}.png)")
    parts.append("\n".join(f"- {note}" for note in notes))
    atomic_write(folder / f"{table.name}.md", ("\n\n".join(parts) + "\n").encode())
    atomic_write(folder / f"{table.name}.csv", to_csv(last).encode())
    with_notes = dataclasses.replace(first, notes=tuple(notes))
    atomic_write(folder / f"{table.name}.tex", latex(with_notes).encode())


def write_ageing(folder: Path, table: Table) -> str:
    """Write T6 as .md, .csv and .tex; return it in short form as Markdown."""
    text = f"# {table.title}\n\n{markdown(table)}\n"
    atomic_write(folder / "T6.md", text.encode())
    atomic_write(folder / "T6.csv", to_csv(table).encode())
    atomic_write(folder / "T6.tex", latex(table).encode())
    plain = dataclasses.replace(table, notes=())
    return f"### {table.title}\n\n{markdown(plain)}"


def _drawn(table: PaperTable, results: Results) -> dict:
    """Return row -> its records at all budgets, without rows that were not run."""
    found = {
        row: [r for b in budgets_of(table, row).values() for r in results.of(row, b)]
        for row in table.rows
    }
    return {row: records for row, records in found.items() if records}


def _origin(table: PaperTable, results: Results) -> list[str]:
    """Return notes on the origin of the numbers and on the data."""
    found = [r for cell in cells(table) for r in results.records.get(cell, ())]
    notes = [note for name, note in DATASET_NOTES.items() if name == results.dataset]
    mixed = [
        " ".join(filter(None, cell))
        for cell in cells(table)
        if len({(r.config_hash, r.recipe) for r in results.records.get(cell, ())}) > 1
    ]
    if mixed:
        notes.append(f"Of mixed configs or recipes: {', '.join(mixed)}.")
    if results.split == "test" and table.split == "dev":
        notes.append("These records are of test; choices are made on dev.")
    older = {f"{r.system}{r.variant and ':'}{r.variant}" for r in found
             if is_quantised(r) and r.recipe < SCORED}  # fmt: skip
    if older and any(is_quantised(r) and r.recipe >= SCORED for r in found):
        notes.append(f"Codes scored by inner product: {', '.join(sorted(older))}.")
    for name in ("hardware", "recipe", "git_commit"):
        texts = dict.fromkeys(str(getattr(record, name)) for record in found)
        notes += [f"{name}: {'; '.join(texts)}."] * bool(texts)
    return notes


def write_records_and_published(
    folder: Path, records: Sequence[Record], values: Values
) -> None:
    """Write every record, also those in no table, and the numbers of papers."""
    listed = tables(records, values, separate_counterparts(), HEADER_OF_RECORDS)
    for title, table in listed.items():
        path = folder / f"{title.replace(', ', '-')}.md"
        atomic_write(path, f"# {title}\n\n{table}\n".encode())
    published = published_table()
    text = f"# {published.title}\n\n{markdown(published)}\n"
    atomic_write(folder / "published.md", text.encode())


def tables(
    records: Iterable[Record],
    values: Values,
    counterparts: Mapping[str, str],
    header: Sequence[str],
) -> dict[str, str]:
    """Return one Markdown table per dataset and split; each corrects its p-values.

    Returns:
        'dataset, split' -> table.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(f"{record.dataset}, {record.split}", []).append(record)
    per_query = aligned(values)
    return {
        title: markdown_table(group, compare(group, per_query, counterparts), header)
        for title, group in groups.items()
    }


if __name__ == "__main__":
    sys.exit(main())
