"""Rows at equal work: values by hand between two budgets, and what the tables show."""

import numpy as np
import pytest

from experiments.paper.definitions import TABLES, Row
from experiments.paper.equal_work import EqualWork, Point, at
from experiments.paper.fill import fill
from experiments.paper.results import group

QUERIES = 12


@pytest.fixture
def make_results(make_record):
    """make_results({(system, budget): [(work, nDCG@10) of each seed]}) -> Results"""

    def make(places, **changes):
        records, values = [], {}
        for (system, budget), of_seeds in places.items():
            for seed, (work, ndcg) in enumerate(of_seeds):
                record = make_record(
                    system=system, budget=budget, seed=seed, work=work,
                    ndcg_at_10=ndcg, **changes,
                )  # fmt: skip
                records.append(record)
                values[record.cell] = np.full(QUERIES, ndcg)
        return group(records, values, "test")[0]

    return make


def test_between_two_budgets_the_logarithm_of_work_is_interpolated():
    curve = [Point(0.01, 0.2, np.array([0.0, 0.4])), Point(0.16, 0.6, np.ones(2))]
    middle = at(curve, 0.04)
    assert middle.ndcg == pytest.approx(0.4)
    np.testing.assert_allclose(middle.values, [0.5, 0.7])
    assert at(curve, 0.01) is at(curve, 0.001) is curve[0]
    assert at(curve, 0.16) is at(curve, 9.0) is curve[1]
    assert at([curve[0], curve[0], curve[1]], 0.04).ndcg == pytest.approx(0.4)
    assert at([curve[0], Point(0.16, 0.6, None)], 0.04).values is None


def test_rows_meet_at_the_larger_work_or_the_largest_that_both_reach(make_results):
    equal = EqualWork(
        make_results(
            {
                ("kmeans-tree", "visit-5"): [(0.05, 0.4), (0.05, 0.4)],
                ("kmeans-tree", "visit-10"): [(0.1, 0.5), (0.1, 0.5)],
                ("ehi", "visit-5"): [(0.08, 0.5), (0.08, 0.5)],
                ("ehi", "visit-10"): [(0.2, 0.6), (0.2, 0.6)],
                # Other bytes are another curve.
                ("ehi", "visit-10-64x"): [(0.4, 0.1), (0.4, 0.1)],
            }
        )
    )
    separate, joint = ("kmeans-tree", "", "visit-5"), ("ehi", "", "visit-5")
    assert equal.common([separate, joint]) == pytest.approx(0.08)
    share = np.log(0.08 / 0.05) / np.log(2)
    expected = 0.4 + 0.1 * share
    assert equal.ndcg(separate, 0.08) == pytest.approx([expected] * 2)
    assert equal.values(separate, 0.08)[1] == pytest.approx(np.full(12, expected))
    # kmeans-tree has no budget above 10%.
    wider = [("kmeans-tree", "", "visit-10"), ("ehi", "", "visit-10")]
    assert equal.common(wider) == pytest.approx(0.1)
    assert equal.least(joint) == 0.08 and equal.most(joint) == 0.2


def test_rows_without_a_common_work_are_compared_as_they_are(make_results):
    # ehi does 24% at 1% visited, more than Faiss at any budget: nobody would use that.
    results = make_results(
        {
            ("faiss-ivf", "visit-5"): [(0.15, 0.40)] * 3,
            ("faiss-ivf", "visit-10"): [(0.20, 0.45)] * 3,
            ("ehi", "visit-1"): [(0.24, 0.10)] * 3,
            ("ehi", "visit-5"): [(0.28, 0.60)] * 3,
        }
    )
    places = ("faiss-ivf", "", "visit-5"), ("ehi", "", "visit-5")
    assert EqualWork(results).common(places) is None
    line = shown(fill(TABLES["T1"], results).wide)["ehi", "visit-5"]
    assert line["best separate"] == "faiss-ivf (28.0% to 15.0%)"
    assert line["difference"] == "+0.2000"


def test_rows_that_score_every_document_are_compared_as_they_are(make_results):
    # poeem is below opq at 10% visited, and routes on top of a whole search.
    results = make_results(
        {
            ("opq", "flat-64x"): [(1.1, 0.50)] * 3,
            ("poeem", "visit-10-64x"): [(0.3, 0.10)] * 3,
            ("poeem", "flat-64x"): [(1.4, 0.60)] * 3,
        }
    )
    line = shown(fill(TABLES["T2"], results).wide)["poeem", "flat-64x"]
    assert line["best separate"] == "opq (140.0% to 110.0%)"
    assert line["difference"] == "+0.1000"


