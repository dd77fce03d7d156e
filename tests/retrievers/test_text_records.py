"""Documents with texts in an index folder, without any framework."""

import doctest
import importlib
import sys

import numpy as np
import pytest
from retriever_cases import IDS, METADATA, TEXTS, text_index

from ehi import retrievers
from ehi.index import build_index, open_index, save_index
from ehi.retrievers import langchain_store, metadata_filters, text_records
from ehi.retrievers.text_records import Records


def kept(*texts):
    return [{"text": text, "metadata": {"length": len(text)}} for text in texts]


def test_an_empty_store_answers_nothing():
    records = Records()
    assert len(records) == 0 and records.all() == [] and records.get(["a"]) == []
    assert records.search([1.0, 0.0], k=3) == [] and records.remove(["a"]) == 0
    records.put([], [], [])
    assert records.index is None


def test_two_stores_on_a_new_folder_lose_nothing(tmp_path):
    one, other = Records(tmp_path / "index"), Records(tmp_path / "index")
    one.put(["a"], [[1, 0]], kept("a"))
    other.put(["b"], [[0, 1]], kept("b"))
    assert [r.text for r in Records(tmp_path / "index").all()] == ["a", "b"]


def test_ids_that_no_index_of_numbers_can_have_are_absent(tmp_path):
    index = build_index(np.eye(2), [7, 8], tree=None)
    save_index(index, tmp_path / "index", documents=["a", "b"])
    records = Records(tmp_path / "index")
    ids = ["x", "-7", "07", "٧", str(2**63), "1" * 5000]
    assert records.get([*ids, "8"])[0].text == "b" and records.remove(ids) == 0
    with pytest.raises(ValueError, match="are whole numbers below 2.63, got 'x'"):
        records.put(["9", "x"], np.eye(2), kept("c", "d"))
    assert len(records) == 2


def test_documents_are_added_replaced_and_deleted(tmp_path):
    records = Records(tmp_path / "index")
    records.put(["a", "b", "a"], [[1, 0], [0, 2], [1, 1]], kept("old", "b", "new"))
    assert [r.text for r in records.all()] == ["new", "b"]
    records.put(["b", "c"], [[0, 5], [3, 0]], kept("B", "c"))
    assert [r.text for r in records.get(["c", "x", "b"])] == ["c", "B"]
    found = records.search([0, 10], k=2)
    assert [r.id for r in found] == ["b", "a"]
    assert found[0].score == pytest.approx(1) and found[1].score == pytest.approx(
        0.5**0.5
    )
    assert records.remove(["b", "x"]) == 1 and len(records) == 2
    again = Records(tmp_path / "index")
    assert [r.metadata for r in again.all()] == [{"length": 3}, {"length": 1}]
    assert again.remove(["a", "c"]) == 2 and again.search([0, 1], k=1) == []
    again.put(["d"], [[1, 1]], kept("d"))
    assert [r.id for r in again.search([0, 1], k=5)] == ["d"]


def test_many_small_additions_are_merged(monkeypatch):
    monkeypatch.setattr(text_records, "_MOST_SEGMENTS", 3)
    records = Records()
    for i in range(8):
        records.put([f"d{i}"], np.eye(8)[i : i + 1], kept(f"text {i}"))
    assert len(records.index.segments) <= 4
    assert records.search(np.eye(8)[5], k=1)[0].text == "text 5"


def test_a_temporary_store_goes_with_its_object():
    records = Records()
    records.put(["a"], [[1, 0]], kept("a"))
    path = records.path
    assert path.exists()
    del records
    assert not path.exists()


@pytest.mark.parametrize("columns", [True, False])
def test_texts_are_found_by_the_encoder_of_the_index(tmp_path, columns):
    records = Records.existing(text_index(tmp_path / "index", columns))
    for id, text, metadata in zip(IDS, TEXTS, METADATA, strict=True):
        best = records.search_text(text, k=1)[0]
        assert (best.id, best.text, best.metadata) == (id, text, metadata)


def test_columns_get_the_fields_of_what_is_added(tmp_path):
    records = Records(text_index(tmp_path / "index", columns=True))
    x = np.ones((1, 32), np.float32)
    records.put(["new"], x, [{"text": "t", "metadata": {"lang": "fr", "city": "Rome"}}])
    assert records.index.where("lang == 'fr'").tolist()[-1]
    assert records.get(["new"])[0].metadata == {"lang": "fr", "city": "Rome"}


