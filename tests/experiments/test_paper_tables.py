import dataclasses
import types

import numpy as np
import pytest

from ehi.eval.figures import figure_rows
from ehi.eval.records import Record
from ehi.eval.tables import Number
from experiments.ablations import apply_variant
from experiments.configs.base import get_config
from experiments.paper import definitions
from experiments.paper.definitions import TABLES, Row, cells, rows_of
from experiments.paper.fill import fill
from experiments.paper.missing import aged, missing
from experiments.paper.published import orders_table, published
from experiments.paper.results import group
from experiments.systems import SYSTEMS, Budget, config_of

QUERIES = 12


@pytest.fixture
def make_results(make_record):
    """make_results({(system, variant, budget): nDCG@10 of each seed}) -> Results"""

    def make(ndcg, **changes):
        records, values = [], {}
        for (system, variant, budget), of_seeds in ndcg.items():
            for seed, mean in enumerate(of_seeds):
                record = make_record(
                    system=system, variant=variant, budget=budget, seed=seed,
                    ndcg_at_10=mean, **changes,
                )  # fmt: skip
                records.append(record)
                values[record.cell] = np.full(QUERIES, mean)
        return group(records, values, "test")[0]

    return make


@pytest.fixture
def variants(monkeypatch):
    """`experiments.ablations` with an ablation of ehi-pq, and one of another system"""

    def variant(systems, note):
        return types.SimpleNamespace(systems=systems, note=note)

    named = {
        "no-path": variant(("ehi", "ehi-pq"), "path loss off"),
        "paper": variant(("ehi",), "as published"),
    }
    monkeypatch.setattr(definitions, "VARIANTS", named)


def shown(table):
    """Rows of a table as header -> text, by their first two columns."""
    return {
        (row[0], row[1]): dict(zip(table.header, map(str, row), strict=True))
        for row in table.rows
    }


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_every_cell_is_a_known_system_at_a_known_budget(table):
    found = cells(table)
    assert found and len(set(found)) == len(found)
    for system, _, budget in found:
        assert system in SYSTEMS
        # A tree may be searched whole, but a system without codes is not compressed.
        assert Budget.parse(budget).compression is None or SYSTEMS[system].pq
    for row in rows_of(table):
        if row.kind == "separate":
            assert not SYSTEMS[row.system].phases
        if row.kind == "joint":
            assert SYSTEMS[row.system].phases


def test_cost_is_shown_once_a_system_at_its_representative_budget():
    budgets = {cell[:2]: cell[2] for cell in cells(TABLES["T5"])}
    assert len(budgets) == len(cells(TABLES["T5"]))
    assert budgets["ehi-pq", ""] == budgets["scann", ""] == "visit-10-64x"
    assert budgets["jpq", ""] == "flat-64x"
    assert budgets["ehi", "paper"] == "visit-10"
    assert budgets["dense", ""] == "flat"
    assert ("faiss-ivf", "on-ehi") not in budgets