def test_without_the_work_of_every_record_rows_stand_as_they_are(
    make_results, make_record
):
    results = make_results({("ehi", "visit-5"): [(0.1, 0.5)]})
    older = make_record(system="kmeans-tree", budget="visit-5")
    results.records["kmeans-tree", "", "visit-5"] = [older]
    equal = EqualWork(results)
    assert equal.common([("ehi", "", "visit-5"), older.cell[:2] + ("visit-5",)]) is None


def shown(table):
    """Rows of a table as header -> text, by their first two columns."""
    return {
        (row[0], row[1]): dict(zip(table.header, map(str, row), strict=True))
        for row in table.rows
    }


def test_a_row_that_only_works_more_is_no_better(make_results):
    # At 5% visited ehi is ahead by .02 and does the work that kmeans-tree does at 10%.
    results = make_results(
        {
            ("kmeans-tree", "visit-5"): [(0.06, 0.40)] * 3,
            ("kmeans-tree", "visit-10"): [(0.12, 0.50)] * 3,
            ("faiss-ivf", "visit-5"): [(0.05, 0.41)] * 3,
            ("faiss-ivf", "visit-10"): [(0.10, 0.42)] * 3,
            ("jtr", "visit-5"): [(0.07, 0.30)] * 3,
            ("ehi", "visit-5"): [(0.12, 0.43)] * 3,
            ("ehi", "visit-10"): [(0.24, 0.55)] * 3,
        }
    )
    filled = fill(TABLES["T1"], results)
    grid, _, by_work, *_ = filled.short
    details = filled.wide
    line = shown(details)["ehi", "visit-5"]
    assert line["best separate"] == "kmeans-tree at work 12.0%"
    assert line["difference"] == "-0.0700" and line["signs"] == "---"
    # The work of jtr is known at 7% only; ehi never does less than 12%.
    assert line["best joint peer"] == "jtr (12.0% to 7.0%)"
    assert (line["to peer"], line["peer signs"]) == ("+0.1300", "+++")
    assert line["work %"] == "12.0"
    peer = shown(details)["jtr", "visit-5"]
    assert peer["best joint peer"] == "ehi (7.0% to 12.0%)"
    columns = {row[0]: dict(zip(grid.header, row, strict=True)) for row in grid.rows}
    assert columns["ehi"]["visit-5"].sign == "‡"
    # Among themselves the separate rows meet at 6%.
    assert columns["faiss-ivf"]["visit-5"].style == "italic"
    assert columns["kmeans-tree"]["visit-10"].style == "italic"
    columns = {r[0]: dict(zip(by_work.header, r, strict=True)) for r in by_work.rows}
    assert columns["ehi"]["work 10%"] is None  # it never does so little
    share = np.log(0.20 / 0.12) / np.log(2)
    assert columns["ehi"]["work 20%"].value == pytest.approx(0.43 + 0.12 * share)
    assert columns["kmeans-tree"]["work 10%"].deviation == pytest.approx(0)


def test_joint_rows_are_tested_against_the_other_side(make_results):
    ndcg = {"opq": 0.4, "jpq": 0.5, "repconc": 0.45, "joint-pq": 0.6, "ehi-pq": 0.55}
    results = make_results({(s, "flat-64x"): [(1.1, v)] for s, v in ndcg.items()})
    details = shown(fill(TABLES["T2"], results).wide)
    rivals = {
        system: details[system, "flat-64x"]["best joint peer"]
        for system in ndcg
        if system != "opq"
    }
    assert rivals == {
        "jpq": "joint-pq at work 110.0%",
        "repconc": "joint-pq at work 110.0%",
        "joint-pq": "jpq at work 110.0%",
        "ehi-pq": "jpq at work 110.0%",
    }
    assert details["opq", "flat-64x"]["best joint peer"] == "None"


def test_rows_of_codes_are_shown_at_equal_work_of_the_same_bytes(make_results):
    results = make_results(
        {
            ("kmeans-tree-opq", "visit-5-64x"): [(0.1, 0.5)] * 2,
            ("kmeans-tree-opq", "visit-10-64x"): [(0.2, 0.6)] * 2,
            ("ehi-pq", "visit-5-64x"): [(0.2, 0.58)] * 2,
            ("ehi-pq", "visit-10-64x"): [(0.4, 0.7)] * 2,
            ("ehi-pq", "visit-5-32x"): [(0.2, 0.9)] * 2,
        }
    )
    grid, _, by_work = fill(TABLES["T3"], results).short
    assert by_work.title.endswith("between the budgets of 64x")
    columns = {r[0]: dict(zip(by_work.header, r, strict=True)) for r in by_work.rows}
    assert columns["ehi-pq"]["work 10%"] is None
    assert columns["ehi-pq"]["work 20%"].value == pytest.approx(0.58)
    assert columns["kmeans-tree-opq"]["work 20%"].value == pytest.approx(0.6)


def test_published_systems_are_those_of_others():
    assert Row("ehi-pq").own and not Row("ehi", "paper").own and not Row("jpq").own
