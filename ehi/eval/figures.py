"""The figures of a report: what effectiveness costs in work and in memory."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ehi.eval.records import Record
from ehi.files import atomic_write

# Points (share of documents visited, nDCG@10).
Curve = Sequence[tuple[float, float]]

# Okabe and Ito's palette is readable with any colour vision. Its yellow is too pale on
# white and left out. From the eighth system on, colours repeat with new markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*<>p"
LABEL_GAP = 0.21  # inches between the names of two lines
# Share of the corpus on an x axis -> its label.
_SHARES = {
    "docs_visited": "documents visited",
    "work": "work of a query, of that of scoring all documents",
}


def figure_visited(
    path: str | Path,
    curves: Mapping[str, Curve],
    *,
    exact: Mapping[str, float],
    title: str = "",
) -> None:
    """Draw nDCG@10 against the share of documents visited.

    Args:
        path: of the PNG file.
        curves: name -> points (share of documents visited, nDCG@10).
        exact: name -> nDCG@10 of an exhaustive search, drawn as a horizontal line.
        title: of the figure.
    """
    figure, axes = new_axes(title)
    labels = []
    for style, (name, points) in zip(styles(), curves.items(), strict=False):
        visited, ndcg = np.array(sorted(points)).T
        axes.plot(100 * visited, ndcg, **style)
        labels.append((float(ndcg[-1]), name, style["color"]))
    labels += [exact_line(axes, f"{name}, exact", ndcg) for name, ndcg in exact.items()]
    percent_axis(axes, [v for points in curves.values() for v, _ in points])
    label_ends(axes, labels)
    save(figure, path)


def figure_bytes(
    path: str | Path, records: Iterable[Record], *, title: str = ""
) -> None:
    """Draw nDCG@10 against bytes per document: a line for each system and visit budget.

    Seeds are averaged. Exhaustive searches of raw vectors (budget 'flat') are
    horizontal lines. Searches of raw vectors that visit a part of the documents are
    left out: they differ in work, not in bytes.

    Args:
        path: of the PNG file.
        records: of one dataset and split.
        title: of the figure.
    """
    points: dict[str, dict[float, list[float]]] = {}
    exact: dict[str, list[float]] = {}
    compression_of = {}
    for record in records:
        name = ":".join(part for part in (record.system, record.variant) if part)
        visit = re.fullmatch(r"visit-([\d.]+)(-.*)?", record.budget)
        if record.budget == "flat":
            name += f", {record.bytes_per_doc:.4g} bytes"
            exact.setdefault(name, []).append(record.ndcg_at_10)
        elif not visit or visit[2]:
            name += f", {visit[1]}% visited" if visit else ""
            by_bytes = points.setdefault(name, {})
            by_bytes.setdefault(record.bytes_per_doc, []).append(record.ndcg_at_10)
            compression_of[record.bytes_per_doc] = record.compression
    figure, axes = new_axes(title)
    labels = [exact_line(axes, name, float(np.mean(v))) for name, v in exact.items()]
    for style, (name, by_bytes) in zip(styles(), points.items(), strict=False):
        size = sorted(by_bytes)
        ndcg = [float(np.mean(by_bytes[b])) for b in size]
        if "% visited" in name:
            style |= {"markerfacecolor": "white", "linestyle": ":"}
        axes.plot(size, ndcg, **style)
        labels.append((ndcg[-1], name, style["color"], size[-1]))
    bytes_axis(axes, compression_of)
    label_ends(axes, labels)
    save(figure, path)


def figure_rows(
    path: str | Path,
    rows: Mapping[str, Sequence[Record]],
    *,
    across: str,
    exact: Mapping[str, Sequence[Record]],
    title: str = "",
) -> None:
    """Draw rows of a paper table, a point for each budget with its seeds' deviation.

    Records without a value for the x axis are left out.

    Args:
        path: of the PNG file.
        rows: label -> records of all its budgets and seeds.
        across: the x axis, 'docs_visited', 'work' or 'bytes_per_doc'.
        exact: label -> records of an exhaustive search, drawn as a horizontal line.
        title: of the figure.

    Raises:
        ValueError: `across` is none of the three.
    """
    if across not in (*_SHARES, "bytes_per_doc"):
        raise ValueError(
            f"across is {across!r}; allowed: 'docs_visited', 'work', 'bytes_per_doc'"
        )
    figure, axes = new_axes(title, lines=len(rows) + len(exact))
    labels = [
        exact_line(
            axes, f"{name}, exact", float(np.mean([r.ndcg_at_10 for r in found]))
        )
        for name, found in exact.items()
        if found
    ]
    drawn = []
    for style, (name, found) in zip(styles(), rows.items(), strict=False):
        known = [record for record in found if getattr(record, across) is not None]
        if not known:
            continue
        x, ndcg, deviation = _points(known, across).T
        if across in _SHARES:
            x = 100 * x
        axes.errorbar(x, ndcg, yerr=deviation, capsize=2, elinewidth=0.8, **style)
        labels.append((float(ndcg[-1]), name, style["color"], float(x[-1])))
        drawn += known
    if across in _SHARES:
        shares = [getattr(record, across) for record in drawn]
        percent_axis(axes, shares, _SHARES[across])
    else:
        bytes_axis(axes, {r.bytes_per_doc: r.compression for r in drawn})
    label_ends(axes, labels)
    save(figure, path)


def _points(records: Iterable[Record], across: str) -> np.ndarray:
    """(budgets, 3): x, mean nDCG@10 and its sample deviation (0 for one seed), by x."""
    by_budget: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        point = (getattr(record, across), record.ndcg_at_10)
        by_budget.setdefault(record.budget, []).append(point)
    points = []
    for found in by_budget.values():
        x, ndcg = np.array(found).T
        points.append((x.mean(), ndcg.mean(), ndcg.std(ddof=1) if len(x) > 1 else 0.0))
    return np.array(sorted(points))


def new_axes(title: str, lines: int = 0) -> tuple[Figure, Axes]:
    """Make a figure of nDCG@10 and its axes, high enough for the names of its lines."""
    # pyplot would need global state and a display.
    size = (7.5, max(4.4, 0.8 + LABEL_GAP * lines))
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_ylabel("nDCG@10")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def exact_line(axes: Axes, name: str, ndcg: float) -> tuple[float, str, str]:
    """Draw the horizontal line of an exhaustive search and return its label."""
    axes.axhline(ndcg, color="#555555", linestyle="--", linewidth=1.2, zorder=1)
    return ndcg, name, "#555555"


def styles() -> Iterator[dict[str, Any]]:
    """Yield the colour and marker of each line in turn."""
    for i in range(len(COLOURS) * len(MARKERS)):
        yield {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 5,
            "linewidth": 1.6,
            "clip_on": False,
            "zorder": 3,
        }


def percent_axis(
    axes: Axes, shares: Sequence[float], label: str = "documents visited"
) -> None:
    """Make the x axis logarithmic, in percent, with room for all of the shares."""
    axes.set_xscale("log")
    ticks = (0.5, 1, 2, 5, 10, 20, 50, 100)
    left, right = (100 * of(shares, default=0.01) for of in (min, max))
    left = max(tick for tick in ticks if tick <= max(left, 0.5))
    axes.set_xlim(left, 1.03 * max(right, 100))
    _set_ticks(axes, ticks, [f"{tick:g}%" for tick in ticks])
    axes.set_xlabel(label)


def bytes_axis(axes: Axes, compression_of: Mapping[float, float]) -> None:
    """Make the x axis logarithmic, in bytes; its ticks also name the compression."""
    axes.set_xscale("log")
    axes.margins(x=0.1)
    _set_ticks(axes, *_byte_ticks(compression_of))
    axes.set_xlabel("bytes per document (compression)")


def _byte_ticks(compression_of: Mapping[float, float]) -> tuple[list, list[str]]:
    """Ticks at least 15% apart; of two close sizes the smaller one is kept."""
    ticks: list[float] = []
    for size in sorted(compression_of):
        if not ticks or size > 1.15 * ticks[-1]:
            ticks.append(size)
    return ticks, [f"{size:.4g}\n({compression_of[size]:.3g}x)" for size in ticks]


def _set_ticks(axes: Axes, ticks: Sequence[float], labels: Sequence[str]) -> None:
    low, high = axes.get_xlim()
    inside = [(t, x) for t, x in zip(ticks, labels, strict=True) if low <= t <= high]
    axes.set_xticks(*zip(*inside, strict=True) if inside else ([], []))
    axes.minorticks_off()


def label_ends(axes: Axes, labels: Sequence[tuple]) -> None:
    """Write the names of the lines right of the plot, so that no two names touch.

    Args:
        axes: axes with all lines drawn.
        labels: (y, name, colour[, x]) of each line's end; x defaults to the edge.
    """
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label[0])
    wanted = np.array([(label[0] - low) / (high - low) for label in labels])
    height = axes.figure.get_figheight() - 0.8  # without title and ticks
    places = spread(wanted, gap=LABEL_GAP / height)
    if len(places):  # inside of the plot, from the top down
        places -= max(0.0, places[-1] - 1.0)
    for (y, name, colour, *x), place in zip(labels, places, strict=True):
        at_data = (x[0], y) if x else (1.0, y)
        axes.annotate(
            name,
            xy=at_data,
            xycoords="data" if x else axes.get_yaxis_transform(),
            xytext=(1.04, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            arrowprops={
                "arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.5,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Find the places nearest to `wanted` (sorted) that are at least `gap` apart.

    Let u_i = place_i - i gap. Then u must not decrease, which is isotonic regression;
    pooling adjacent violators solves it.
    """
    blocks: list[tuple[float, int]] = []  # (mean, size)
    for i, place in enumerate(wanted):
        mean, size = place - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean = (mean * size + before * count) / (size + count)
            size += count
        blocks.append((mean, size))
    steady = np.concatenate([np.full(size, mean) for mean, size in blocks] or [[]])
    return steady + gap * np.arange(len(wanted))


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG file in one piece."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    atomic_write(path, buffer.getvalue())
