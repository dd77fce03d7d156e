"""Data sets as other projects publish them: documents, judgements, folders, ratings.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import json
import os
import shutil

import numpy as np
import pytest
from collection_files import BOM, add_line, files_of, zip_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wild_cases import failed, passed

from ehi.data.datasets import open_dataset
from ehi.data.pseudo_queries import pseudo_queries
from ehi.eval.metrics import evaluate

pytestmark = pytest.mark.usefixtures("warnings_of_ehi")


# Documents.


# BEIR embeds `(title + " " + text).strip()`, which is "" here; public FiQA has some.
@pytest.mark.parametrize(
    "record",
    [
        failed({"_id": "d7", "title": "", "text": ""}, id="empty"),
        failed({"_id": "d7", "title": " ", "text": "\n"}, id="blank"),
        failed({"_id": "d7"}, id="no-fields"),
        failed({"_id": "d7", "title": None, "text": None}, id="null"),
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
        passed(BOM + '{"_id": "d1", "text": "t"}', ["d1"], id="bom"),
        passed('{"_id": 1, "text": "t"}\r', ["1"], id="number-crlf"),
        passed('{"_id": "\\u00e9", "text": "t"}', ["\u00e9"], id="escape"),
        passed(
            '{"_id": "\\ud83d\\ude00", "text": "t"}', ["\U0001f600"],
            id="surrogate-pair",
        ),
        passed('{"_id": "a b\\"c", "text": "t"}', ['a b"c'], id="space"),
        passed('{"_id": "d", "text": "a\\u0000b"}', ["d"], id="nul-text"),
        passed(
            '{"_id": "d", "text": "a\\u2028b\\u0085c"}', ["d"],
            id="line-separators",
        ),
        # trec_eval ends a name at NUL: two ids could become one.
        failed('{"_id": "a\\u0000b", "text": "t"}', "NUL", id="nul-id"),
        failed('{"_id": true, "text": "t"}', 'an "_id"', id="bool-id"),
        passed('{"_id": "\\ud800"}', "half a character", id="surrogate"),
        failed(
            '{"_id": "d", "text": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "line 1: the JSON is nested too deeply", id="deep",
        ),
        failed(
            '{"_id": 1' + "0" * 5000 + ', "text": "t"}', "line 1: not JSON",
            id="long-number",
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


# BEIR fails on an unknown query.
@pytest.mark.parametrize(
    "content, message",
    [
        passed("q9\td1\t1\n", "unknown query 'q9'", id="query"),
        passed("q4\td1\t1.5\n", "an integer grade", id="fraction"),
        passed("q4\td1\tnan\n", "an integer grade", id="nan"),
        passed("q4\td1\t1e99\n", "an integer grade", id="huge"),
        failed("q4\td1\t1_0\n", "an integer grade", id="underscore"),
        failed("q4\td1\t\u0661\n", "an integer grade", id="arabic-digit"),
        passed("q4,d1,1\n", "between tabs", id="commas"),
        passed("q4\td1\t1\rq5\td6\t1\r", "between tabs", id="old-mac"),
        passed("q4\td1\t1\t0\n", "unknown document '1'|tabs", id="date"),
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
        failed("q4\td4\t1.0\nq5\td6\t2.\n", id="float"),
        failed("q4\td4\t+1\nq5\td6\t2e0\n", id="signed-exponent"),
        failed("q4\td4\t1 \nq5\td6\t2\t\n", id="trailing-tab"),
        # BEIR reads with Python's csv.QUOTE_MINIMAL, which removes quotes.
        failed('"q4"\t"d4"\t1\nq5\td6\t2\n', id="quoted"),
        failed('"q4"\t"d4"\t"1"\n"q5"\t"d6"\t"2.0"\n', id="all-quoted"),
        failed(
            '"query-id"\t"corpus-id"\t"score"\nq4\td4\t1\nq5\td6\t2\n',
            id="quoted-header",
        ),
        # trec_eval: query, iteration, document, grade, between any white space.
        failed("q4 0 d4 1\nq5 0 d6 2\n", id="trec"),
        failed("q4\tQ0\td4\t1\nq5\tQ0\td6\t2\n", id="trec-tabs"),
        # Data sets of others name the columns differently; BEIR skips any first line.
        failed("Query-ID\tCorpus-ID\tScore\nq4\td4\t1\nq5\td6\t2\n", id="capitals"),
        failed("query_id\tdoc_id\tgrade\nq4\td4\t1\nq5\td6\t2\n", id="underscores"),
        passed(BOM + "query-id\tcorpus-id\tscore\nq4\td4\t1\nq5\td6\t2\n", id="bom"),
        passed("\r\nq4\td4\t1\r\n\r\nq5\td6\t2\r\n", id="crlf-blank"),
        passed("q4\td4\t1\nq4\td4\t1\nq5\td6\t2", id="repeated"),
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
        failed("qrels/._test.tsv", id="apple-double"),
        failed("qrels/.test.tsv", id="hidden"),
        passed("qrels/.~lock.test.tsv#", id="lock"),
        passed("qrels/.ipynb_checkpoints/test.tsv", id="notebook"),
        passed("qrels/README.md", id="readme"),
        passed("._corpus.jsonl", id="corpus"),
        failed("ratings.csv", id="stray-ratings"),
        passed("__MACOSX/corpus.jsonl", id="macosx"),
        passed("stats.tsv", id="other-table"),
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
        failed({"qrels/test.tsv": "test.tsv"}, id="beside-corpus"),
        failed({"qrels/test.tsv": "qrels.tsv"}, id="one-file"),
        failed(
            {"qrels/test.tsv": "qrels/test.txt", "qrels/train.tsv": "qrels/a.txt"},
            id="txt",
        ),
        failed(
            {"qrels/test.tsv": "Qrels/test.tsv", "qrels/train.tsv": "Qrels/a.tsv"},
            id="capital",
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


# Folders, links and the environment.


# POSIX: a shell expands `~` in an unquoted assignment only, so `export X="~/data"` and
# container files hand it over as it is. Relative paths are of the working directory.
@pytest.mark.parametrize(
    "value",
    [
        failed("~/data", id="home"),
        passed("data", id="relative"),
        passed("./data/", id="slash"),
        passed(os.pathsep + "nowhere" + os.pathsep + "data", id="empty"),
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
        passed("~/cache", id="home"),
        failed("cache", id="relative"),
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
        failed('"u","a",5.0,1\n"u","b",5.0,2\n', id="quoted"),
        failed(BOM + "u,a,5.0,1\nu,b,5.0,2\n", id="bom"),
        passed("user,item,rating,timestamp\r\nu,a,5,1\r\nu,b,5,2\r\n",
               id="header-crlf"),
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
