import json

import pytest

from ehi.data import collection
from ehi.data.datasets import open_dataset

GOOD = {"_id": "d1", "title": "", "text": "some text"}


def write_corpus(folder, *lines):
    (folder / "corpus.jsonl").write_bytes(b"\n".join(lines))


def encoded(**changes):
    return json.dumps({**GOOD, **changes}).encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"_id": "d2", ', "not JSON"),
        (b'{"_id": "d2", "text": "\xff"}', "not UTF-8"),
        (b"[1, 2]", 'expected an object with an "_id"'),
        (b'{"text": "no id"}', 'expected an object with an "_id"'),
        (encoded(), "duplicate id 'd1'"),
        (encoded(_id="d2", text=["a"]), "'text' must be a string"),
        (encoded(_id="d2", text="x" * 101), "'text' of 'd2' has 101 characters"),
        (encoded(_id="d2", text="\ud800"), r"'text' holds half a character, '\\ud800'"),
        (encoded(_id="\udfff"), "'_id' holds half a character"),
        (b'["' + b"x" * 999 + b'"]', r"expected an object .*, got '\[\"x{77}\.\.\.$"),
    ],
)
def test_malformed_corpus_names_file_and_line(
    beir_folder, tmp_path, monkeypatch, line, message
):
    monkeypatch.setattr(collection, "MAX_CHARACTERS", 100)
    write_corpus(beir_folder, encoded(), line)
    with pytest.raises(ValueError, match=rf"corpus\.jsonl, line 2: {message}"):
        open_dataset(beir_folder, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q9\td1\t1", "unknown query 'q9'"),
        ("q1 d1 1", "expected query id, document id and an integer grade"),
        ("q1\td1\thigh", "expected query id, document id and an integer grade"),
        ("q1\td1\t2", "query 'q1' and document 'd1' are judged twice, 1 and 2"),
    ],
)
def test_malformed_qrels_name_file_and_line(beir_folder, tmp_path, line, message):
    path = beir_folder / "qrels" / "train.tsv"
    path.write_text(f"query-id\tcorpus-id\tscore\nq1\td1\t1\n{line}\n")
    with pytest.raises(ValueError, match=rf"train\.tsv, line 3: {message}"):
        open_dataset(beir_folder, data_dir=tmp_path)


def test_empty_corpus_is_refused(beir_folder, tmp_path):
    write_corpus(beir_folder, b"", b"")
    with pytest.raises(ValueError, match=r"corpus\.jsonl holds no document"):
        open_dataset(beir_folder, data_dir=tmp_path)


def test_empty_query_is_refused(beir_folder, tmp_path):
    (beir_folder / "queries.jsonl").write_text('{"_id": "q1", "text": ""}\n')
    with pytest.raises(ValueError, match=r"queries\.jsonl, line 1: query 'q1' has no"):
        open_dataset(beir_folder, data_dir=tmp_path)


def test_folder_without_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected one corpus\.jsonl .* found 0"):
        open_dataset(tmp_path, data_dir=tmp_path)
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="neither a folder nor a zip file"):
        open_dataset(tmp_path / "file", data_dir=tmp_path)


def test_what_real_files_have_is_accepted(beir_folder, tmp_path):
    lines = [
        b"\xef\xbb\xbf" + encoded(),
        b"",
        encoded(_id=2, title=None, metadata={"url": "x"}) + b"\r",
        encoded(_id="d\u00e9"),
    ]
    write_corpus(beir_folder, *lines)
    repeated = "q1\td1\t1\r\nq1\td1\t1\nq2\td\u00e9\t-1\n"
    (beir_folder / "qrels" / "train.tsv").write_text(repeated)
    (beir_folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    dataset = open_dataset(beir_folder, data_dir=tmp_path)
    assert dataset.doc_ids == ["d1", "2", "d\u00e9"]
    assert dataset.qrels == {"train": {"q1": {"d1": 1}, "q2": {"d\u00e9": -1}}}
    assert dataset.positives("train")[0].tolist() == [0]
