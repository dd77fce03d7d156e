"""The figures of a report: what effectiveness costs in work and in memory."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ehi.eval.plotting import (
    bytes_axis,
    exact_line,
    label_ends,
    new_axes,
    percent_axis,
    save,
    styles,
)
from ehi.eval.records import Record

Curve = Sequence[tuple[float, float]]


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
    """Draw nDCG@10 against bytes per document, one line a system and visit budget.

    Seeds are averaged. Exhaustive searches of raw vectors (budget 'flat') are lines
    across; searches of raw vectors that visit a part of the documents are left out:
    they differ in work, not in bytes.

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
    """Draw rows of a paper table: one point a budget, bars of the seeds' deviation.

    Records that do not know what the x axis shows are left out.

    Args:
        path: of the PNG file.
        rows: label -> records of all its budgets and seeds.
        across: the x axis, 'docs_visited' or 'bytes_per_doc'.
        exact: label -> records of an exhaustive search, drawn as a horizontal line.
        title: of the figure.

    Raises:
        ValueError: `across` is neither of the two.
    """
    if across not in ("docs_visited", "bytes_per_doc"):
        raise ValueError(
            f"across is {across!r}; allowed: 'docs_visited', 'bytes_per_doc'"
        )
    figure, axes = new_axes(title)
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
        if across == "docs_visited":
            x = 100 * x
        axes.errorbar(x, ndcg, yerr=deviation, capsize=2, elinewidth=0.8, **style)
        labels.append((float(ndcg[-1]), name, style["color"], float(x[-1])))
        drawn += known
    if across == "docs_visited":
        percent_axis(axes, [record.docs_visited for record in drawn])
    else:
        bytes_axis(axes, {r.bytes_per_doc: r.compression for r in drawn})
    label_ends(axes, labels)
    save(figure, path)


def _points(records: Iterable[Record], across: str) -> np.ndarray:
    """(budgets, 3): x, mean nDCG@10, its sample deviation (0 of one seed), x sorted."""
    by_budget: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        point = (getattr(record, across), record.ndcg_at_10)
        by_budget.setdefault(record.budget, []).append(point)
    points = []
    for found in by_budget.values():
        x, ndcg = np.array(found).T
        points.append((x.mean(), ndcg.mean(), ndcg.std(ddof=1) if len(x) > 1 else 0.0))
    return np.array(sorted(points))
