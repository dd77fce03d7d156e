import csv
import io

import pytest

from ehi.eval.tables import Number, Table, latex, markdown, means_only, to_csv

TABLE = Table(
    "100% of a_b",
    ("system", "nDCG@10", "p"),
    (
        ("a|b & c", Number.mean([0.5, 0.7], ".3f", style="bold", sign="†"), None),
        ("d", Number(0.25, style="italic"), Number(2e-5, spec=".3f", floor=1e-3)),
        ("e", "not run", None),
    ),
    ("made by `run --seeds=3`.",),
)


def test_number_as_text():
    assert str(Number.mean([0.5, 0.7])) == "0.6000 ± 0.1414"
    assert str(Number.mean([0.5])) == "0.5000"
    assert str(Number(0.01, 0.002, "+.3f")) == "+0.010 ± 0.002"
    assert str(Number(0.0009, spec=".3f", floor=1e-3)) == "<0.001"
    assert str(Number(0.0011, spec=".3f", floor=1e-3)) == "0.001"


def test_markdown():
    assert markdown(TABLE).splitlines() == [
        "| system | nDCG@10 | p |",
        "| :-- | --: | --: |",
        r"| a\|b & c | **0.600 ± 0.141**† | - |",
        "| d | *0.2500* | <0.001 |",
        "| e | not run | - |",
        "",
        "- made by `run --seeds=3`.",
    ]


def test_csv_has_numbers_in_full_and_deviations_apart():
    rows = list(csv.DictReader(io.StringIO(to_csv(TABLE))))
    assert [row["system"] for row in rows] == ["a|b & c", "d", "e"]
    assert [row["nDCG@10"] for row in rows] == ["0.6", "0.25", "not run"]
    assert [row["nDCG@10 sd"] for row in rows] == ["0.141421", "", ""]
    assert [row["p"] for row in rows] == ["", "2e-05", ""]


def test_latex_escapes_what_it_must():
    text = latex(TABLE)
    assert r"\caption{100\% of a\_b}" in text
    assert r"a|b \& c & \textbf{0.600 $\pm$ 0.141}$^\dagger$ & -- \\" in text
    assert r"d & \emph{0.2500} & $<$0.001 \\" in text
    assert r"made by \texttt{run -{}-seeds=3}." in text
    assert text.count("{") == text.count("}")


def test_means_only_keeps_marks():
    cell = means_only(TABLE, ".2f").rows[0][1]
    assert (str(cell), cell.style, cell.sign) == ("0.60", "bold", "†")


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="row 'a' has 1 cells, the header has 2"):
        Table("t", ("x", "y"), (("a",),))
