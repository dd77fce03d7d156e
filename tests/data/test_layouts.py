"""One corpus in every layout is one data set; what is wrong with files is said."""

import dataclasses
import shutil
import sys

import numpy as np
import pytest
from layouts import (
    MAKE,
    NEEDS,
    TRIPLES,
    as_ir_datasets,
    as_msmarco,
    as_parquet,
    write_table,
)

from ehi.data import candidates, tfds_builder
from ehi.data.datasets import open_dataset


def contents(dataset):
    """Everything but where it was found and what it was made from."""
    fields = {f.name: getattr(dataset, f.name) for f in dataclasses.fields(dataset)}
    del fields["source"], fields["candidates"], fields["fields"]
    return {**fields, "documents": list(dataset.documents)}


@pytest.fixture
def opened(tmp_path):
    return lambda name: open_dataset(name, data_dir=tmp_path / "cache")


@pytest.mark.parametrize("layout", MAKE)
def test_one_corpus_in_every_layout_is_one_data_set(
    beir_folder, tmp_path, opened, layout
):
    if layout in NEEDS:
        pytest.importorskip(NEEDS[layout])
    expected = opened(beir_folder)
    made = MAKE[layout](beir_folder, tmp_path / "other" / "tiny")
    found = opened(made)
    assert found.corpus_sha256 == expected.corpus_sha256
    assert contents(found) == contents(expected)
    assert contents(opened(made)) == contents(expected)  # from the prepared copy


def test_documents_of_ms_marco_have_other_names(beir_folder, tmp_path, opened):
    folder = as_msmarco(beir_folder, tmp_path / "docs")
    rows = [line.split("\t") for line in (folder / "collection.tsv").open()]
    (folder / "collection.tsv").unlink()
    with_address = [(id, "http://x", title, text.strip()) for id, title, text in rows]
    write_table(folder / "msmarco-docs.tsv.gz", with_address)
    for old, new in (
        ("queries.train.tsv", "msmarco-doctrain-queries.tsv"),
        ("qrels.train.tsv", "msmarco-doctrain-qrels.tsv"),
        ("qrels.test.tsv", "2019qrels-docs.txt"),
    ):
        (folder / old).rename(folder / new)
    found, expected = opened(folder), opened(beir_folder)
    assert found.corpus_sha256 == expected.corpus_sha256
    assert found.qrels == expected.qrels


def test_passages_have_no_title(tmp_path, opened):
    folder = tmp_path / "marco"
    write_table(folder / "collection.tsv", [("7", "some text"), ("8", "")])
    dataset = opened(folder)
    assert [vars(d) for d in dataset.documents] == [
        {"id": "7", "title": "", "text": "some text"},
        {"id": "8", "title": "", "text": ""},
    ]
    assert dataset.query_ids == [] and dataset.qrels == {}


def test_names_of_splits_of_the_release(beir_folder, tmp_path, opened):
    folder = as_msmarco(beir_folder, tmp_path / "marco")
    for name in ("queries", "qrels"):
        (folder / f"{name}.test.tsv").rename(folder / f"{name}.dev.small.tsv")
    write_table(folder / "queries.eval.tsv", [("e1", "never judged")])
    dataset = opened(folder)
    assert sorted(dataset.qrels) == ["dev", "train"]
    assert (
        "e1" not in dataset.query_ids and "1 queries that no file" in dataset.notes[0]
    )
    shutil.copy(folder / "qrels.dev.small.tsv", folder / "qrels.dev.tsv")
    shutil.copy(folder / "queries.dev.small.tsv", folder / "queries.dev.tsv")
    assert sorted(opened(folder).qrels) == ["dev", "dev.small", "train"]


