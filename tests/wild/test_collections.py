"""Data sets as other projects publish them: odd documents, judgements, zips, folders.

The id of a case ends in `failed` if it failed before this file was written, else in
`passed`. The comment above a case names the source of what is expected.
"""

import contextlib
import gzip
import io
import json
import logging
import os
import shutil
import stat
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ehi.data.datasets import open_dataset
from ehi.data.pseudo_queries import pseudo_queries
from ehi.eval.measure import curve, measure
from ehi.eval.metrics import evaluate, read_run, without_identical_ids
from ehi.index import build_index

BOM = "\ufeff"


def case(*values, id, was):
    """A parameter set whose id says whether it failed before."""
    return pytest.param(*values, id=f"{id}-{was}")


@pytest.fixture
def opened(beir_folder, tmp_path):
    """Function: open the tiny folder, or another path, with a fresh cache."""

    def open_it(path=beir_folder):
        return open_dataset(path, data_dir=tmp_path / "cache")

    return open_it


def add_line(path, text):
    """Append a line to a file."""
    with path.open("a") as file:
        file.write(text + "\n")


def zip_of(path, entries, **options):
    """A zip of name -> bytes, written by Python as its names are given."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def files_of(folder):
    """Name relative to a folder -> bytes."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


# Documents.


# BEIR embeds `(title + " " + text).strip()`, which is "" here; public FiQA has some.
@pytest.mark.parametrize(
    "record",
    [
        case({"_id": "d7", "title": "", "text": ""}, id="empty", was="failed"),
        case({"_id": "d7", "title": " ", "text": "\n"}, id="blank", was="failed"),
        case({"_id": "d7"}, id="no-fields", was="failed"),
        case({"_id": "d7", "title": None, "text": None}, id="null", was="failed"),
    ],
)
def test_a_document_without_text_is_kept_as_the_empty_text(
    beir_folder, opened, caplog, record
):
    add_line(beir_folder / "corpus.jsonl", json.dumps(record))
    dataset = opened()
    assert dataset.doc_ids[-1] == "d7" and dataset.documents[6].content == ""
    assert "1 document without title and text, such as 'd7'" in caplog.text
    texts, rows, _ = pseudo_queries(dataset.documents)
    assert "" not in texts and 6 not in rows  # an empty query would teach nothing
    caplog.clear()
    again = opened()  # from the prepared copy
    assert again.notes == dataset.notes and "such as 'd7'" in caplog.text


# RFC 8259, section 8.1: a parser may ignore a byte order mark; JSON is UTF-8. Section
# 9: an implementation may limit the depth of nesting and the range of numbers.
@pytest.mark.parametrize(
    "line, expected",
    [
        case(BOM + '{"_id": "d1", "text": "t"}', ["d1"], id="bom", was="passed"),
        case('{"_id": 1, "text": "t"}\r', ["1"], id="number-crlf", was="passed"),
        case('{"_id": "\\u00e9", "text": "t"}', ["\u00e9"], id="escape", was="passed"),
        case(
            '{"_id": "\\ud83d\\ude00", "text": "t"}', ["\U0001f600"],
            id="surrogate-pair", was="passed",
        ),
        case('{"_id": "a b\\"c", "text": "t"}', ['a b"c'], id="space", was="passed"),
        case('{"_id": "d", "text": "a\\u0000b"}', ["d"], id="nul-text", was="passed"),
        case(
            '{"_id": "d", "text": "a\\u2028b\\u0085c"}', ["d"],
            id="line-separators", was="passed",
        ),
        # trec_eval ends a name at NUL: two ids could become one.
        case('{"_id": "a\\u0000b", "text": "t"}', "NUL", id="nul-id", was="failed"),
        case('{"_id": true, "text": "t"}', 'an "_id"', id="bool-id", was="failed"),
        case('{"_id": "\\ud800"}', "half a character", id="surrogate", was="passed"),
        case(
            '{"_id": "d", "text": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "line 1: the JSON is nested too deeply", id="deep", was="failed",
        ),
        case(
            '{"_id": 1' + "0" * 5000 + ', "text": "t"}', "line 1: not JSON",
            id="long-number", was="failed",
        ),
    ],
)  # fmt: skip
def test_lines_of_a_corpus(tmp_path, opened, line, expected):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "corpus.jsonl").write_bytes(line.encode("utf-8", "surrogatepass"))
    if isinstance(expected, list):
        assert opened(folder).doc_ids == expected
    else:
        with pytest.raises(ValueError, match=expected):
            opened(folder)


