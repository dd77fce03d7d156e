"""Committed records -> the tables and figures of the paper and of the README.

    python -m experiments.tables --results=DIR --out=DIR [--mix] \\
        [--readme README.md DIR/README.md] [--figures=DIR/figures]
    python -m experiments.tables --results=DIR --collect RUN_DIR ...
    python -m experiments.tables --results=DIR --collect_trials WORKDIR ...
    python -m experiments.tables --results=DIR --renew DIR ...
    python -m experiments.tables --html=FILE --workdirs DIR ... [--compare A B]

The first form writes OUT/<dataset>/T1 ... T6 as .md, .csv and .tex, for T1 and T2 also
as .png; OUT/<dataset>-<split>.md, which has every record; OUT/published.md, which has
the numbers that papers print; and OUT/choices.md, what was tried on dev. --readme fills
the blocks `summary` and `speed` (small tables), `tables` (all tables) and `choices` of
files; --figures draws the three figures of the README.

The second form merges the records of finished runs, and their per-query values, into
the results folder: `<dataset>.jsonl` and `<dataset>.per_query.npz`. The third form
collects what was tried on dev in its folder `dev` (`experiments.paper.choices`). The
fourth form merges results folders of a new recipe, and drops older records of their
data sets or sets them aside (`experiments.paper.older`). The fifth form writes one
page, as report.html of a run, that compares the finished runs of several workdirs.
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
from ehi.eval.significance import compare_tables, counterpart_pairs
from ehi.eval.tables import Table, latex, markdown, to_csv
from ehi.files import atomic_write
from experiments.command import accept_any_text, exit_code, user_path
from experiments.html_report.page import write_html
from experiments.paper.ageing import ageing_table
from experiments.paper.architecture import draw as draw_architecture
from experiments.paper.choices import (
    DEV,
    choices_table,
    collect_choices,
    read_choices,
)
from experiments.paper.contest import Contest
from experiments.paper.definitions import (
    LEGEND,
    TABLES,
    PaperTable,
    budgets_of,
    cells,
)
from experiments.paper.fill import Filled, fill_contest
from experiments.paper.missing import aged, missing
from experiments.paper.older import OLDER, renew, with_older
from experiments.paper.published import orders_table, published_table
from experiments.paper.readme import draw_figures, fill_blocks, speed, summary
from experiments.paper.results import Results, collect, group, read_results

HEADER_OF_RECORDS = (*HEADER[:2], "seeds", *HEADER[2:])

# Data sets of the block `tables`; those without records are skipped.
README_DATASETS = ("pydocs", "scifact", "squad-dev")
SEARCH_RECORD = Path("benchmarks", "search.json")
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
    """Write the tables and figures, or a page, or merge the records of runs."""
    if args.html:
        print(write_html(args.html, args.workdirs, compare=args.compare))
        return
    if args.collect:
        for path in collect(args.collect, args.results):
            print(path)
        return
    if args.collect_trials:
        for path in collect_choices(args.collect_trials, args.results / DEV):
            print(path)
        return
    if args.renew:
        for path in renew(args.results, args.renew):
            print(path)
        return
    records, values = read_results(args.results, mix=args.mix)
    found = {r.dataset: r for r in group(records, aligned(values), args.split)}
    contests = [Contest(*of) for of in shown_tables(found, records, values, args)]
    listed = counterparts_of(records, values, separate_counterparts())
    pairs = {contest: contest.pairs() for contest in contests} | listed
    compared = compare_tables(pairs)  # all in one go, which is faster
    short, grids = write_tables(args.out, contests, compared)
    for name in found:
        ageing = ageing_table(name, args.split, records, aligned(values))
        if ageing is not None:
            short[name] += f"\n\n{write_ageing(args.out / name, ageing)}"
    legend = "\n".join(f"- {line}" for line in LEGEND)
    first = {c.results.dataset: c.results for c in contests if c.table.name == "T1"}
    orders = write_orders(args.out, first)
    print("\n\n".join((legend, *short.values(), orders)))
    write_records_and_published(args.out, records, compared)
    tried = markdown(choices_table(read_choices(args.results / DEV)))
    atomic_write(args.out / "choices.md", f"{tried}\n".encode())
    if args.readme:
        in_readme = [short[name] for name in README_DATASETS if name in short]
        if not in_readme:
            raise ValueError(
                f"--readme shows {' and '.join(README_DATASETS)}; the records are "
                f"of {', '.join(short)}"
            )
        full = "\n\n".join((legend, *in_readme, orders))
        blocks = {"tables": full, "summary": summary(found, grids)}
        blocks["choices"] = tried
        if (measured := args.results / SEARCH_RECORD).exists():
            blocks["speed"] = speed(measured)
        for path in args.readme:
            fill_blocks(path, blocks)
    if args.figures:
        draw_architecture(args.figures / "architecture.svg")
        draw_figures(args.figures, first)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake ends the program with a usage message."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tables")
    parser.add_argument("--results", type=user_path, help="folder of records")
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
    parser.add_argument(
        "--collect_trials",
        nargs="+",
        type=user_path,
        metavar="WORKDIR",
        help="add what was tried in workdirs to the folder `dev` of --results",
    )
    parser.add_argument(
        "--renew",
        nargs="+",
        type=user_path,
        metavar="DIR",
        help="merge results folders of a new recipe, and drop or set aside older ones",
    )
    _add_html_flags(parser)
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _add_html_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--html", type=user_path, metavar="FILE",
        help="write a page of the runs in --workdirs, as report.html of one run",
    )  # fmt: skip
    parser.add_argument(
        "--workdirs", nargs="+", type=user_path, default=[], metavar="DIR",
        help="finished runs of one data set and split, for --html",
    )  # fmt: skip
    parser.add_argument(
        "--compare", nargs=2, default=(), metavar=("A", "B"),
        help="systems whose queries are compared when the page of --html opens",
    )  # fmt: skip


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a usage message if the flags make none of the forms."""
    if bool(args.html) != bool(args.workdirs):
        parser.error("--html=FILE and --workdirs DIR ... go together")
    if args.html:
        return
    if args.compare:
        parser.error("--compare needs --html=FILE")
    if not args.results:
        parser.error("give --results=DIR, or --html=FILE --workdirs DIR ...")
    if not (args.collect or args.collect_trials or args.renew or args.out):
        parser.error(
            "give --out=DIR, --collect RUN_DIR ..., --collect_trials WORKDIR ... or "
            "--renew DIR ..."
        )