def change(name, *rows, append=False):
    """A function that writes rows to a file of MS MARCO's tables."""

    def apply(folder):
        path = folder / name
        before = [line.split("\t") for line in path.read_text().splitlines()]
        write_table(path, [*(before if append else []), *rows])

    return apply


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (change("collection.tsv", ("d1", "t", "x"), ("d2", "x")),
         "collection.tsv, line 2: expected .* got 2 columns: 'd2"),
        (change("collection.tsv", ("d1",)), "line 1: expected .* got 1 column: 'd1'"),
        (change("collection.tsv", ("d1", "t", "x"), append=True),
         "collection.tsv, line 7: duplicate id 'd1'"),
        (change("collection.tsv"), "collection.tsv holds no document"),
        (change("queries.train.tsv", ("q1", "a", "b")),
         "queries.train.tsv, line 1: expected query id and text .* got 3 columns"),
        (change("queries.train.tsv", ("q1", "another text"), append=True),
         "queries.train.tsv, line 4: duplicate id 'q1'"),
        (change("queries.test.tsv", ("q4", " ")), "line 1: query 'q4' has no text"),
        (change("qrels.train.tsv", ("q9", 0, "d1", 1)),
         "qrels.train.tsv, line 1: unknown query 'q9'"),
        (change("qrels.train.tsv", ("q1", 0, "d1", 1), ("q1", 0, "d1", "x")),
         "qrels.train.tsv, line 2: expected .* an integer grade"),
        (change("qrels.train.tsv", ("q1", 0, "d1", 1), ("q1", 0, "d1")),
         "qrels.train.tsv, line 2: expected query id"),
        (change("qrels.train.tsv", ("q1", 0, "gone", 1)),
         "qrels.train.tsv, line 1: unknown document 'gone'"),
        (lambda folder: [f.unlink() for f in folder.glob("queries*")],
         "has judgements, but none of their queries"),
        (lambda folder: shutil.copy(folder / "qrels.test.tsv",
                                    folder / "qrels.test.txt"),
         "are both judgements of split 'test'"),
    ],
)  # fmt: skip
def test_mistakes_in_tables_name_file_and_line(
    beir_folder, tmp_path, opened, break_it, message
):
    folder = as_msmarco(beir_folder, tmp_path / "marco")
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        opened(folder)
    assert not any((tmp_path / "cache" / "datasets").glob("*"))


def test_a_cut_gzip_file_is_one_sentence(beir_folder, tmp_path, opened):
    folder = as_msmarco(beir_folder, tmp_path / "marco", packed=True)
    path = folder / "collection.tsv.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"collection\.tsv\.gz is no whole gzip file"):
        opened(folder)


# Triples and scores of teachers.


def lists_of(dataset):
    """Query id -> document id -> score, None without one."""
    found = dataset.candidates
    return {
        id: {
            dataset.doc_ids[document]: None if np.isnan(score) else round(score, 2)
            for document, score in zip(
                found.documents[start:end].tolist(),
                found.scores[start:end].tolist(),
                strict=True,
            )
        }
        for id, start, end in zip(
            dataset.query_ids, found.offsets[:-1], found.offsets[1:], strict=True
        )
        if end > start
    }


EXPECTED = {"q1": {"d3": None, "d4": None}, "q3": {"d6": None}}


@pytest.mark.parametrize("layout", ["beir", "msmarco", "parquet", "ir_datasets"])
def test_triples_come_with_every_layout(beir_folder, tmp_path, opened, layout):
    if layout in NEEDS:
        pytest.importorskip(NEEDS[layout])
    made = beir_folder
    if layout != "beir":
        made = MAKE[layout](beir_folder, tmp_path / "other" / "marco")
    if layout != "ir_datasets":
        assert opened(made).candidates is None
        write_table(made / "qidpidtriples.train.full.2.tsv.gz", TRIPLES)
    dataset = opened(made)
    assert lists_of(dataset) == EXPECTED
    assert lists_of(opened(made)) == EXPECTED  # from the prepared copy


def test_scores_of_a_teacher(beir_folder, opened, monkeypatch):
    write_table(beir_folder / "bert_cat_msmarcopassage_train_scores_ids.tsv", [
        (9.5, -1.25, "q1", "d1", "d3"), (8, 2.5, "q2", "d2", "d4"),
        (9.5, 3, "q1", "d1", "d5"), (1, 2, "gone", "d1", "d5"),
    ])  # fmt: skip
    write_table(beir_folder / "qidpidtriples.train.tsv", TRIPLES)
    dataset = opened(beir_folder)
    assert lists_of(dataset) == {
        "q1": {"d1": 9.5, "d3": -1.25, "d5": 3.0, "d4": None},
        "q2": {"d2": 8.0, "d4": 2.5},
        "q3": {"d6": None},
    }
    assert "1 triple of" in dataset.notes[0] and "'gone'" in dataset.notes[0]
    monkeypatch.setattr(candidates, "KEPT", 1)
    shutil.copy(beir_folder / "queries.jsonl", beir_folder / "copy")  # another key is
    write_table(beir_folder / "qidpidtriples.train.tsv", TRIPLES[:3])  # needed
    assert lists_of(opened(beir_folder))["q1"] == {"d1": 9.5}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("qidpidtriples.tsv", ("q1", "d1"), "line 1: expected query id, positive id"),
        ("a_scores_ids.tsv", ("q1", "d1", "d2"), "line 1: expected two scores"),
        ("a_scores_ids.tsv", ("x", 1, "q1", "d1", "d2"), "line 1: expected two scores"),
        ("a_scores_ids.tsv", ("nan", 1, "q1", "d1", "d2"), "expected two scores"),
        ("qidpidtriples.tsv", ("q8", "d1", "d2"), "neither query nor document.*'q8'"),
        ("triples.train.small.tsv", ("a", "b", "c"), "holds texts: give qidpidtriples"),
    ],
)
def test_triples_that_cannot_be_meant_are_refused(
    beir_folder, opened, name, row, message
):
    write_table(beir_folder / name, [row])
    with pytest.raises(ValueError, match=message):
        opened(beir_folder)


