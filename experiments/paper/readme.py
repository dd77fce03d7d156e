"""The parts of README.md that show records: two small tables and two figures.

The table of results is the part of T3 that a newcomer needs; the figures are T1 and T2
with fewer rows. The full tables are in `experiments/results/README.md`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ehi.eval.figures import bytes_axis, percent_axis, save
from ehi.eval.records import Record
from ehi.eval.tables import Number, Table, markdown, means_only
from ehi.files import atomic_write
from experiments.paper.contest import older_rows
from experiments.paper.definitions import TABLES, budgets_of
from experiments.paper.fill import NOT_RUN
from experiments.paper.results import SCORED, Results, recipes_of

DATASETS = {"pydocs": "pydocs", "scifact": "SciFact"}  # record -> shown

SYSTEMS = ("scann", "faiss-opq-ivfpq", "kmeans-tree-opq", "distill-vq", "ehi-pq")
OURS, PEERS = "ehi-pq", ("jpq", "repconc", "distill-vq", "poeem")
ORDER = "flat-64x"  # where the papers' orders are checked
BUDGETS = {  # column of T3 -> shown
    "visit-5-64x": "5%, 64x",
    "visit-10-32x": "10%, 32x",
    "visit-10-64x": "10%, 64x",
    "visit-10-128x": "10%, 128x",
}

# Figure -> (its paper table, quantity on the x axis, its rows).
FIGURES = {
    "visited": (
        "T1",
        "docs_visited",
        ("scann", "faiss-ivf", "faiss-hnsw", "kmeans-tree", "jtr", "ehi"),
    ),
    "bytes": (
        "T2",
        "bytes_per_doc",
        ("scann", "faiss-opq", "opq", "jpq", "distill-vq", "ehi-pq"),
    ),
}
# Separate rows are dashed and joint ones solid; the two of ours have the same look.
LOOKS = {
    "scann": ("#999999", "v", "--"),
    "faiss-ivf": ("#E69F00", "s", "--"),
    "faiss-opq": ("#E69F00", "s", "--"),
    "faiss-hnsw": ("#000000", "P", "--"),
    "kmeans-tree": ("#0072B2", "D", "--"),
    "opq": ("#0072B2", "D", "--"),
    "jtr": ("#009E73", "^", "-"),
    "jpq": ("#CC79A7", "X", "-"),
    "distill-vq": ("#009E73", "^", "-"),
    "ehi": ("#D55E00", "o", "-"),
    "ehi-pq": ("#D55E00", "o", "-"),
}


def summary(results: Mapping[str, Results], grids: Mapping[str, Table]) -> str:
    """Markdown of the small table, with a sentence on what its numbers mean.

    Args:
      results: of each dataset; those that `DATASETS` does not name are left out.
      grids: T3 of each dataset, rows by budgets.
    """
    shown = {name: results[name] for name in DATASETS if name in results}
    kinds = {row.label: row.kind for row in TABLES["T3"].rows}
    cells: dict[str, list] = {system: [system, kinds[system]] for system in SYSTEMS}
    header, numbers = ["system", "kind"], []
    for name in shown:
        rows = {row[0]: row for row in grids[name].rows}
        for system in SYSTEMS:
            for budget in BUDGETS:
                column = grids[name].header.index(budget)
                cell = rows[system][column] if system in rows else NOT_RUN
                cells[system].append(cell)
                numbers += [cell] * isinstance(cell, Number)
        header += [f"{DATASETS[name]} {words}" for words in BUDGETS.values()]
    rows = tuple(map(tuple, cells.values()))
    table = means_only(Table("summary", tuple(header), rows, (), 2), ".3f")
    words = " ".join([*_meaning(shown, numbers), *_scoring(shown), *_orders(shown)])
    return f"{markdown(table)}\n\n{words}"


def _meaning(shown: Mapping[str, Results], numbers: Sequence[Number]) -> Iterator[str]:
    """What the numbers of the small table are."""
    records = [record for found in shown.values() for record in _records(found)]
    seeds = {record.seed for record in records}
    equal = ", all at equal work" if any(r.work for r in records) else ""
    yield (
        f"nDCG@10, test split, mean of {len(seeds)} seeds; the standard deviation is "
        f"at most {max((n.deviation or 0 for n in numbers), default=0):.3f}. Columns: "
        "documents visited, and compression of their vectors. Italic: best separate "
        "system in the full table (T3); bold: best joint one; † better, ‡ worse than "
        f"the best separate one with p < 0.05{equal}."
    )
    if any("§" in number.sign for number in numbers):
        yield "§ takes over a tenth more bytes than its column names."
    exact = " and ".join(
        f"{np.mean([r.ndcg_at_10 for r in ours]):.3f} on {DATASETS[name]}"
        for name, found in shown.items()
        if (ours := found.records.get(("dense", "", "flat")))
    )
    if exact:
        yield f"Exact search of uncompressed vectors: {exact}."


def _scoring(shown: Mapping[str, Results]) -> Iterator[str]:
    """How the codes of the small table were scored."""
    records = [record for found in shown.values() for record in _records(found)]
    older = [record for record in records if record.recipe < SCORED]
    if not older:
        yield "Codes are scored as each system chose on dev."
    elif len(older) == len(records):
        yield f"Codes are scored by inner product ({recipes_of(older)})."
    else:
        old = [DATASETS[n] for n in shown if any(r.dataset == n for r in older)]
        yield (
            f"Codes of {' and '.join(old)} are scored by inner product "
            f"({recipes_of(older)}), the others as each system chose on dev."
        )


def _orders(shown: Mapping[str, Results]) -> Iterator[str]:
    """Say where a published method is above ours, which the small table hides."""
    for name, found in shown.items():
        means = {
            system: np.mean([r.ndcg_at_10 for r in records])
            for system in (OURS, *PEERS)
            if (records := found.records.get((system, "", ORDER)))
        }
        above = [s for s in means if OURS in means and means[s] > means[OURS]]
        if above:
            peers = " and ".join(f"{system} ({means[system]:.3f})" for system in above)
            verb = "are" if len(above) > 1 else "is"
            yield (
                f"On {DATASETS[name]} at 64x with every document scored, {peers} "
                f"{verb} above {OURS} ({means[OURS]:.3f})."
            )


def _records(results: Results) -> list[Record]:
    """The records that the small table shows."""
    cells = ((system, "", budget) for system in SYSTEMS for budget in BUDGETS)
    return [record for cell in cells for record in results.records.get(cell, ())]


def draw_figures(folder: Path, results: Mapping[str, Results]) -> list[Path]:
    """Draw `visited.png` and `bytes.png`: a panel for each dataset.

    Args:
      folder: where the files go.
      results: of each dataset; those that `DATASETS` does not name are left out.

    Returns:
      Paths of the files.
    """
    shown = {name: results[name] for name in DATASETS if name in results}
    written = []
    for name, (table, across, systems) in FIGURES.items():
        figure = Figure(figsize=(9.6, 3.7), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (dataset, found) in zip(panels, shown.items(), strict=True):
            _draw_panel(axes, DATASETS[dataset], table, across, systems, found)
        panels[0].set_ylabel("nDCG@10")
        named = {
            label: handle
            for axes in panels
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(named.values(), named, loc="outside right center", frameon=False)
        written.append(folder / f"{name}.png")
        save(figure, written[-1])
    return written


def _draw_panel(axes, title, table, across, systems, results: Results) -> None:
    """One dataset: a line for each system, a dashed one across for exact search."""
    exact = results.records.get(("dense", "", "flat"), ())
    if exact:
        level = float(np.mean([record.ndcg_at_10 for record in exact]))
        axes.axhline(level, color="#555555", linestyle=":", label="exact search")
    rows = {row.label: row for row in TABLES[table].rows}
    drawn: list[Record] = []
    older = older_rows(TABLES[table], results)
    for system in systems:
        budgets = budgets_of(TABLES[table], rows[system]).values()
        found = [results.of(rows[system], budget) for budget in budgets]
        known = [records for records in found if records]
        if not known:
            continue
        mark = f" ({recipes_of(known[0])})" if rows[system] in older else ""
        drawn += [record for records in known for record in records]
        points = sorted(_mean(records, across) for records in known)
        colour, marker, line = LOOKS[system]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=5,
            linewidth=2.2 if system.startswith("ehi") else 1.4,
            zorder=4 if system.startswith("ehi") else 3,
            label=system + mark,
        )
    if across == "docs_visited":
        percent_axis(axes, [record.docs_visited for record in drawn])
    else:
        bytes_axis(axes, {r.bytes_per_doc: r.compression for r in drawn})
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _mean(records: Sequence[Record], across: str) -> tuple[float, float]:
    """Means over the seeds: what the x axis shows (shares in percent), and nDCG@10."""
    factor = 100 if across == "docs_visited" else 1
    x = factor * np.mean([getattr(record, across) for record in records])
    return float(x), float(np.mean([record.ndcg_at_10 for record in records]))


# Row of the table of speed -> (system in the record without the library, measured).
SPEED = {
    "raw vectors, in batches": ("raw", "batch"),
    "PQ codes, in batches": ("pq", "batch"),
    "PQ codes, one query at a time": ("pq", "single"),
}
SPEED_PROBES = 8  # leaves visited


def speed(path: Path) -> str:
    """Markdown of the table of speed beside Faiss, and what was measured.

    Args:
      path: record of `experiments.benchmark search`, with faiss among its peers.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    measured = record["mixture"]
    found = {
        system["system"]: system
        for system in measured["systems"]
        if system.get("probes") == SPEED_PROBES
    }

    def qps(library: str, leaves: str, how: str) -> float:
        system = found[f"{library} {leaves}"]
        return system["qps_single"] if how == "single" else system["qps_batch"]["1"]

    lines = ["| queries/s | ehi | Faiss | ratio |", "| :-- | --: | --: | --: |"]
    for words, (leaves, how) in SPEED.items():
        ours, theirs = qps("ehi", leaves, how), qps("faiss", leaves, how)
        ratio = f"{ours / theirs:.2g}"
        lines.append(f"| {words} | {ours:,.0f} | {theirs:,.0f} | {ratio} |")
    words = (
        f"{record['hardware']}, one thread, NumPy {record['versions']['numpy']}, "
        f"faiss-cpu {record['versions']['faiss-cpu']}; {measured['documents']:,} "
        f"vectors of width {measured['width']}, {SPEED_PROBES} of {measured['lists']} "
        f"leaves visited, batches of {measured['queries']:,}, the same lists and codes "
        "in both."
    )
    return "\n".join(lines) + f"\n\n{words}"


def fill_blocks(path: Path, blocks: Mapping[str, str]) -> None:
    """Put generated text between the markers of a file.

    Args:
      path: has `<!-- NAME:begin -->` and `<!-- NAME:end -->` of one block or more.
      blocks: NAME -> text.

    Raises:
      ValueError: the file has no block, or not both markers of one, in order, once
        each.
    """
    content = path.read_text(encoding="utf-8")
    names = [name for name in blocks if f"<!-- {name}:" in content]
    if not names:
        markers = " or ".join(f"<!-- {name}:begin -->" for name in blocks)
        raise ValueError(f"{path} has no line {markers}")
    for name in names:
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = content.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed or begin in rest or end in before + after:
            raise ValueError(
                f"{path} must have one line {begin} and then one line {end}"
            )
        content = f"{before}{begin}\n{blocks[name]}\n{end}{after}"
    atomic_write(path, content.encode())
