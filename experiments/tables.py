"""Committed records -> the tables of the README.

python -m experiments.tables --results=DIR --out=DIR [--readme=README.md] [--mix]
python -m experiments.tables --results=DIR --collect RUN_DIR ...

The second form merges the records of finished runs, and their per-query values, into
the results folder: `<dataset>.jsonl` and `<dataset>.per_query.npz`.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ehi.eval.per_query import Values, aligned, read_run_values, read_values
from ehi.eval.per_query import write_values as write_per_query
from ehi.eval.records import Record, atomic_write, read_records, write_records
from ehi.eval.report import HEADER, markdown_table, table_rows
from ehi.eval.significance import compare, row_of

# Where `experiments.main` keeps run files and per-query values in its workdir.
RUN_VALUES = "trec"

SHORT_HEADER = (
    "system",
    "budget",
    "seeds",
    "nDCG@10",
    "R@100",
    "visited %",
    "bytes/doc",
    "vs separate",
    "p",
)
FULL_HEADER = (*HEADER[:2], "seeds", *HEADER[2:])
BEGIN, END = "<!-- tables:begin -->", "<!-- tables:end -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = parse_arguments(argv)
    try:
        if args.collect:
            for path in collect(args.collect, args.results):
                print(path)
            return 0
        records, values = read_results(args.results, mix=args.mix)
        counterparts = separate_counterparts()
        short = tables(records, values, counterparts, SHORT_HEADER)
        text = "\n\n".join(f"### {title}\n\n{table}" for title, table in short.items())
        print(text)
        if args.out:
            full = tables(records, values, counterparts, FULL_HEADER)
            for title, table in full.items():
                path = args.out / f"{title.replace(', ', '-')}.md"
                atomic_write(path, f"# {title}\n\n{table}\n".encode())
        if args.readme:
            replace_between_markers(args.readme, text)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the program with a usage message."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tables")
    parser.add_argument("--results", required=True, type=Path, help="folder of records")
    parser.add_argument("--out", type=Path, help="folder for the full tables")
    parser.add_argument("--readme", type=Path, help="file whose tables are replaced")
    parser.add_argument(
        "--mix",
        action="store_true",
        help="average records of different configs or recipes",
    )
    parser.add_argument(
        "--collect",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="merge the records of finished runs into --results",
    )
    args = parser.parse_args(argv)
    if not args.collect and not args.out:
        parser.error("give --out=DIR, or --collect RUN_DIR ...")
    return args


def separate_counterparts() -> dict[str, str]:
    """Joint system -> the separate system it is tested against."""
    from experiments.systems import SYSTEMS

    return {name: s.counterpart for name, s in SYSTEMS.items() if s.counterpart}


def collect(run_folders: Iterable[Path], results: Path) -> list[Path]:
    """Merge runs into the results folder; a cell that is there is replaced.

    Returns:
        Paths of the files written.

    Raises:
        FileNotFoundError: a folder has no results.jsonl.
        ValueError: a record is not valid, or a run was scored on other queries than
            the cells that are there.
    """
    records: dict[str, list[Record]] = {}
    values: dict[str, Values] = {}
    for folder in run_folders:
        found = read_records(folder / "results.jsonl")
        found_values = read_run_values(folder / RUN_VALUES, found)
        for record in found:
            records.setdefault(record.dataset, []).append(record)
            if record.cell in found_values:
                of_dataset = values.setdefault(record.dataset, {})
                of_dataset[record.cell] = found_values[record.cell]
    written = []
    for dataset, found in records.items():
        # Values first: a crash in between leaves values without a record, which no
        # table reads, and not a record whose values are those of an older run.
        if dataset in values:
            written.append(results / f"{dataset}.per_query.npz")
            write_per_query(written[-1], values[dataset])
        written.append(results / f"{dataset}.jsonl")
        write_records(written[-1], found)
    return written


def read_results(folder: Path, *, mix: bool = False) -> tuple[list[Record], Values]:
    """Read all records of a folder and the per-query values beside them.

    Args:
        folder: holds `*.jsonl` and perhaps `*.per_query.npz`.
        mix: allow records that differ in config or recipe to be averaged.

    Raises:
        FileNotFoundError: there are no records.
        ValueError: two records of one row differ in `config_hash` or `recipe`.
    """
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"no *.jsonl in {folder}")
    records: list[Record] = []
    values: Values = {}
    for path in paths:
        records += read_records(path)
        values |= read_values(path.with_suffix(".per_query.npz"))
    if not mix:
        check_same_origin(records)
    # Of a cell in two files the later one counts, as its values do.
    return list({record.cell: record for record in records}.values()), values


def check_same_origin(records: Iterable[Record]) -> None:
    """Refuse to average records of one row that were made in different ways.

    Raises:
        ValueError: two seeds of a row differ in `config_hash` or `recipe`.
    """
    first_of: dict = {}
    for record in records:
        first = first_of.setdefault(row_of(record.cell), record)
        for name in ("config_hash", "recipe"):
            ours, theirs = getattr(record, name), getattr(first, name)
            if ours != theirs:
                raise ValueError(
                    f"{tuple(record.cell)} has {name} {ours}, but {tuple(first.cell)} "
                    f"has {theirs}: re-run one of them, or pass --mix"
                )


def tables(
    records: Iterable[Record],
    values: Values,
    counterparts: Mapping[str, str],
    header: Sequence[str],
) -> dict[str, str]:
    """One Markdown table a dataset and split; p-values are corrected within each.

    Returns:
        'dataset, split' -> table.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(f"{record.dataset}, {record.split}", []).append(record)
    per_query = aligned(values)
    return {
        title: markdown_table(
            header, table_rows(group, compare(group, per_query, counterparts), header)
        )
        for title, group in groups.items()
    }


def replace_between_markers(path: Path, text: str) -> None:
    """Put generated text between the two markers of a file.

    Raises:
        ValueError: the file does not have both markers, in order, once each.
    """
    content = path.read_text(encoding="utf-8")
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"{path} must have one line {BEGIN} and then one line {END}")
    atomic_write(path, f"{before}{BEGIN}\n{text}\n{END}{after}".encode())


if __name__ == "__main__":
    sys.exit(main())
