"""The comparison table, in the terminal and as report.md with two figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import rich.table
from rich import box
from rich.console import Console

from ehi.eval.figures import Curve, figure_bytes, figure_visited
from ehi.eval.records import Record
from ehi.eval.significance import Comparison, Row, row_of
from ehi.eval.tables import Table, markdown, mean_of, tested, text
from ehi.files import atomic_write

HEADER = (
    "system",
    "budget",
    "nDCG@10",
    "RR@10",
    "R@100",
    "visited %",
    "work %",
    "bytes/doc",
    "p50 ms",
    "queries/s",
    "train s",
    "vs separate",
    "p",
)
EXACT = "exact R@10"  # a column of data sets of vectors, before "visited %"
NOTES = (
    "visited %: documents that a query scores, as counted; spilled copies count too. A "
    "budget is set on other queries than these. work %: the same with what a query "
    "spends on router, rotation and look-up table, in products of the same width.",
    "p50 ms, queries/s: top-10 search of embedded queries, one at a time on one thread "
    "and in one batch.",
    "vs separate: nDCG@10 minus that of the separate pipeline at the same budget, with "
    "the sign of each seed. p: paired randomisation test over queries, Holm-corrected "
    "over the table.",
    "bytes/doc: codes or vectors with every spilled copy. The index folder also holds "
    "tree and codebooks: on a corpus of 5,000 documents the codebooks dominate "
    "index_bytes.",
)


def table_rows(
    records: Iterable[Record],
    comparisons: Mapping[Row, Comparison],
    header: Sequence[str] = HEADER,
) -> list[list[str]]:
    """Cells of the table as text, one row for each (system, variant, budget).

    Effectiveness is 'mean', or 'mean ± standard deviation' of several seeds. The other
    columns are means over seeds.

    Args:
        records: of one dataset and split, in the order of the rows.
        comparisons: from `significance.compare`.
        header: columns, from `HEADER`, `EXACT` or 'seeds' (their number).
    """
    groups: dict[Row, list[Record]] = {}
    for record in records:
        groups.setdefault(row_of(record.cell), []).append(record)
    cells = [_row(row, group, comparisons.get(row)) for row, group in groups.items()]
    return [[row[name] for name in header] for row in cells]


def header_of(records: Iterable[Record]) -> tuple[str, ...]:
    """`HEADER`, and `EXACT` if a record has a value of it."""
    if all(record.exact_recall_at_10 is None for record in records):
        return HEADER
    place = HEADER.index("visited %")
    return *HEADER[:place], EXACT, *HEADER[place:]


def markdown_table(
    records: Iterable[Record],
    comparisons: Mapping[Row, Comparison],
    header: Sequence[str] = HEADER,
    notes: Sequence[str] = (),
) -> str:
    """The rows of `table_rows` as GitHub Markdown, with a bullet for each note."""
    rows = map(tuple, table_rows(records, comparisons, header))
    return markdown(Table("", tuple(header), tuple(rows), tuple(notes), text_columns=2))


def print_table(
    records: Sequence[Record],
    comparisons: Mapping[Row, Comparison],
    *,
    console: Console | None = None,
) -> None:
    """Print the table; in a narrow terminal long cells are folded, never cut."""
    console = console or Console()
    if not console.is_terminal:
        # A log file has no width. Rich would use 80 columns.
        console = Console(file=console.file, width=140)
    table = rich.table.Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left"
    )
    table.title = _title(records)
    header = header_of(records)
    for i, name in enumerate(header):
        # Two-word names on two lines keep the columns of numbers narrow.
        name = name.replace(" ", "\n")
        table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    rows = table_rows(records, comparisons, header)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        # A gap separates systems, not the budgets of one system.
        table.add_row(*row, end_section=bool(following and following[0] != row[0]))
    console.print(table)
    for line in _pairs(comparisons):
        console.print(line, highlight=False)


def write_report(
    folder: str | Path,
    records: Sequence[Record],
    comparisons: Mapping[Row, Comparison],
    *,
    curves: Mapping[str, Curve],
    exact: Mapping[str, float],
    notes: Sequence[str] = (),
) -> Path:
    """Write report.md, visited.png and bytes.png.

    Args:
        folder: where the files go.
        records: of one dataset and split, not empty.
        comparisons: from `significance.compare`.
        curves: system -> points (share of documents visited, nDCG@10).
        exact: system -> nDCG@10 of its exhaustive search.
        notes: further remarks on the data, one bullet each.

    Returns:
        The path of report.md.
    """
    folder = Path(folder)
    first = records[0]
    title = f"{first.dataset}, {first.split} split"
    figure_visited(folder / "visited.png", curves, exact=exact, title=title)
    figure_bytes(folder / "bytes.png", records, title=title)
    remarks = (*_pairs(comparisons), *NOTES, *notes, *_provenance(records))
    lines = [
        f"# {_title(records)}",
        "",
        markdown_table(records, comparisons, header_of(records), remarks),
        "",
        "![nDCG@10 against documents visited](visited.png)",
        "",
        "![nDCG@10 against bytes per document](bytes.png)",
        "",
    ]
    atomic_write(folder / "report.md", "\n".join(lines).encode())
    return folder / "report.md"


def _row(
    row: Row, group: Sequence[Record], comparison: Comparison | None
) -> dict[str, str]:
    difference, signs, p_value = tested(comparison)
    values = {
        "nDCG@10": mean_of(group, "ndcg_at_10", deviation=True),
        "RR@10": mean_of(group, "rr_at_10", deviation=True),
        "R@100": mean_of(group, "recall_at_100", deviation=True),
        EXACT: mean_of(group, "exact_recall_at_10", deviation=True),
        "visited %": mean_of(group, "docs_visited", ".1f", factor=100),
        "work %": mean_of(group, "work", ".1f", factor=100),
        "bytes/doc": mean_of(group, "bytes_per_doc", ".5g"),
        "p50 ms": mean_of(group, "latency_ms_p50", ".3g"),
        "queries/s": mean_of(group, "qps_batch", ",.0f"),
        "train s": mean_of(group, "train_seconds", ".0f"),
        "vs separate": comparison and f"{difference} {signs}",
        "p": p_value,
    }
    return {
        "system": ":".join(part for part in row[:2] if part),
        "budget": row[4],
        "seeds": str(len(group)),
        **{name: text(value) for name, value in values.items()},
    }


def _pairs(comparisons: Mapping[Row, Comparison]) -> list[str]:
    pairs = {f"{row[0]} with {c.counterpart}" for row, c in comparisons.items()}
    return [f"Compared: {', '.join(sorted(pairs))}."] if pairs else []


def _title(records: Sequence[Record]) -> str:
    seeds = sorted({record.seed for record in records})
    named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{records[0].dataset}, {records[0].split} split, {named}"


def _provenance(records: Sequence[Record]) -> list[str]:
    """One bullet for each fact, with all its values if the records differ."""

    def distinct(texts: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(texts))

    versions = (", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in records)
    return [
        f"corpus sha256: {distinct(r.corpus_sha256 for r in records)}",
        f"hardware: {distinct(r.hardware for r in records)}",
        f"versions: {distinct(versions)}",
        f"commit: {distinct(r.git_commit for r in records)}",
    ]