def test_records_of_other_makers_are_shown(tmp_path):
    values = [{"id": "a", "title": "f", "line": "def f():"}, "words", {"n": 1}]
    index = build_index(np.eye(3), [7, 8, 9], tree=None)
    save_index(index, tmp_path / "index", documents=values)
    records = Records(tmp_path / "index")
    found = records.get(["7", "no number", "8", "99"])
    assert [r.text for r in found] == ["f\ndef f():", "words"]
    assert found[0].metadata == {"title": "f"}
    assert records.remove(["8"]) == 1
    assert records.search([0, 0.5, 1], k=1)[0].metadata == {"n": 1}


def test_vectors_of_a_fitted_index_are_taken_as_given(tmp_path):
    """`ehi.fit` is not run here: its maps of the metric are what matters."""
    from ehi.data.vectors.metric import Metric
    from ehi.vector_index import described

    x = np.random.default_rng(0).normal(3, 1, (20, 4)).astype(np.float32)
    maps = Metric.fit("l2", x, 1)
    index = build_index(
        maps.documents(x), [f"d{i}" for i in range(20)], tree=None,
        encoder=described(maps),
    )  # fmt: skip
    save_index(index, tmp_path / "index", documents=[{"text": str(i)} for i in x])
    records = Records(tmp_path / "index")
    for row, vector in enumerate(x):
        nearest = np.argsort(((x - vector) ** 2).sum(axis=1))[1]
        hits = records.search(vector, k=2)
        assert [r.id for r in hits] == [f"d{row}", f"d{nearest}"]
    records.put(["new"], x[:1] + 0.001, kept("new"))
    assert {r.id for r in records.search(x[0], k=2)} == {"d0", "new"}


def test_a_narrow_filter_finds_documents_in_other_leaves(tmp_path):
    x = np.repeat(np.eye(4), 5, axis=0) + np.linspace(0, 0.1, 20)[:, None]
    tree = {"kind": "per_node", "nodes": [np.eye(4)[None]], "scale": 9.0}
    index = build_index(x, [f"d{i}" for i in range(20)], tree=tree)
    save_index(index, tmp_path / "index", documents=kept(*map(str, range(20))))
    records = Records(tmp_path / "index")
    assert {r.id for r in records.search(x[0], k=5)} == {f"d{i}" for i in range(5)}
    assert len(records.search(x[0], k=9)) == 9
    only = np.arange(20) == 17
    assert [r.id for r in records.search(x[0], k=2, allow=only)] == ["d17"]
    assert records.search(x[0], k=2, allow=only, beam=1) == []
    assert [r.id for r in records.search(x[0], k=2, allow=["d17"])] == ["d17"]
    records.remove(["d17"])
    assert records.search(x[0], k=2, allow=only) == []


def test_mistakes(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(FileNotFoundError, match="thesis holds no index"):
        Records(tmp_path / "thesis")
    with pytest.raises(FileNotFoundError, match="nothing holds no index"):
        Records.existing(tmp_path / "nothing")
    save_index(build_index(np.eye(3), [7, 8, 9], tree=None), tmp_path / "bare")
    with pytest.raises(ValueError, match="bare keeps no documents"):
        Records.existing(tmp_path / "bare")
    records = Records(tmp_path / "index")
    with pytest.raises(ValueError, match="must be JSON"):
        records.put(["a"], [[1, 0]], [{"text": "a", "metadata": {"x": {1, 2}}}])
    assert not (tmp_path / "index").exists()
    records.put(["a"], [[1, 0]], kept("a"))
    with pytest.raises(ValueError, match="width 3, the index 2"):
        records.put(["b"], [[1, 0, 0]], kept("b"))
    assert len(open_index(tmp_path / "index").segments) == 1


@pytest.mark.parametrize(
    ("module", "package", "names", "extra"),
    [
        ("langchain_store", "langchain_core", "EhiRetriever EhiVectorStore",
         "langchain"),
        ("llama_index_store", "llama_index", "EhiRetriever EhiVectorStore",
         "llama-index"),
        ("haystack_store", "haystack",
         "EhiDocumentStore EhiTextRetriever EhiEmbeddingRetriever", "haystack"),
    ],
)  # fmt: skip
def test_a_missing_framework_is_named(monkeypatch, module, package, names, extra):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    name = f"ehi.retrievers.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(retrievers, module, raising=False)
    found = importlib.import_module(name)
    for each in names.split():
        with pytest.raises(ImportError, match=rf"pip install 'ehi\[{extra}\]'"):
            getattr(found, each)("index")
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(retrievers, module)


@pytest.mark.parametrize(
    "module", [retrievers, text_records, metadata_filters, langchain_store]
)
def test_the_examples_are_true(module):
    found = doctest.testmod(module, extraglobs={"np": np})
    assert found.attempted and not found.failed