# RFC 8259 again: nothing but UTF-8. The message must name file and line.
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "cp1252"])
@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_other_encodings_are_one_sentence_passed(beir_folder, opened, name, encoding):
    path = beir_folder / name
    path.write_bytes((path.read_text() + "q4\td\u00e9\t1\n").encode(encoding))
    with pytest.raises(ValueError, match=rf"{name}, line \d+: (not|expec|\"_id\")"):
        opened()


# Judgements.


# trec_eval counts a judged document in the ideal ranking, found or not.
def test_judged_documents_that_the_corpus_lacks_count_failed(
    beir_folder, opened, caplog
):
    qrels = beir_folder / "qrels"
    add_line(qrels / "test.tsv", "q4\tgone\t1\nq5\tgone\t1\nq5\tlost\t0")
    add_line(qrels / "train.tsv", "q1\tgone\t1")
    dataset = opened()
    assert "3 judgements of qrels/test.tsv on 2 documents that the" in caplog.text
    assert "1 judgement of qrels/train.tsv on 1 document that the" in caplog.text
    assert dataset.qrels["test"]["q4"] == {"d4": 1, "gone": 1}
    assert dataset.positives("train")[1].tolist() == [0, 1, 1, 2]
    assert opened().qrels == dataset.qrels  # from the prepared copy
    values = evaluate({"q4": {"d4": 1.0}}, {"q4": dataset.qrels["test"]["q4"]})
    ideal = 1 + 1 / np.log2(3)
    assert values["ndcg@10"][0] == pytest.approx(1 / ideal)
    assert values["recall@10"][0] == 0.5


# BEIR fails on an unknown query; judgements of another corpus can score nothing.
@pytest.mark.parametrize(
    "content, message",
    [
        case("q9\td1\t1\n", "unknown query 'q9'", id="query", was="passed"),
        case("q4\tx\t1\nq5\ty\t1\n", "line 1: unknown document 'x', and the corpus "
             "has none of the other judged", id="corpus", was="failed"),
        case("q4\td1\t1.5\n", "an integer grade", id="fraction", was="passed"),
        case("q4\td1\tnan\n", "an integer grade", id="nan", was="passed"),
        case("q4\td1\t1e99\n", "an integer grade", id="huge", was="passed"),
        case("q4\td1\t1_0\n", "an integer grade", id="underscore", was="failed"),
        case("q4\td1\t\u0661\n", "an integer grade", id="arabic-digit", was="failed"),
        case("q4,d1,1\n", "between tabs", id="commas", was="passed"),
        case("q4\td1\t1\rq5\td6\t1\r", "between tabs", id="old-mac", was="passed"),
        case("q4\td1\t1\t0\n", "unknown document '1'|tabs", id="date", was="passed"),
    ],
)  # fmt: skip
def test_qrels_that_cannot_be_meant_are_refused(beir_folder, opened, content, message):
    (beir_folder / "qrels" / "test.tsv").write_text(content, newline="")
    with pytest.raises(ValueError, match=message):
        opened()


EXPECTED = {"q4": {"d4": 1}, "q5": {"d6": 2}}