def test_joint_rows_are_tested_against_the_best_separate_row_of_their_budget(
    make_results,
):
    results = make_results(
        {
            ("kmeans-tree", "", "visit-5"): (0.4, 0.5, 0.6),
            ("faiss-ivf", "", "visit-5"): (0.3, 0.3, 0.3),
            ("kmeans-tree", "", "visit-10"): (0.5, 0.5, 0.5),
            ("faiss-ivf", "", "visit-10"): (0.6, 0.6, 0.6),
            # A control is better than both, but is not a separate row.
            ("faiss-ivf", "on-ehi", "visit-10"): (0.9, 0.9, 0.9),
            ("ehi", "", "visit-5"): (0.6, 0.7, 0.5),
            ("ehi", "", "visit-10"): (0.4, 0.4, 0.4),
            ("ehi-pq", "", "visit-10-64x"): (0.3, 0.3, 0.3),
        }
    )
    filled = fill(TABLES["T1"], results)
    grid, details = filled.short[0], filled.wide
    assert filled.notes[0] == (
        "Best separate row: kmeans-tree at visit-5, faiss-ivf at visit-10."
    )
    found = shown(details)
    # All 12 queries have the same sign: p = 2 / 2^12, times 4 tests of the table.
    p = 4 * 2 / 2**12
    assert found["ehi", "visit-5"] == {
        "system": "ehi",
        "budget": "visit-5",
        "seeds": "3",
        "nDCG@10": "0.6000 ± 0.1000",
        "R@100": "0.8000 ± 0.0000",
        "visited %": "9.9",
        "bytes/doc": "1536",
        "best separate": "kmeans-tree",
        "difference": "+0.1000",
        "signs": "++-",
        "p": f"{p:.3f}",
    }
    assert found["ehi", "visit-10"]["best separate"] == "faiss-ivf"
    assert found["ehi", "visit-10"]["difference"] == "-0.2000"
    assert found["faiss-ivf:on-ehi", "visit-10"]["difference"] == "+0.3000"
    assert found["kmeans-tree", "visit-5"]["best separate"] == "None"
    columns = {row[0]: dict(zip(grid.header, row, strict=True)) for row in grid.rows}
    marks = {
        (name, budget): (row[budget].style, row[budget].sign)
        for name, row in columns.items()
        for budget in ("visit-5", "visit-10")
        if not isinstance(row[budget], str | None)
    }
    assert marks["kmeans-tree", "visit-5"] == ("italic", "")
    assert marks["faiss-ivf", "visit-5"] == ("", "")
    assert marks["faiss-ivf", "visit-10"] == ("italic", "")
    assert marks["ehi", "visit-5"] == ("bold", "†")
    assert marks["ehi", "visit-10"] == ("bold", "‡")
    # Compressed, it stands in the column of what it visits.
    assert marks["ehi-pq (64x)", "visit-10"] == ("", "‡§")  # the bytes of raw vectors
    assert columns["ehi"]["visit-1"] == "not run"
    # Rows without any record are named below the table instead.
    assert "scann" not in columns
    assert missing(TABLES["T1"], results).startswith("Not run: dense-zero-shot, dense,")


def test_loss_is_relative_to_exact_search_and_paired_by_seed(make_results):
    results = make_results(
        {
            ("dense", "", "flat"): (0.5, 0.8),
            ("opq", "", "flat-64x"): (0.4, 0.72, 0.1),
            ("joint-pq", "", "flat-64x"): (0.5, 0.8),
        }
    )
    found = shown(fill(TABLES["T2"], results).wide)
    # 20% and 10%; the third seed has no pair.
    assert found["opq", "flat-64x"]["loss %"] == "15.0 ± 7.1"
    assert found["opq", "flat-64x"]["p of loss"] == f"{3 * 2 / 2**12:.3f}"
    assert found["joint-pq", "flat-64x"]["loss %"] == "0.0 ± 0.0"
    assert found["joint-pq", "flat-64x"]["p of loss"] == "1.000"
    assert found["dense", "flat"]["loss %"] == "None"


def test_ablations_are_compared_with_the_default(make_results, variants):
    default, ablation = rows_of(TABLES["T4"])
    assert ablation == Row("ehi-pq", "no-path", note="path loss off")
    budget = "visit-10-64x"
    results = make_results(
        {("ehi-pq", "", budget): (0.5, 0.6), ("ehi-pq", "no-path", budget): (0.4, 0.4)}
    )
    table = fill(TABLES["T4"], results).wide
    line = shown(table)["ehi-pq:no-path", "path loss off"]
    assert (line["seeds"], line["difference"], line["signs"]) == ("2", "-0.1500", "--")
    assert line["p"] == "<0.001"
    assert shown(table)["ehi-pq", "the default"]["difference"] == "None"
    assert missing(TABLES["T4"], results).startswith("2 with fewer than 3 seeds; ")


def test_cost_shows_what_the_records_know(make_results):
    ndcg = {("ehi", "", "visit-10"): (0.5, 0.6)}
    table = fill(TABLES["T5"], make_results(ndcg)).wide
    line = shown(table)["ehi", "visit-10"]
    assert line["examples/s"] == "None"
    assert (line["index MB"], line["leaf max"]) == ("8", "120")
    assert "jpq" in missing(TABLES["T5"], make_results(ndcg))
    results = make_results(ndcg, examples_per_second=2000.0, leaf_load_cv=None)
    line = shown(fill(TABLES["T5"], results).wide)["ehi", "visit-10"]
    assert (line["examples/s"], line["leaf cv"]) == ("2000", "None")


def test_older_records_lack_examples_per_second(make_record):
    data = make_record().to_json()
    del data["examples_per_second"]
    assert Record.from_json(data) == make_record()


