"""Fields of documents beside title and text, in every layout."""

import json

import pytest
from layouts import write_table

from ehi.data.datasets import open_dataset
from ehi.index.columns import Metadata

RECORDS = [
    {"lang": "en", "metadata": {"year": 2020, "url": "a"}},
    {"lang": None, "tags": ["x"], "metadata": {}},
    {"reviewed": True, "year": 7},
]


def beir(folder):
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"_id": f"d{n}", "title": "", "text": "word"} | record)
        for n, record in enumerate(RECORDS)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder


def opened(path, tmp_path):
    return open_dataset(path, data_dir=tmp_path / "cache")


def test_fields_of_a_beir_corpus(tmp_path):
    dataset = opened(beir(tmp_path / "beir"), tmp_path)
    assert dataset.documents[0].text == "word"
    assert list(dataset.metadata(["lang", "year"])) == [
        {"lang": "en", "year": 2020}, {"lang": None}, {"year": 7},
    ]  # fmt: skip
    # All that a search can filter by; the list is none of it.
    kept = Metadata.of(dataset.metadata(["*"]))
    kinds = {"lang": "text", "reviewed": "bool", "url": "text", "year": "number"}
    assert kept.fields == kinds and kept[2] == {"reviewed": True, "year": 7}
    with pytest.raises(ValueError, match="'tags' of document 1 must be a text"):
        Metadata.of(dataset.metadata(["tags"]))
    with pytest.raises(ValueError, match="beir has the metadata 'x'; there are 'lang'"):
        list(dataset.metadata(["x", "lang"]))


def test_fields_of_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    import datetime

    table = {
        "_id": ["a", "b"], "text": ["x", "y"], "year": [2001, None],
        "day": [datetime.date(2024, 5, 31), None],
    }  # fmt: skip
    (tmp_path / "set" / "corpus").mkdir(parents=True)
    file = tmp_path / "set" / "corpus" / "corpus-00000-of-00001.parquet"
    pq.write_table(pa.table(table), file)
    kept = Metadata.of(opened(tmp_path / "set", tmp_path).metadata(["*"]))
    assert [kept[0], kept[1]] == [{"day": "2024-05-31", "year": 2001}, {}]
    pq.write_table(pa.table({"_id": ["a"], "text": ["x"]}), file)
    with pytest.raises(ValueError, match="metadata 'year'; there are none"):
        list(opened(tmp_path / "set", tmp_path).metadata(["year"]))


def test_the_address_of_msmarco_is_a_field(tmp_path):
    rows = [("D1", "http://x", "a title", "text")]
    write_table(tmp_path / "ms" / "msmarco-docs.tsv", rows)
    dataset = opened(tmp_path / "ms", tmp_path)
    assert list(dataset.metadata(["url"])) == [{"url": "http://x"}]