@pytest.mark.parametrize(
    "content",
    [
        # A whole number is a grade however a program writes it: pandas writes 1.0 for a
        # column with a missing value.
        case("q4\td4\t1.0\nq5\td6\t2.\n", id="float", was="failed"),
        case("q4\td4\t+1\nq5\td6\t2e0\n", id="signed-exponent", was="failed"),
        case("q4\td4\t1 \nq5\td6\t2\t\n", id="trailing-tab", was="failed"),
        # BEIR reads with Python's csv.QUOTE_MINIMAL, which removes quotes.
        case('"q4"\t"d4"\t1\nq5\td6\t2\n', id="quoted", was="failed"),
        case(
            '"query-id"\t"corpus-id"\t"score"\nq4\td4\t1\nq5\td6\t2\n',
            id="quoted-header", was="failed",
        ),
        # trec_eval: query, iteration, document, grade, between any white space.
        case("q4 0 d4 1\nq5 0 d6 2\n", id="trec", was="failed"),
        case("q4\tQ0\td4\t1\nq5\tQ0\td6\t2\n", id="trec-tabs", was="failed"),
        # Data sets of others name the columns differently; BEIR skips any first line.
        case("Query-ID\tCorpus-ID\tScore\nq4\td4\t1\nq5\td6\t2\n", id="capitals",
             was="failed"),
        case("query_id\tdoc_id\tgrade\nq4\td4\t1\nq5\td6\t2\n", id="underscores",
             was="failed"),
        case(BOM + "query-id\tcorpus-id\tscore\nq4\td4\t1\nq5\td6\t2\n", id="bom",
             was="passed"),
        case("\r\nq4\td4\t1\r\n\r\nq5\td6\t2\r\n", id="crlf-blank", was="passed"),
        case("q4\td4\t1\nq4\td4\t1\nq5\td6\t2", id="repeated", was="passed"),
    ],
)  # fmt: skip
def test_qrels_that_other_programs_write_are_read(beir_folder, opened, content):
    path = beir_folder / "qrels" / "test.tsv"
    path.write_text(content, encoding="utf-8", newline="")
    assert opened().qrels["test"] == EXPECTED


def test_a_query_may_be_called_as_a_header_passed(beir_folder, opened):
    add_line(beir_folder / "queries.jsonl", '{"_id": "query-id", "text": "t"}')
    path = beir_folder / "qrels" / "test.tsv"
    path.write_text("q4\td4\t1\nquery-id\td1\t1\n")
    assert opened().qrels["test"]["query-id"] == {"d1": 1}


# trec_eval scores no query without a relevant document: the run would end with an error
# after hours of training.
def test_only_zero_grades_are_said_before_training_failed(beir_folder, opened):
    (beir_folder / "qrels" / "test.tsv").write_text("q4\td4\t0\nq5\td6\t-1\n")
    with pytest.raises(ValueError, match="no judgement of split 'test' of tiny "):
        opened().check_relevant("test")
    opened().check_relevant("train")


@pytest.mark.parametrize(
    "name",
    [
        # macOS keeps attributes of `name` in `._name`; a dot hides a file on Unix.
        case("qrels/._test.tsv", id="apple-double", was="failed"),
        case("qrels/.test.tsv", id="hidden", was="failed"),
        case("qrels/.~lock.test.tsv#", id="lock", was="passed"),
        case("qrels/.ipynb_checkpoints/test.tsv", id="notebook", was="passed"),
        case("qrels/README.md", id="readme", was="passed"),
        case("._corpus.jsonl", id="corpus", was="passed"),
        case("ratings.csv", id="stray-ratings", was="failed"),
        case("__MACOSX/corpus.jsonl", id="macosx", was="passed"),
        case("stats.tsv", id="other-table", was="passed"),
    ],
)
def test_files_that_are_not_of_the_data_set_are_skipped(
    beir_folder, tmp_path, opened, name
):
    expected = opened().qrels
    path = beir_folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x00\x05\x16\x07 no text \xff\n")
    assert opened().qrels == expected
    zipped = zip_of(tmp_path / "zipped.zip", files_of(beir_folder))
    assert opened(zipped).qrels == expected