def test_without_per_query_values_rows_are_shown_untested(make_record):
    records = [make_record(), make_record(system="kmeans-tree", ndcg_at_10=0.4)]
    (results,) = group(records, {}, "test")
    line = shown(fill(TABLES["T1"], results).wide)["ehi", "visit-10"]
    assert (line["best separate"], line["p"]) == ("kmeans-tree", "None")


def test_values_without_a_record_are_not_read(make_record):
    cut_off = make_record(system="kmeans-tree")
    values = {r.cell: np.zeros(3) for r in (make_record(), cut_off)}
    (results,) = group([make_record()], values, "test")
    assert list(results.per_query) == [make_record().cell]


def test_figure_leaves_out_what_was_not_counted(tmp_path, make_record):
    rows = {
        "ehi": [make_record(seed=s, ndcg_at_10=0.4 + s / 10) for s in range(2)],
        "scann": [make_record(system="scann", docs_visited=None)],
    }
    for across in ("docs_visited", "bytes_per_doc"):
        path = tmp_path / f"{across}.png"
        figure_rows(path, rows, across=across, exact={"dense": [make_record()]})
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="across is 'bytes'; allowed"):
        figure_rows(tmp_path / "x.png", rows, across="bytes", exact={})


def test_published_numbers_have_a_source():
    found = published()
    assert all(p.source and p.value and p.measure for p in found)
    keys = [(p.method, p.data, p.setting, p.measure, p.source) for p in found]
    assert len(set(keys)) == len(keys)
    values = {key[:4]: p.value for key, p in zip(keys, found, strict=True)}
    passage = "MS MARCO passage"
    assert values["JPQ", passage, "M = 24", "MRR@10"] == "0.305"
    assert values["OPQ+ScaNN", "MS MARCO document", "M = 24", "MRR@100"] == "0.317"
    assert values["RepCONC", passage, "ANCE, M = 48", "DL20 nDCG@10"] == ".641"
    assert values["Distill-VQ", "NQ", "AR2-G", "MRR@10"] == ".6235"
    assert values["JTR", "MS MARCO document", "-", "ms a query"] == "18"
    assert values["Poeem", "synthetic", "tutorial, nprobe 1", "precision@100"] == (
        "0.9805"
    )


def test_bytes_are_shown_with_and_without_residuals():
    rows = {(row.system, row.variant) for row in TABLES["T2"].rows}
    for system in ("kmeans-tree-opq", "ehi-pq"):
        assert {(system, ""), (system, "no-residual")} <= rows
        base = config_of(get_config(), system)
        assert base.leaves.residual
        changed = apply_variant(get_config(), "no-residual")
        assert not config_of(changed, system).leaves.residual
        assert SYSTEMS[system].tree  # all of its leaves are visited in T2
    assert {budget for _, _, budget in cells(TABLES["T2"])} == {
        "flat", "flat-32x", "flat-64x", "flat-128x",
    }  # fmt: skip


def marks_of(table):
    """(row, column) -> its style and sign, of the cells with a number."""
    return {
        (row[0], column): (value.style, value.sign)
        for row in table.rows
        for column, value in zip(table.header, row, strict=True)
        if isinstance(value, Number)
    }


def test_more_bytes_than_the_column_says_are_marked(make_record):
    sizes = {
        # System, budget: bytes, and all bytes of a document.
        ("dense", "flat"): (1536, 1536),
        ("opq", "flat-64x"): (25, 200),  # a factor of one byte is allowed
        ("faiss-prq", "flat-64x"): (24, 858),
        ("faiss-rq", "flat-64x"): (24, 1690),  # its codebooks are the corpus
        ("scann", "flat-64x"): (43, 83),  # second copies
        ("jpq", "flat-64x"): (25, 300),
    }
    ndcg = {"faiss-rq": 0.7, "faiss-prq": 0.6, "jpq": 0.55}
    records = [
        make_record(
            system=system, budget=budget, bytes_per_doc=float(size),
            total_bytes_per_doc=float(total), compression=1536 / size, recipe=4,
            ndcg_at_10=ndcg.get(system, 0.5), work=1.1,
        )
        for (system, budget), (size, total) in sizes.items()
    ]  # fmt: skip
    values = {r.cell: np.full(QUERIES, r.ndcg_at_10) for r in records}
    (results,) = group(records, values, "test")
    filled = fill(TABLES["T2"], results)
    marks = marks_of(filled.short[0])
    assert marks["faiss-rq", "flat-64x"] == ("", "¶")  # the best, but not compared
    assert marks["faiss-prq", "flat-64x"] == ("italic", "")
    assert marks["scann", "flat-64x"] == ("", "§")
    assert marks["opq", "flat-64x"] == ("", "")
    assert marks["jpq", "flat-64x"] == ("bold", "‡")
    details = shown(filled.wide)
    assert details["jpq", "flat-64x"]["best separate"].startswith("faiss-prq at work")
    sizes = {row[0]: row[2:4] for row in filled.short[0].rows}
    assert sizes["faiss-rq"] == ("24", "1690") and sizes["dense"] == ("1536", "1536")
    by_bytes = next(t for t in filled.short if t.title.startswith("Best nDCG@10"))
    rows = {
        row[0]: dict(zip(by_bytes.header, row, strict=True)) for row in by_bytes.rows
    }
    assert "faiss-rq" not in rows and "dense" not in rows
    assert rows["opq"]["at most 100"] is None
    assert rows["opq"]["at most 200"].value == 0.5
    assert rows["jpq"]["at most 400"].style == "bold"
    assert rows["faiss-prq"]["at most 1535"].style == "italic"


