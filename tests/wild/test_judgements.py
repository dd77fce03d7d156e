"""Judgements in odd places, empty, or of documents that the corpus lacks.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. What is refused here would give a run that trains
to the end and then has nothing to score.
"""

import gzip
import shutil

import numpy as np
import pytest
from collection_files import files_of, zip_of
from wild_cases import failed, passed

from experiments.run.prepare import _labelled

pytestmark = pytest.mark.usefixtures("warnings_of_ehi")

LINE = "q4\td4\t1\n"
NOT_READ = r"is not read: judgements must be in qrels/<"


def put(folder, name, content=LINE):
    """Write a file below a folder, gzipped if its name says so."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


# TREC calls the files qrels.<split>.txt or <split>.qrels, MS MARCO qrels.<split>.tsv.
@pytest.mark.parametrize(
    "name",
    [
        failed("qrels.test.tsv"),
        failed("qrels.txt"),
        failed("test.qrels"),
        failed("qrels-test.tsv"),
        failed("dev.txt"),
        failed("Test.TSV.gz"),
        failed("qrel/test.tsv"),
        failed("judgements/test.tsv"),
        failed("judgments/test.tsv"),
        failed("judgments.txt"),
        passed("valid.tsv"),
    ],
)
def test_judgements_beside_a_corpus_without_qrels_are_said(
    beir_folder, tmp_path, opened, name
):
    shutil.rmtree(beir_folder / "qrels")
    put(beir_folder, name)
    with pytest.raises(ValueError, match=NOT_READ):
        opened()
    with pytest.raises(ValueError, match=NOT_READ):
        opened(zip_of(tmp_path / "zipped.zip", files_of(beir_folder)))


@pytest.mark.parametrize(
    "name",
    [
        failed("qrels/train.TSV"),
        failed("qrels/train.csv"),
        failed("qrels/train.txt"),
        failed("qrels/train.tsv.gz"),
        failed("qrels/train"),
        failed("qrels/sub/train.tsv"),
        failed("qrels/train/part-0.tsv"),
        failed("qrels.train.tsv"),
        failed("qrels_train.txt"),
        failed("qrel/train.tsv"),
        failed("train.csv"),
        passed("train.tsv"),
        passed("qrels.tsv"),
    ],
)
def test_a_split_that_is_not_read_is_said(beir_folder, opened, name):
    (beir_folder / "qrels" / "train.tsv").unlink()
    put(beir_folder, name)
    with pytest.raises(ValueError, match=NOT_READ):
        opened()


# A copy of a split that is read, and files that are no judgements, do no harm.
@pytest.mark.parametrize(
    "name",
    [
        passed("qrels/test.tsv.bak"),
        passed("qrels/train.csv"),
        passed("qrels/raw/test.tsv"),
        passed("qrels/notes.txt"),
        passed("qrels.zip"),
        passed("make_qrels.py"),
        passed("qrels.test.tsv"),
        passed("qrels_old/test.tsv"),
        passed("test.csv"),
        passed("dev.jsonl"),
        passed("dev/readme.txt"),
        passed("latest.txt"),
    ],
)
def test_files_beside_judgements_that_are_read_are_skipped(beir_folder, opened, name):
    expected = opened().qrels
    put(beir_folder, name)
    assert opened().qrels == expected


# A corpus without judgements may be of law, and have its sources beside it.
@pytest.mark.parametrize(
    "name",
    [
        passed("judgements/1987.txt"),
        passed("court_judgements.csv"),
        passed("train/part.txt"),
        passed("notes.txt"),
    ],
)
def test_sources_beside_a_corpus_without_judgements_are_skipped(
    beir_folder, opened, name
):
    shutil.rmtree(beir_folder / "qrels")
    put(beir_folder, name)
    assert opened().qrels == {}


HEADER = "query-id\tcorpus-id\tscore\n"


@pytest.mark.parametrize(
    "content", [failed("", id="empty"), failed(HEADER, id="header")]
)
def test_a_split_without_judgements_is_said(beir_folder, opened, caplog, content):
    put(beir_folder, "qrels/test.tsv", content)
    dataset = opened()
    assert "tiny: qrels/test.tsv holds no judgement" in caplog.text
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        dataset.check_relevant("test")
    (beir_folder / "qrels" / "train.tsv").unlink()
    with pytest.raises(ValueError, match=r"test\.tsv holds no judgement, and no other"):
        opened()


@pytest.mark.parametrize(
    "content",
    [failed("q1\td1\t0\nq2\td2\t-1\n", id="zero"), failed("q1\tgone\t1\n", id="gone")],
)
def test_nothing_to_train_on_is_said_before_training(
    beir_folder, opened, caplog, content
):
    put(beir_folder, "qrels/train.tsv", content)
    dataset = opened()
    assert [len(column) for column in _labelled(dataset)] == [0, 0]
    assert "tiny: no judgement of split 'train' has a grade above 0" in caplog.text
    dataset.check_relevant("test")


# trec_eval scores such queries as 0; a subset of a corpus may lose all of one split.
def test_a_split_of_missing_documents_is_no_reason_to_refuse_others_failed(
    beir_folder, opened, caplog
):
    put(beir_folder, "qrels/dev.tsv", "q4\tx\t1\nq5\ty\t1\n")
    dataset = opened()
    assert "2 judgements of qrels/dev.tsv on 2 documents that the" in caplog.text
    assert dataset.qrels["test"]["q4"] == {"d4": 1}
    dataset.check_relevant("test")
    with pytest.raises(ValueError, match="no relevant document of split 'dev', such"):
        dataset.check_relevant("dev")
    assert np.array(dataset.positives("dev")).size == 0


def test_judgements_of_another_corpus_are_refused_failed(beir_folder, opened):
    for split in ("train", "test"):
        put(beir_folder, f"qrels/{split}.tsv", "q4\tx\t1\nq5\ty\t1\n")
    message = "line 1: unknown document 'x', and the corpus has none of the other"
    with pytest.raises(ValueError, match=message):
        opened()


def test_a_query_called_query_in_quotes_is_no_header_failed(beir_folder, opened):
    put(beir_folder, "queries.jsonl", '{"_id": "query", "text": "t"}\n')
    (beir_folder / "qrels" / "train.tsv").unlink()
    put(beir_folder, "qrels/test.tsv", '"query"\t"d1"\t"1"\n')
    assert opened().qrels == {"test": {"query": {"d1": 1}}}


# Windows and DOS programs write names in capitals.
@pytest.mark.parametrize("name", [failed("ARGUANA.ZIP"), passed("arguana.zip")])
def test_the_name_of_a_zip_has_no_ending(beir_folder, tmp_path, opened, name):
    dataset = opened(zip_of(tmp_path / name, files_of(beir_folder)))
    assert dataset.name == name[: -len(".zip")]