@pytest.mark.parametrize(
    "moved",
    [
        # Judgements that are not read would give a run without scores.
        case({"qrels/test.tsv": "test.tsv"}, id="beside-corpus", was="failed"),
        case({"qrels/test.tsv": "qrels.tsv"}, id="one-file", was="failed"),
        case(
            {"qrels/test.tsv": "qrels/test.txt", "qrels/train.tsv": "qrels/a.txt"},
            id="txt", was="failed",
        ),
        case(
            {"qrels/test.tsv": "Qrels/test.tsv", "qrels/train.tsv": "Qrels/a.tsv"},
            id="capital", was="failed",
        ),
    ],
)  # fmt: skip
def test_judgements_in_another_place_are_said(beir_folder, opened, moved):
    for old, new in moved.items():
        (beir_folder / new).parent.mkdir(exist_ok=True)
        (beir_folder / old).rename(beir_folder / new)
    if not any((beir_folder / "qrels").iterdir()):
        (beir_folder / "qrels").rmdir()
    with pytest.raises(ValueError, match=r"is not read: judgements must be in qrels/<"):
        opened()


IDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=6
).filter(lambda id: id.strip() == id)


# A property: what a BEIR writer (csv, tabs, QUOTE_MINIMAL) writes is what is read.
@settings(
    max_examples=25, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    grades=st.dictionaries(
        st.tuples(IDS, IDS), st.integers(-2, 5), min_size=1, max_size=6
    ),
    header=st.booleans(),
    ending=st.sampled_from(["\n", "\r\n"]),
    as_float=st.booleans(),
)  # fmt: skip
def test_any_qrels_are_read_as_they_were_written_failed(
    tmp_path, grades, header, ending, as_float
):
    import csv

    from ehi.data.qrels import read_qrels

    path = tmp_path / "test.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator=ending)
        if header:
            writer.writerow(["query-id", "corpus-id", "score"])
        for (query, document), grade in grades.items():
            writer.writerow([query, document, float(grade) if as_float else grade])
    queries, documents = ({pair[side] for pair in grades} for side in (0, 1))
    found = read_qrels(path, queries, documents)
    assert {(j.query, j.document): j.grade for j in found} == grades


# Identical ids.


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
        case("own", None, {"x"}, id="equal-text", was="failed"),
        case("own", True, {"x", "y"}, id="option", was="failed"),
        case("own", False, set(), id="never", was="failed"),
        case("arguana", None, {"x", "y"}, id="arguana", was="failed"),
        case("ArguAna", None, {"x", "y"}, id="capitals", was="failed"),
        case("quora", None, {"x", "y"}, id="quora", was="failed"),
        case("quora", False, set(), id="quora-never", was="failed"),
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
        case(False, {"d": 1}, 1 / np.log2(3), id="ranked", was="failed"),
        case(True, {"d": 1}, 1.0, id="all", was="failed"),
        case({"x"}, {"d": 1}, 1.0, id="named", was="failed"),
        case({"y"}, {"d": 1}, 1 / np.log2(3), id="other-named", was="failed"),
        case(True, {"x": 1}, 1.0, id="judged", was="failed"),
        case(True, {"x": 0, "d": 1}, 1 / np.log2(3), id="judged-zero", was="failed"),
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
    from experiments.configs import own
    from experiments.run.evaluate import _config_hash
    from experiments.run.prepare import Inputs

    config = own.get_config()
    plain = Inputs(*[None] * 9)
    values = json.loads(config.to_json())
    del values["ignore_identical_ids"]
    from ehi.eval.provenance import config_hash

    before = config_hash(values, without=("systems", "budgets", "seed"))
    assert _config_hash(config, plain) == before
    assert _config_hash(config, replace(plain, identical_ids=frozenset("x"))) != before


# Zips and tars.