def test_second_copies_show_in_the_first_table(make_record):
    records = [
        make_record(system=system, bytes_per_doc=size, compression=1536 / size)
        for system, size in (("jtr", 3072.0), ("faiss-hnsw", 1617.0))
    ]
    records.append(dataclasses.replace(records[1], budget="flat", bytes_per_doc=1809.0))
    (results,) = group(records, {}, "test")
    grid = fill(TABLES["T1"], results).short[0]
    assert {row[0]: row[2] for row in grid.rows} == {
        "jtr": "3072", "faiss-hnsw": "1617–1809",
    }  # fmt: skip
    assert marks_of(grid)["jtr", "visit-10"] == ("bold", "§")
    assert marks_of(grid)["faiss-hnsw", "visit-10"] == ("italic", "")


def test_older_rows_are_marked_and_not_compared(make_results):
    ndcg = {("kmeans-tree", "", "visit-10"): (0.5,), ("jtr", "", "visit-10"): (0.4,)}
    newer = make_results(ndcg, recipe=4)
    older = make_results({("ehi", "", "visit-10"): (0.6,)}, recipe=2)
    both = dataclasses.replace(newer, records={**newer.records, **older.records})
    filled = fill(TABLES["T1"], both)
    marks = marks_of(filled.short[0])
    assert marks["ehi (recipe 2)", "visit-10"] == ("", "")
    assert marks["jtr", "visit-10"][0] == "bold"
    assert shown(filled.wide)["ehi (recipe 2)", "visit-10"]["best separate"] == "None"
    assert aged(TABLES["T1"], both).startswith("Rows of (recipe 2) wait")
    # Among themselves older rows are compared, as before.
    marks = marks_of(fill(TABLES["T1"], older).short[0])
    assert marks["ehi", "visit-10"][0] == "bold"
    assert aged(TABLES["T1"], older).startswith("All of it is of recipe 2")
    assert aged(TABLES["T1"], newer) is None


def test_published_orders_are_checked_in_the_records(make_results):
    ndcg = {
        ("jpq", "", "flat-64x"): (0.7, 0.8),
        ("opq", "", "flat-64x"): (0.5, 0.6, 0.9),  # a third seed that others lack
        ("ehi-pq", "", "flat-64x"): (0.6, 0.7),
        ("repconc", "", "flat-64x"): (0.75, 0.75),
    }
    results = make_results(ndcg)
    table = orders_table({"pydocs": results})
    found = {row[:2]: row[3] for row in table.rows}
    assert found["jpq > opq", "flat-64x"] == "yes† (0.750, 0.550)"
    assert found["ehi-pq > jpq", "flat-64x"] == "no† (0.650, 0.750)"
    assert found["repconc > jpq", "flat-64x"] == "no (0.750, 0.750)"
    assert found["jtr > faiss-ivf", "visit-10"] == "not run"
    assert all(row[2] for row in table.rows)
    newer = make_results({("opq", "", "flat-64x"): (0.5,)}, recipe=4)
    both = dataclasses.replace(results, records=results.records | newer.records)
    found = {row[:2]: row[3] for row in orders_table({"pydocs": both}).rows}
    assert found["jpq > opq", "flat-64x"] == "of two recipes"
