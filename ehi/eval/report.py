"""The comparison table: in the terminal, and as report.md with two figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ehi.eval.figures import Curve, figure_bytes, figure_visited
from ehi.eval.records import Record, atomic_write
from ehi.eval.significance import Comparison, Row, row_of

HEADER = (
    "system",
    "budget",
    "nDCG@10",
    "RR@10",
    "R@100",
    "visited %",
    "bytes/doc",
    "p50 ms",
    "queries/s",
    "train s",
    "vs separate",
    "p",
)
NOTES = (
    "visited %: documents scored by a query, counted, spilled copies included.",
    "p50 ms, queries/s: top-10 search of embedded queries, one at a time on one thread "
    "and in one batch.",
    "vs separate: nDCG@10 minus that of the separate pipeline at the same budget, with "
    "the sign of each seed; p: paired randomisation test over queries, Holm-corrected "
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
    """Cells of the table as text: one row a (system, variant, budget).

    Effectiveness is 'mean' or, over several seeds, 'mean ± standard deviation'; the
    other columns are means over seeds.

    Args:
        records: of one dataset and split, in the order the rows shall have.
        comparisons: from `significance.compare`.
        header: columns, of `HEADER` or 'seeds' (their number).
    """
    groups: dict[Row, list[Record]] = {}
    for record in records:
        groups.setdefault(row_of(record.cell), []).append(record)
    cells = [_row(row, group, comparisons.get(row)) for row, group in groups.items()]
    return [[row[name] for name in header] for row in cells]


def print_table(
    records: Sequence[Record],
    comparisons: Mapping[Row, Comparison],
    *,
    console: Console | None = None,
) -> None:
    """Print the table in the terminal; a narrow one folds cells and cuts none."""
    console = console or Console()
    if not console.is_terminal:
        # A log file has no width of its own, and rich would take it for 80 columns.
        console = Console(file=console.file, width=140)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.title = _title(records)
    for i, name in enumerate(HEADER):
        # Two-word names on two lines keep the columns of numbers narrow.
        name = name.replace(" ", "\n")
        table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    rows = table_rows(records, comparisons)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        # A gap between systems, none between the budgets of one.
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
        folder: where they go.
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
        markdown_table(HEADER, table_rows(records, comparisons)),
        "",
        *(f"- {note}" for note in remarks),
        "",
        "![nDCG@10 against documents visited](visited.png)",
        "",
        "![nDCG@10 against bytes per document](bytes.png)",
        "",
    ]
    atomic_write(folder / "report.md", "\n".join(lines).encode())
    return folder / "report.md"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """GitHub Markdown; the first two columns are left-aligned, the rest right."""
    rule = [":--" if i < 2 else "--:" for i in range(len(header))]
    lines = (header, rule, *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(
    row: Row, group: Sequence[Record], comparison: Comparison | None
) -> dict[str, str]:
    def mean(field: str) -> float:
        return float(np.mean([getattr(record, field) for record in group]))

    def effectiveness(field: str) -> str:
        return _mean_and_deviation([getattr(record, field) for record in group])

    counted = all(record.docs_visited is not None for record in group)
    difference, p_value = _verdict(comparison) if comparison else ("-", "-")
    return {
        "system": ":".join(part for part in row[:2] if part),
        "budget": row[4],
        "seeds": str(len(group)),
        "nDCG@10": effectiveness("ndcg_at_10"),
        "RR@10": effectiveness("rr_at_10"),
        "R@100": effectiveness("recall_at_100"),
        "visited %": f"{100 * mean('docs_visited'):.1f}" if counted else "-",
        "bytes/doc": f"{mean('bytes_per_doc'):.5g}",
        "p50 ms": f"{mean('latency_ms_p50'):.3g}",
        "queries/s": f"{mean('qps_batch'):,.0f}",
        "train s": f"{mean('train_seconds'):.0f}",
        "vs separate": difference,
        "p": p_value,
    }


def _mean_and_deviation(values: Sequence[float]) -> str:
    """'0.6451' of one seed, '0.6451 ± 0.0010' (sample deviation) of several."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def _verdict(comparison: Comparison) -> tuple[str, str]:
    signs = "".join("-0+"[sign + 1] for sign in comparison.signs)
    p = comparison.p_holm
    return f"{comparison.difference:+.4f} {signs}", "<0.001" if p < 1e-3 else f"{p:.3f}"


def _pairs(comparisons: Mapping[Row, Comparison]) -> list[str]:
    pairs = {f"{row[0]} with {c.counterpart}" for row, c in comparisons.items()}
    return [f"Compared: {', '.join(sorted(pairs))}."] if pairs else []


def _title(records: Sequence[Record]) -> str:
    seeds = sorted({record.seed for record in records})
    named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{records[0].dataset}, {records[0].split} split, {named}"


def _provenance(records: Sequence[Record]) -> list[str]:
    """One bullet a fact; a fact that differs between records is listed whole."""

    def distinct(texts: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(texts))

    versions = (", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in records)
    return [
        f"corpus sha256: {distinct(r.corpus_sha256 for r in records)}",
        f"hardware: {distinct(r.hardware for r in records)}",
        f"versions: {distinct(versions)}",
        f"commit: {distinct(r.git_commit for r in records)}",
    ]
