"""Queries that have the id of a document: which are dropped, and what scores say.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
from collection_files import add_line
from wild_cases import failed

from ehi.eval.measure import curve, measure
from ehi.eval.metrics import evaluate, read_run, without_identical_ids
from ehi.index import build_index

pytestmark = pytest.mark.usefixtures("warnings_of_ehi")


@pytest.fixture
def shared_ids(beir_folder):
    """Queries x (of document x's text), y (another text) and z (judged itself)."""
    corpus = [("x", "one text"), ("y", "second text"), ("z", "third"), ("d", "fourth")]
    queries = [("x", " one text"), ("y", "other words"), ("z", "third")]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = [json.dumps({"_id": id, "text": text}) + "\n" for id, text in rows]
        (beir_folder / f"{name}.jsonl").write_text("".join(lines))
    (beir_folder / "qrels" / "train.tsv").unlink()
    qrels = "x\td\t1\ny\td\t1\nz\tz\t1\n"
    (beir_folder / "qrels" / "test.tsv").write_text(qrels)
    return beir_folder


# BEIR's `ignore_identical_ids` drops every result with the id of its query. Beyond it:
# a judged pair stays, and by default only equal texts count, or the names that need it.
@pytest.mark.parametrize(
    "name, ignore, expected",
    [
        failed("own", None, {"x"}, id="equal-text"),
        failed("own", True, {"x", "y"}, id="option"),
        failed("own", False, set(), id="never"),
        failed("arguana", None, {"x", "y"}, id="arguana"),
        failed("ArguAna", None, {"x", "y"}, id="capitals"),
        failed("quora", None, {"x", "y"}, id="quora"),
        failed("quora", False, set(), id="quora-never"),
    ],
)
def test_which_queries_ignore_the_document_of_their_id(
    shared_ids, opened, name, ignore, expected
):
    path = shared_ids.rename(shared_ids.with_name(name))
    assert opened(path).identical_ids("test", ignore) == expected


# The numbers are BEIR's: 1 / log2(3) = .63 with the query ranked first, 1 without it.
@pytest.mark.parametrize(
    "ignore, qrels, expected",
    [
        failed(False, {"d": 1}, 1 / np.log2(3), id="ranked"),
        failed(True, {"d": 1}, 1.0, id="all"),
        failed({"x"}, {"d": 1}, 1.0, id="named"),
        failed({"y"}, {"d": 1}, 1 / np.log2(3), id="other-named"),
        failed(True, {"x": 1}, 1.0, id="judged"),
        failed(True, {"x": 0, "d": 1}, 1 / np.log2(3), id="judged-zero"),
    ],
)
def test_a_run_with_the_query_itself(ignore, qrels, expected):
    run = {"x": {"x": 9.0, "d": 1.0}}
    values = evaluate(without_identical_ids(run, {"x": qrels}, ignore), {"x": qrels})
    assert values["ndcg@10"][0] == pytest.approx(expected)
    assert run == {"x": {"x": 9.0, "d": 1.0}}


# The library must drop before the cut: with k = 2, both other documents are ranked.
@pytest.mark.parametrize("kind", ["index", "reranked", "faiss-flat", "scann"])
def test_the_query_itself_is_dropped_before_the_cut_failed(tmp_path, kind):
    vectors = np.eye(8, dtype=np.float32)
    ids, qrels = [f"d{i}" for i in range(8)], {"d0": {"d2": 1}, "other": {"d3": 1}}
    queries = np.zeros((2, 8), np.float32)
    queries[0, :3], queries[1, 3:5] = (0.8, 0.5, 0.3), (0.8, 0.6)
    options = {"beam": 1, "tower_width": 8, "k": 2, "run_path": tmp_path / "x.run"}
    if kind in ("faiss-flat", "scann"):
        pytest.importorskip(kind.split("-")[0])
        from ehi.eval.baselines.build import build_baseline

        index = build_baseline(kind, vectors, doc_ids=ids)
    else:
        reranked = kind == "reranked"
        index = build_index(vectors, ids, tree=None, rerank_vectors=reranked)
        options["rerank"] = 2 * reranked
    names = ["d0", "other"]
    fields = measure(index, queries, names, qrels, **options)
    assert fields["recall_at_10"] == 0.5  # d0, d1 of the first query; d3 of the second
    dropped = {"ignore_identical_ids": {"d0"}}
    fields = measure(index, queries, names, qrels, **options, **dropped)
    assert fields["recall_at_10"] == 1.0
    run = read_run(tmp_path / "x.run")
    assert list(run["d0"]) == ["d1", "d2"] and list(run["other"]) == ["d3", "d4"]
    values = np.load(tmp_path / "x.npy")  # what significance compares
    assert values["ndcg@10"].tolist() == pytest.approx([1 / np.log2(3), 1.0])
    settings = [{"beam": 1}]
    ((_, exact),) = curve(index, queries, names, qrels, settings, **dropped)
    assert exact == pytest.approx(fields["ndcg_at_10"])


# The same of a whole run: every row drops the query itself, and the report says so.
def test_a_run_on_a_collection_like_arguana_failed(tmp_path, monkeypatch, caplog):
    from topics import tiny, write_corpus

    from experiments import main

    monkeypatch.setenv("EHI_CACHE", str(tmp_path / "cache"))
    folder = write_corpus(tmp_path / "arguana")
    documents = (folder / "corpus.jsonl").read_text().splitlines()
    text = json.loads(documents[5])["text"]
    add_line(folder / "corpus.jsonl", json.dumps({"_id": "empty", "text": ""}))
    add_line(folder / "queries.jsonl", json.dumps({"_id": "d5", "text": text}))
    add_line(folder / "qrels" / "test.tsv", "d5\td13\t1\nd5\tgone\t1")
    systems = ["dense-zero-shot", "kmeans-tree"]
    with contextlib.suppress(ImportError):
        import faiss  # noqa: F401

        systems.append("faiss-flat")
    config = tiny(folder, systems=tuple(systems), budgets=("flat", "visit-50"))
    main.run(config, tmp_path / "run")
    assert "1 of 17 queries have the id of a document" in caplog.text
    report = (tmp_path / "run" / "report.md").read_text()
    assert "- 1 of 17 queries have the id of a document" in report
    assert "- 1 document without title and text, such as 'empty'" in report
    runs = sorted((tmp_path / "run" / "trec").glob("*.run.gz"))
    assert len(runs) == len(systems)
    for path in runs:
        run = read_run(path)
        assert run["d5"] and "d5" not in run["d5"] and "d5" in run["q32"]


def test_configs_hash_as_before_where_nothing_is_dropped(opened):
    from ehi.eval.provenance import config_hash
    from experiments.configs import own
    from experiments.run.evaluate import _config_hash
    from experiments.run.prepare import Inputs

    config = own.get_config()
    plain = Inputs(*[None] * 9)
    values = json.loads(config.to_json())
    for later in ("ignore_identical_ids", "start_from", "start_from_steps", "index",
                  "fit_sample", "half_on_disk", "device_table_gib"):  # fmt: skip
        del values[later]
    for later in ("query_prefix", "document_prefix", "pooling", "normalise"):
        del values["tower"][later]

    before = config_hash(values, without=("systems", "budgets", "seed"))
    assert _config_hash(config, plain) == before
    assert _config_hash(config, replace(plain, identical_ids=frozenset("x"))) != before
