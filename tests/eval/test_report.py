import io

import numpy as np
import pytest
from rich.console import Console

from ehi.eval.figures import figure_bytes, figure_visited, spread
from ehi.eval.report import HEADER, print_table, table_rows, write_report
from ehi.eval.significance import Comparison, row_of

CURVES = {"ehi": [(0.02, 0.4), (1.0, 0.6)], "kmeans-tree": [(0.02, 0.3), (1.0, 0.6)]}


@pytest.fixture
def rows(make_record):
    """records of an ehi row and its counterpart, and their comparison"""
    records = [make_record(system="kmeans-tree", ndcg_at_10=0.45), make_record()]
    comparison = Comparison("kmeans-tree", 0.05, 1e-4, 2e-4, (0,), (1,))
    return records, {row_of(records[1].cell): comparison}


def test_row_shows_the_record(rows):
    shown = [dict(zip(HEADER, row, strict=True)) for row in table_rows(*rows)]
    assert shown[0]["vs separate"] == shown[0]["p"] == "-"
    assert shown[1] == {
        "system": "ehi",
        "budget": "visit-10",
        "nDCG@10": "0.5000",
        "RR@10": "0.4000",
        "R@100": "0.8000",
        "visited %": "9.9",
        "work %": "-",  # an older record
        "bytes/doc": "1536",
        "p50 ms": "0.25",
        "queries/s": "12,346",
        "train s": "33",
        "vs separate": "+0.0500 +",
        "p": "<0.001",
    }


def test_seeds_are_averaged_with_their_deviation(make_record):
    records = [make_record(seed=s, ndcg_at_10=v) for s, v in ((0, 0.4), (1, 0.6))]
    ((system, seeds, ndcg),) = table_rows(records, {}, ("system", "seeds", "nDCG@10"))
    assert (system, seeds, ndcg) == ("ehi", "2", "0.5000 ± 0.1414")


def test_uncounted_work_is_shown_as_such(make_record):
    record = make_record(docs_visited=None, variant="paper")
    assert table_rows([record], {}, ("system", "visited %")) == [["ehi:paper", "-"]]


@pytest.mark.parametrize("terminal, width", [(False, 80), (True, 60)])
def test_terminal_table_cuts_nothing(rows, terminal, width):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width)
    print_table(*rows, console=console)
    text = file.getvalue()
    assert "…" not in text
    assert "ehi with kmeans-tree" in text
    if not terminal:
        for row in table_rows(*rows):
            assert all(cell in text for cell in row)


def test_report_names_table_figures_and_provenance(rows, tmp_path):
    path = write_report(
        tmp_path, *rows, curves=CURVES, exact={"dense": 0.6}, notes=["a note of data"]
    )
    text = path.read_text()
    for row in table_rows(*rows):
        assert f"| {' | '.join(row)} |" in text
    for part in ("ab" * 32, "2 cores", "python 3.11.7", "a note of data", "codebooks"):
        assert part in text
    for name in ("visited.png", "bytes.png"):
        assert f"]({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_figures_accept_a_single_point_and_no_curve(tmp_path, make_record):
    figure_visited(tmp_path / "a.png", {}, exact={"dense": 0.6})
    figure_visited(tmp_path / "b.png", {"ehi": [(0.001, 0.2)]}, exact={})
    figure_bytes(tmp_path / "c.png", [make_record(budget="flat")])
    figure_bytes(tmp_path / "d.png", [make_record(budget="flat-64x", bytes_per_doc=24)])
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_labels_are_spread_as_little_as_needed():
    wanted = np.array([0.0, 0.5, 0.5, 0.52, 1.0])
    places = spread(wanted, gap=0.1)
    assert (np.diff(places) >= 0.1 - 1e-12).all()
    np.testing.assert_allclose(places[[0, 4]], wanted[[0, 4]])
    assert places[1:4].mean() == pytest.approx(wanted[1:4].mean())
    assert spread(np.array([]), 0.1).shape == (0,)
