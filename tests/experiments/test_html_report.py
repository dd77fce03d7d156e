"""The page of a run: what it holds, what it escapes, what it does without."""

import dataclasses
import json
import re
import shutil
import sys

import numpy as np
import page_cases
import pytest

from ehi.eval.metrics import read_run, write_run
from ehi.eval.records import read_records, write_records
from ehi.index import open_index
from experiments import tables
from experiments.html_report import page, saved
from experiments.html_report.rows import bootstrap
from experiments.html_report.trees import marking_words
from experiments.html_report.workdirs import read_workdirs, top_hits


@pytest.fixture
def run(tmp_path, make_record):
    """The workdir and its records"""
    return tmp_path / "run", page_cases.write_workdir(tmp_path / "run", make_record)


def block_of(path):
    """The data in a page, as they are written."""
    text = path.read_text()
    (found,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', text
    )
    return found


def data_of(path):
    """The data in a page, as its script reads them."""
    return json.loads(block_of(path))


def written(path, *workdirs, **options):
    pytest.importorskip("plotly", reason="a page needs the extra `report`")
    pytest.importorskip("jinja2", reason="a page needs the extra `report`")
    return page.write_html(path, workdirs, **options)


def test_the_page_holds_the_records_and_no_markup_of_the_data(run, tmp_path):
    folder, _ = run
    path = written(tmp_path / "report.html", folder)
    text, data = path.read_text(), data_of(path)
    assert "<script>alert" not in text and "<i>socket" not in text
    assert "\u2028" not in text and not set("<>&") & set(block_of(path))
    assert any("\u2028" in str(line) for *_, line in data["documents"])
    assert page_cases.HOSTILE in [shown[0] for shown in data["documents"]]
    records = read_records(folder / "results.jsonl")
    for row, record in zip(data["rows"], records, strict=True):
        assert (row["system"], row["budget"]) == (record.system, record.budget)
        for name in ("ndcg@10", "rr@10", "recall@100"):
            mean, low, high = row["measures"][name]
            assert mean == record.to_json()[name] and low <= high
        for name in ("docs_visited", "work", "bytes_per_doc", "latency_ms_p50"):
            assert row["costs"][name] == getattr(record, name)
    assert data["training"][0]["of"]["loss"] == [1, 1 / 2, 1 / 3]  # no torn line
    assert len(data["curves"]) == 2
    # The joint system and its counterpart, at the smallest budget of both.
    assert [data["rows"][n]["system"] for n in data["pair"]] == ["ehi", "kmeans-tree"]
    assert {data["rows"][n]["budget"] for n in data["pair"]} == {"visit-2"}


def test_queries_have_their_hits_judgements_and_leaves(run):
    folder, records = run
    data = page.page_data(read_workdirs([folder]))["data"]
    shown = [shown[0] for shown in data["documents"]]
    for number, record in enumerate(records):
        answers = data["queries"]["rows"][number]
        hits = read_run(folder / "trec" / f"{record.cell.stem}.run.gz")
        for query, name in enumerate(data["queries"]["names"]):
            found = [shown[n] for n in answers["hits"][query]]
            assert found == list(hits[name])
        assert answers["visited"] == [6 * len(leaves) for leaves in answers["leaves"]]
        assert data["trees"][answers["tree"]]["name"] == record.system
    judged = [[shown[n] for n, _ in docs] for docs in data["queries"]["judged"]]
    assert judged[0] == [page_cases.HOSTILE] and judged[1] == ["d2"]


def test_a_leaf_has_exactly_its_documents(run):
    folder, _ = run
    data = page.page_data(read_workdirs([folder]))["data"]
    shown = [shown[0] for shown in data["documents"]]
    for tree in data["trees"]:
        index = open_index(folder / "indexes" / tree["name"])
        for leaf, listed in enumerate(tree["documents"]):
            rows = index.contents.rows_in_leaf(leaf)
            assert [shown[n] for n in listed] == list(index.external_ids(rows))
            assert tree["sizes"][leaf] == len(rows)
        assert sum(tree["sizes"]) == page_cases.DOCUMENTS


def test_a_large_tree_lists_some_documents_of_each_leaf(run, monkeypatch):
    monkeypatch.setattr("experiments.html_report.trees.MOST_DOCUMENTS", 8)
    data = page.page_data(read_workdirs([run[0]]))["data"]
    for tree in data["trees"]:
        assert [len(listed) for listed in tree["documents"]] == [2] * 4
        assert sum(tree["sizes"]) == page_cases.DOCUMENTS


def test_a_run_file_may_hold_more_hits_than_are_shown(tmp_path):
    run = {"a %b": {f"d {n}": 30.0 - n for n in range(25)}, "c": {"x": 1.0}}
    write_run(tmp_path / "x.run.gz", run)
    found = top_hits(tmp_path / "x.run.gz", ["a %b"])
    assert found == {"a %b": [f"d {n}" for n in range(10)]}
    (tmp_path / "x.run.gz").write_bytes(b"\x1f\x8b damaged")
    with pytest.raises(ValueError, match="x.run.gz is damaged"):
        top_hits(tmp_path / "x.run.gz", ["c"])