# PKWARE's APPNOTE 4.4.17.1: names have forward slashes, no drive and no leading slash.
# Older .NET and other Windows programs write backslashes, `zip` of `./` writes dots.
@pytest.mark.parametrize(
    "rename, options",
    [
        case(lambda n: n.replace("/", "\\"), {}, id="backslash", was="failed"),
        case(lambda n: f"./{n}", {}, id="dot", was="failed"),
        case(lambda n: f"top\\{n}".replace("/", "\\"), {}, id="top-backslash",
             was="failed"),
        case(lambda n: f"./top/{n}", {}, id="dot-top", was="failed"),
        case(lambda n: f"a/b/{n}", {}, id="nested", was="passed"),
        case(lambda n: n, {"compression": zipfile.ZIP_DEFLATED}, id="deflated",
             was="passed"),
        case(lambda n: n, {"compression": zipfile.ZIP_LZMA}, id="lzma", was="passed"),
        case(lambda n: f"caf\u00e9/{n}", {}, id="unicode", was="passed"),
    ],
)  # fmt: skip
def test_zips_of_other_programs_are_read(
    beir_folder, tmp_path, opened, rename, options
):
    expected = opened()
    entries = {rename(name): data for name, data in files_of(beir_folder).items()}
    found = opened(zip_of(tmp_path / "tiny.zip", entries, **options))
    assert found.qrels == expected.qrels and set(found.qrels) == {"train", "test"}
    assert found.corpus_sha256 == expected.corpus_sha256


def test_zip64_directories_and_prepended_bytes_passed(beir_folder, tmp_path, opened):
    expected, path = opened().qrels, tmp_path / "tiny.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("qrels")
        for name, data in files_of(beir_folder).items():
            with archive.open(name, "w", force_zip64=True) as entry:
                entry.write(data)
    path.write_bytes(b"#!/bin/sh\nexit\n" + path.read_bytes())  # self-extracting
    assert opened(path).qrels == expected


def encrypted(data):
    """A zip whose entries are marked as encrypted (APPNOTE 4.4.4, bit 0)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in data.items():
            archive.writestr(name, content)
        for entry in archive.filelist:
            entry.flag_bits |= 1
    return buffer.getvalue()


def linked(data):
    """A zip whose queries.jsonl is a symbolic link, as `zip -y` writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in data.items():
            entry = zipfile.ZipInfo(name)
            if name == "queries.jsonl":
                entry.external_attr = (stat.S_IFLNK | 0o777) << 16
                content = "../queries.jsonl"
            archive.writestr(entry, content)
    return buffer.getvalue()


def with_entry(name):
    """Function: data -> a zip with another entry of that name."""

    def make(data):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for own, content in {**data, name: b"x"}.items():
                archive.writestr(zipfile.ZipInfo(own), content)
        return buffer.getvalue()

    return make


def damaged(data):
    """A zip in which one byte of a stored file was changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in data.items():
            archive.writestr(name, content)
    return buffer.getvalue().replace(b"codeword of", b"codeword if")


def tarred(data):
    """A tar.gz of the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in data.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


# `unzip` refuses names with `..`, asks for a password, and checks the CRC-32.
@pytest.mark.parametrize(
    "make, message",
    [
        case(with_entry("../evil.tsv"), "leads out of it", id="dots", was="failed"),
        case(with_entry("..\\evil"), "leads out of it", id="dots-back", was="failed"),
        case(with_entry("/etc/evil"), "leads out of it", id="absolute", was="failed"),
        case(with_entry("C:\\evil"), "leads out of it", id="drive", was="failed"),
        case(encrypted, "'corpus.jsonl' is encrypted", id="encrypted", was="failed"),
        case(linked, "'queries.jsonl' is a link", id="link", was="failed"),
        case(damaged, "cannot be read: Bad CRC-32", id="crc", was="failed"),
        case(
            lambda d: with_entry("x")(d)[:-30], "neither a fo", id="cut", was="passed"
        ),
        case(tarred, "unpack the tar archive first", id="tar", was="failed"),
        case(lambda d: gzip.compress(b"x"), "neither a folder", id="gz", was="passed"),
    ],
)
def test_archives_that_cannot_be_read_are_one_sentence(
    beir_folder, tmp_path, opened, make, message
):
    path = tmp_path / "tiny.zip"
    path.write_bytes(make(files_of(beir_folder)))
    with pytest.raises(ValueError, match=message):
        opened(path)