def separate_counterparts() -> dict[str, str]:
    """Return joint system -> the separate system that it is tested against."""
    from experiments.systems import SYSTEMS

    return {name: s.counterpart for name, s in SYSTEMS.items() if s.counterpart}


def shown_tables(
    found: Mapping[str, Results], records: Sequence[Record], values: Values, args
) -> list[tuple[PaperTable, Results]]:
    """Return every table of every dataset, with the records that it shows.

    Tables of choices show dev if they have records of it. Rows without a record of the
    current recipe may show older ones.
    """
    choices, older = {}, {}
    if any(record.split == "dev" for record in records):
        choices = {r.dataset: r for r in group(records, aligned(values), "dev")}
    if (args.results / OLDER).exists():
        old, old_values = read_results(args.results / OLDER, mix=args.mix)
        if any(record.split == args.split for record in old):
            of_split = group(old, aligned(old_values), args.split)
            older = {r.dataset: r for r in of_split}
    return [
        (
            table,
            choices[name]
            if table.split == "dev" and name in choices
            else with_older(table, results, older.get(name)),
        )
        for name, results in found.items()
        for table in TABLES.values()
        if not table.datasets or name in table.datasets
    ]


def write_tables(
    folder: Path, contests: Sequence[Contest], compared: Mapping
) -> tuple[dict[str, str], dict[str, Table]]:
    """Write T1-T5 of every dataset into a folder named after it.

    Args:
        folder: receives the folders.
        contests: every table of every dataset.
        compared: contest -> the comparisons of its pairs.

    Returns:
        dataset -> its tables in short form as Markdown; dataset -> the grid of T3.
    """
    short: dict[str, list[str]] = {}
    grids: dict[str, Table] = {}
    for contest in contests:
        table, results = contest.table, contest.results
        filled, name = fill_contest(contest, compared[contest]), results.dataset
        old, todo = aged(table, results), missing(table, results)
        notes = [note for note in (old, todo) if note]
        write_table(folder / name, table, filled, notes, results)
        parts = short.setdefault(name, list(filter(None, [DATASET_NOTES.get(name)])))
        parts.append(f"### {table.name}, {name}: {table.title}")
        first, *more = filled.short
        parts += [f"{old}."] if old else []
        parts += [markdown(first)] if first.rows else []
        parts += [f"{t.title}:\n\n{markdown(t)}" for t in more if t.rows]
        parts += [f"{todo}."] if todo else []
        if table.name == "T3":
            grids[name] = first
    return {name: "\n\n".join(parts) for name, parts in short.items()}, grids


