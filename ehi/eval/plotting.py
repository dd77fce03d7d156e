"""What the figures share: axes, scales, the styles and the names of lines."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ehi.eval.records import atomic_write

# Okabe and Ito's palette, readable with any colour vision; yellow left out, too pale on
# white. Beyond seven systems colours repeat, markers go on.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*<>p"


def new_axes(title: str) -> tuple[Figure, Axes]:
    """A figure of nDCG@10 and its axes."""
    # Figure and canvas without pyplot: no global state, no display.
    figure = Figure(figsize=(7.5, 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_ylabel("nDCG@10")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def exact_line(axes: Axes, name: str, ndcg: float) -> tuple[float, str, str]:
    """Draw the horizontal line of an exhaustive search; return its label."""
    axes.axhline(ndcg, color="#555555", linestyle="--", linewidth=1.2, zorder=1)
    return ndcg, name, "#555555"


def styles() -> Iterator[dict[str, Any]]:
    """Colour and marker of one line after the other."""
    for i in range(len(COLOURS) * len(MARKERS)):
        yield {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 5,
            "linewidth": 1.6,
            "clip_on": False,
            "zorder": 3,
        }


def percent_axis(axes: Axes, visited: Sequence[float]) -> None:
    """A logarithmic x axis in percent, from where `visited` (shares) begin."""
    axes.set_xscale("log")
    ticks = (0.5, 1, 2, 5, 10, 20, 50, 100)
    left = 100 * min(visited, default=0.01)
    axes.set_xlim(max(tick for tick in ticks if tick <= max(left, 0.5)), 103)
    _set_ticks(axes, ticks, [f"{tick:g}%" for tick in ticks])
    axes.set_xlabel("documents visited")


def bytes_axis(axes: Axes, compression_of: Mapping[float, float]) -> None:
    """A logarithmic x axis in bytes, whose ticks say the compression as well."""
    axes.set_xscale("log")
    axes.margins(x=0.1)
    _set_ticks(axes, *_byte_ticks(compression_of))
    axes.set_xlabel("bytes per document (compression)")


def _byte_ticks(compression_of: Mapping[float, float]) -> tuple[list, list[str]]:
    """Sizes at least 15% apart, the smaller of two close ones kept."""
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
    """Name the lines right of the plot, spread out so that no two names touch.

    Args:
        axes: with all lines drawn.
        labels: (y, name, colour[, x]) of the end of each line; x defaults to the edge.
    """
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label[0])
    wanted = np.array([(label[0] - low) / (high - low) for label in labels])
    places = spread(wanted, gap=0.055)
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
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.5},
        )


def spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Places closest to the wanted ones (sorted) that are at least `gap` apart.

    With u_i = place_i - i gap the condition is that u does not decrease: isotonic
    regression, solved by pooling adjacent violators.
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
    """Write a PNG file at once."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    atomic_write(path, buffer.getvalue())