# Mirrors of BEIR publish corpus.jsonl.gz: a reader must be told what to do.
def test_a_gzipped_corpus_is_said_failed(beir_folder, opened):
    path = beir_folder / "corpus.jsonl"
    (beir_folder / "corpus.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    with pytest.raises(ValueError, match=r"found 0; unpack corpus\.jsonl\.gz first"):
        opened()


# Folders, links and the environment.


# POSIX: a shell expands `~` in an unquoted assignment only, so `export X="~/data"` and
# container files hand it over as it is. Relative paths are of the working directory.
@pytest.mark.parametrize(
    "value",
    [
        case("~/data", id="home", was="failed"),
        case("data", id="relative", was="passed"),
        case("./data/", id="slash", was="passed"),
        case(os.pathsep + "nowhere" + os.pathsep + "data", id="empty", was="passed"),
    ],
)
def test_folders_of_ehi_data(beir_folder, tmp_path, monkeypatch, value):
    shutil.copytree(beir_folder, tmp_path / "data" / "scifact")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EHI_DATA", value)
    dataset = open_dataset("beir/scifact", data_dir=tmp_path / "cache")
    monkeypatch.chdir("/")
    assert len(list(dataset.documents)) == 6


def test_a_home_that_nobody_has_is_one_sentence_failed(monkeypatch):
    monkeypatch.setenv("EHI_DATA", "~nobody-of-this-name/data")
    with pytest.raises(ValueError, match="EHI_DATA: '~nobody-of-this-name/data' has"):
        open_dataset("beir/scifact")


@pytest.mark.parametrize(
    "value",
    [
        case("~/cache", id="home", was="passed"),
        case("cache", id="relative", was="failed"),
    ],
)
def test_cache_folders_of_ehi_cache(beir_folder, tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EHI_CACHE", value)
    dataset = open_dataset(beir_folder)
    assert (tmp_path / "cache" / "datasets").is_dir()
    monkeypatch.chdir("/")
    assert [document.id for document in dataset.documents] == dataset.doc_ids


def test_links_are_followed_passed(beir_folder, tmp_path, opened):
    expected = opened()
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in beir_folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert opened(linked).qrels == expected.qrels
    assert opened(linked).name == "linked"


def test_a_broken_link_is_one_sentence_passed(beir_folder, opened):
    path = beir_folder / "corpus.jsonl"
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"expected one corpus\.jsonl .* found 0"):
        opened()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named_passed(beir_folder, opened):
    (beir_folder / "corpus.jsonl").chmod(0)
    with pytest.raises(PermissionError, match=r"corpus\.jsonl"):
        opened()


# Ratings.


# Python's csv module, pandas and R quote fields; Excel writes a byte order mark.
@pytest.mark.parametrize(
    "ratings",
    [
        case('"u","a",5.0,1\n"u","b",5.0,2\n', id="quoted", was="failed"),
        case(BOM + "u,a,5.0,1\nu,b,5.0,2\n", id="bom", was="failed"),
        case("user,item,rating,timestamp\r\nu,a,5,1\r\nu,b,5,2\r\n", id="header-crlf",
             was="passed"),
    ],
)  # fmt: skip
def test_ratings_of_other_programs(tmp_path, opened, ratings):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "ratings.csv").write_text(ratings, encoding="utf-8", newline="")
    items = [{"asin": "a", "title": "A"}, {"asin": "b", "title": "B"}]
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (folder / "metadata.jsonl").write_text(lines)
    assert opened(folder).qrels == {"test": {"u-1": {"b": 1}}}


def test_metadata_nested_too_deeply_is_one_sentence_failed(tmp_path, opened):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "ratings.csv").write_text("u,a,5.0,1\n")
    (folder / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: expected .*Recurs"):
        opened(folder)


@pytest.fixture(autouse=True)
def warnings_of_ehi(caplog):
    """`experiments.main` may have silenced the logger in another test."""
    logger = logging.getLogger("ehi")
    before = logger.propagate, logger.level
    logger.propagate = True
    logger.setLevel(logging.INFO)
    yield
    logger.propagate, logger.level = before