def test_an_older_workdir_has_a_page_that_says_what_is_absent(run, tmp_path):
    folder, _ = run
    for name in ("curves.json", "questions.json", "metrics.jsonl"):
        (folder / name).unlink()
    for name in ("trec", "indexes"):
        shutil.rmtree(folder / name)
    found = page.page_data(read_workdirs([folder]))
    assert found["data"]["queries"] is None and found["data"]["trees"] == []
    assert found["data"]["winners"][0]["p"] is None
    assert found["data"]["rows"][0]["measures"]["ndcg@10"][1:] == [None, None]
    for what in ("trec", "curves.json", "questions.json", "metrics.jsonl"):
        assert any(what in sentence for sentence in found["absent"])
    path = written(tmp_path / "report.html", folder)
    assert "curves.json" in path.read_text()


def test_seeds_share_a_row_and_other_configs_do_not(run, tmp_path, make_record):
    first, _ = run
    second, again = tmp_path / "second", tmp_path / "again"
    page_cases.write_workdir(second, make_record, seed=1, gain=0.1)
    page_cases.write_workdir(again, make_record)
    data = page.page_data(read_workdirs([first, second]))["data"]
    assert [row["seeds"] for row in data["rows"]] == [[0, 1]] * 4
    data = page.page_data(read_workdirs([first, again]))["data"]
    systems = [system["name"] for system in data["systems"]]
    assert systems[:2] == ["kmeans-tree (run)", "ehi (run)"] and len(systems) == 4
    assert data["rows"][data["pair"][1]]["system"] == "kmeans-tree (run)"


def test_mistakes_are_one_sentence(run, tmp_path, make_record, capsys):
    folder, _ = run
    other = tmp_path / "other"
    page_cases.write_workdir(other, make_record, dataset="scifact")
    with pytest.raises(FileNotFoundError, match="empty holds no records: a run of"):
        read_workdirs([tmp_path / "empty"])
    with pytest.raises(ValueError, match="one data set and split: .*pydocs.*scifact"):
        read_workdirs([folder, other])
    with pytest.raises(ValueError, match="'jpq', which is in no record; the systems"):
        page.page_data(read_workdirs([folder]), compare=("jpq", "ehi"))
    with pytest.raises(ValueError, match="--workdirs names .*run twice"):
        read_workdirs([folder, tmp_path / "other" / ".." / "run"])
    (folder / "questions.json").write_text("{")
    with pytest.raises(ValueError, match="questions.json is damaged"):
        read_workdirs([folder])
    with pytest.raises(SystemExit):
        tables.main(["--html=x.html"])
    assert "--html=FILE and --workdirs DIR ... go together" in capsys.readouterr().err


def test_runs_on_other_documents_or_queries_are_not_compared(
    run, tmp_path, make_record
):
    folder, records = run
    other = tmp_path / "other"
    page_cases.write_workdir(other, make_record, seed=1)
    for path in other.glob("trec/*.npy"):  # as many queries, one of another id
        values = np.load(path)
        values["query_id"][-1] = "q99"
        np.save(path, values)
    with pytest.raises(ValueError, match="other was scored on other queries than"):
        read_workdirs([folder, other])
    moved = [dataclasses.replace(r, corpus_sha256="cd" * 32) for r in records]
    (other / "results.jsonl").unlink()
    write_records(other / "results.jsonl", moved)
    with pytest.raises(ValueError, match="other documents .* cdcdcdcdcdcd and abab"):
        read_workdirs([folder, other])


def test_without_the_extra_a_page_names_the_install_line(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[report\]'"):
        page.write_html(tmp_path / "report.html", [run[0]])


def test_the_command_writes_a_page(run, tmp_path, capsys):
    pytest.importorskip("plotly", reason="a page needs the extra `report`")
    path = tmp_path / "two.html"
    arguments = [f"--html={path}", f"--workdirs={run[0]}", "--compare", "ehi", "ehi"]
    assert tables.main(arguments) == 0
    assert str(path) in capsys.readouterr().out and path.stat().st_size < 10e6


def test_intervals_of_a_mean():
    rng = np.random.default_rng(0)
    values = np.stack([rng.standard_normal(400), np.full(400, 0.5)], axis=1)
    low, high = bootstrap(values)
    assert low[1] == high[1] == pytest.approx(0.5)
    mean, error = values[:, 0].mean(), values[:, 0].std() / 20
    np.testing.assert_allclose(
        [low[0], high[0]], mean + error * np.array([-1.96, 1.96]), atol=0.02
    )


def test_words_of_a_leaf_are_rare_elsewhere():
    leaves = [["the parseDate of", "the parse_time"], ["the socket", "the Socket"]]
    assert marking_words(leaves) == [["parse"], ["socket"]]


def test_leaves_of_other_cells_stay(tmp_path):
    assert saved.read_json(tmp_path / "curves.json") is None
    saved.write_curves(tmp_path, {"a": [(np.float32(0.5), 1)]})
    saved.write_curves(tmp_path, {"b": [(1, 0.25)]})
    found = saved.read_json(tmp_path / "curves.json")
    assert found == {"a": [[0.5, 1.0]], "b": [[1.0, 0.25]]}
    assert saved.run_of("ehi-pq", "flat-64x") == "ehi-pq-64x"