# Libraries.


def test_layouts_of_parquet_folders(beir_folder, tmp_path, opened):
    pytest.importorskip("pyarrow")
    expected, folder = opened(beir_folder), tmp_path / "hub"
    as_parquet(beir_folder, folder)
    moved = {
        "corpus/corpus-00000-of-00002.parquet": "data/corpus-00000-of-00002.parquet",
        "corpus/corpus-00001-of-00002.parquet": "data/corpus-00001-of-00002.parquet",
        "queries/queries-00000-of-00001.parquet": "queries.parquet",
        "qrels/test-00000-of-00001.parquet": "default/test/0000.parquet",
        "qrels/train-00000-of-00001.parquet": "default/train/0000.parquet",
    }
    for old, new in moved.items():
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)
    for name in ("corpus", "queries", "qrels"):
        (folder / name).rmdir()
    found = opened(folder)
    assert found.corpus_sha256 == expected.corpus_sha256
    assert found.qrels == expected.qrels and found.query_texts == expected.query_texts
    shutil.rmtree(folder / "default")
    shutil.copytree(beir_folder / "qrels", folder / "qrels")  # as BeIR/<name>-qrels
    assert opened(folder).qrels == expected.qrels


def parquet_without(column):
    def apply(folder):
        import pyarrow.parquet as pq

        path = next((folder / "corpus").iterdir())
        pq.write_table(pq.read_table(path).drop_columns([column]), path)

    return apply


def remove_shard(folder):
    (folder / "corpus" / "corpus-00000-of-00002.parquet").unlink()


def cut_file(folder):
    next((folder / "queries").iterdir()).write_bytes(b"PAR1 and nothing else")


def grade_of_half(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"query-id": "q1", "corpus-id": "d1", "score": 0.5}]
    path = folder / "qrels" / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (parquet_without("_id"), "has no column '_id' or .*it has title, text"),
        (parquet_without("text"), "has no column 'text' or"),
        (remove_shard, "is one of 2 shards, and 1 are there: shard 0 is missing"),
        (cut_file, "queries-00000-of-00001.parquet cannot be read"),
        (grade_of_half, "parquet, row 1: expected an integer grade, got 0.5"),
    ],
)
def test_mistakes_in_parquet_files(beir_folder, tmp_path, opened, break_it, message):
    pytest.importorskip("pyarrow")
    folder = as_parquet(beir_folder, tmp_path / "hub")
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        opened(folder)


def test_ids_of_ir_datasets_that_cannot_be_meant(beir_folder, tmp_path, opened):
    pytest.importorskip("ir_datasets")
    name = as_ir_datasets(beir_folder, "mine")
    other = as_ir_datasets(beir_folder, "yours").removeprefix("ir_datasets:")
    with pytest.raises(ValueError, match="no data set 'mine/nothing'"):
        opened("ir_datasets:mine/nothing")
    with pytest.raises(ValueError, match="'mine/test' and 'yours/test' are both"):
        opened(f"{name}+{other}")
    with pytest.raises(ValueError, match="'mine/test' and 'yours/train' have other"):
        opened("ir_datasets:mine/test+yours/train")


@pytest.mark.parametrize("missing", ["pyarrow", "ir_datasets"])
def test_a_missing_library_is_one_sentence(
    beir_folder, tmp_path, opened, monkeypatch, missing
):
    pytest.importorskip("pyarrow")
    name = as_parquet(beir_folder, tmp_path / "hub")
    name = name if missing == "pyarrow" else "ir_datasets:beir/scifact"
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=f"needs {missing}: python -m pip install"):
        opened(name)


def test_a_corpus_of_several_shards_keeps_its_order(tmp_path, opened, monkeypatch):
    rows = [(f"d{n}", f"text {n}") for n in range(3000)]
    write_table(tmp_path / "large" / "collection.tsv", rows)
    monkeypatch.setattr(tfds_builder, "RECORDS_OF_A_SHARD", 1300)
    dataset = opened(tmp_path / "large")
    assert len(list((tmp_path / "cache").rglob("*array_record-*"))) == 3
    assert [document.id for document in dataset.documents] == [id for id, _ in rows]
    assert dataset.documents[2999].text == "text 2999"