def write_table(
    folder: Path,
    table: PaperTable,
    filled: Filled,
    lacking: Sequence[str],
    results: Results,
) -> None:
    """Write one table as .md, .csv and .tex, and draw its figure if it has one."""
    notes = [*filled.notes, *_origin(table, results), *(f"{x}." for x in lacking)]
    first, *more = filled.short
    parts = [f"# {first.title}", *([markdown(first)] if first.rows else [])]
    for other in (*more, *filled.details):
        parts += [f"{other.title}:", markdown(other)] if other.rows else []
    if table.across and (rows := _drawn(table, filled, results)):
        exact = {row: rows.pop(row) for row in list(rows) if row.kind == "exact"}
        figures = {table.name: table.across}
        if table.works and any(r.work for found in rows.values() for r in found):
            figures[f"{table.name}-work"] = "work"
        for name, across in figures.items():
            figure_rows(
                folder / f"{name}.png",
                {filled.names[row]: found for row, found in rows.items()},
                across=across,
                exact={row.label: found for row, found in exact.items()},
                title=first.title,
            )
            parts.append(f"![{first.title}]({name}.png)")
    parts.append("\n".join(f"- {note}" for note in notes))
    atomic_write(folder / f"{table.name}.md", ("\n\n".join(parts) + "\n").encode())
    atomic_write(folder / f"{table.name}.csv", to_csv(filled.wide).encode())
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


def write_orders(folder: Path, found: Mapping[str, Results]) -> str:
    """Write which published orders hold; return it as Markdown with a heading."""
    table = orders_table(found)
    atomic_write(
        folder / "orders.md", f"# {table.title}\n\n{markdown(table)}\n".encode()
    )
    return f"### {table.title}\n\n{markdown(table)}"


def _drawn(table: PaperTable, filled: Filled, results: Results) -> dict:
    """Return row -> its records at all budgets, of the rows that were run."""
    return {
        row: [r for b in budgets_of(table, row).values() for r in results.of(row, b)]
        for row in filled.names
    }


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
    for name in ("hardware", "recipe", "git_commit"):
        texts = dict.fromkeys(str(getattr(record, name)) for record in found)
        notes += [f"{name}: {'; '.join(texts)}."] * bool(texts)
    return notes


def write_records_and_published(
    folder: Path, records: Iterable[Record], compared: Mapping
) -> None:
    """Write every record, also those in no table, and the numbers of papers."""
    for title, found in _by_title(records).items():
        path = folder / f"{title.replace(', ', '-')}.md"
        table = markdown_table(found, compared[title], HEADER_OF_RECORDS)
        atomic_write(path, f"# {title}\n\n{table}\n".encode())
    published = published_table()
    text = f"# {published.title}\n\n{markdown(published)}\n"
    atomic_write(folder / "published.md", text.encode())


def counterparts_of(
    records: Iterable[Record], values: Values, counterparts: Mapping[str, str]
) -> dict[str, dict]:
    """Return 'dataset, split' -> the pairs that its list of records tests."""
    per_query = aligned(values)
    return {
        title: counterpart_pairs(found, per_query, counterparts)
        for title, found in _by_title(records).items()
    }


def _by_title(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(f"{record.dataset}, {record.split}", []).append(record)
    return groups


if __name__ == "__main__":
    sys.exit(main())
