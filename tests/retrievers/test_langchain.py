"""LangChain's own standard tests, and what they leave out."""

import re
from pathlib import Path

import pytest

pytest.importorskip("langchain_core", reason="LangChain is not installed: .[langchain]")
standard = pytest.importorskip(
    "langchain_tests.integration_tests", reason="langchain-tests is not installed"
)

import numpy as np  # noqa: E402
from langchain_core.documents import Document  # noqa: E402
from langchain_core.embeddings import DeterministicFakeEmbedding  # noqa: E402
from retriever_cases import IDS, METADATA, TEXTS, text_index  # noqa: E402

from ehi import retrievers  # noqa: E402
from ehi.index import open_index, save_index  # noqa: E402
from ehi.retrievers.langchain_store import EhiRetriever, EhiVectorStore  # noqa: E402

EMBEDDINGS = DeterministicFakeEmbedding(size=8)


@pytest.fixture(scope="module", params=[True, False], ids=["columns", "records"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "index"
    return text_index(path, columns=request.param)


class TestRetriever(standard.RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def at(self, folder):
        self.folder = folder

    @property
    def retriever_constructor(self):
        return EhiRetriever

    @property
    def retriever_constructor_params(self):
        return {"path": self.folder}

    @property
    def retriever_query_example(self):
        return TEXTS[0]


class TestVectorStore(standard.VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self):
        return EhiVectorStore(self.get_embeddings())


class TestVectorStoreInAFolder(standard.VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path):
        return EhiVectorStore(self.get_embeddings(), tmp_path / "index")


def test_a_question_in_words(folder):
    found = EhiRetriever(path=folder, k=1).invoke(TEXTS[3])
    assert found == [Document(id=IDS[3], page_content=TEXTS[3], metadata=METADATA[3])]


@pytest.mark.parametrize(
    ("filter", "ids"),
    [
        ({"lang": "en"}, {"d0", "d3"}),
        ({"lang": "en", "year": {"$gte": 2020}}, {"d0"}),
        ({"year": {"$gt": 2019, "$lt": 2022}}, {"d0", "d1"}),
        ({"$or": [{"lang": {"$in": ["de"]}}, {"year": {"$lte": 2019}}]}, {"d1", "d3"}),
        ({"$not": {"lang": {"$ne": "en"}}}, {"d0", "d3"}),
        ({"ok": {"$eq": True}}, {"d0"}),
        (lambda document: "year" not in document.metadata, {"d4"}),
        ({}, set(IDS)),
    ],
)
def test_filters(folder, filter, ids):
    retriever = EhiRetriever(path=folder, k=9)
    assert {d.id for d in retriever.invoke(TEXTS[0], filter=filter)} == ids
    assert {
        d.id for d in EhiRetriever(path=folder, k=9, filter=filter).invoke("a")
    } == ids
    store = EhiVectorStore(path=folder)  # by the encoder of the index
    assert {d.id for d in store.similarity_search("a", 9, filter)} == ids


def test_from_texts_scores_and_mmr(tmp_path):
    path = tmp_path / "index"
    store = EhiVectorStore.from_texts(
        ["a", "a", "b"], EMBEDDINGS, [{"n": n} for n in range(3)], path=path
    )
    documents = store.similarity_search_with_score("a", k=3)
    assert [d.page_content for d, _ in documents] == ["a", "a", "b"]
    exact = [np.array(EMBEDDINGS.embed_query(text)) for text in "ab"]
    exact = exact[0] @ exact[1] / np.linalg.norm(exact[0]) / np.linalg.norm(exact[1])
    assert [score for _, score in documents] == pytest.approx([1, 1, exact], abs=1e-6)
    relevance = store.similarity_search_with_relevance_scores("a", k=3)
    assert relevance[2][1] == pytest.approx((1 + exact) / 2)
    varied = store.max_marginal_relevance_search("a", k=2, lambda_mult=0.3)
    assert [d.page_content for d in varied] == ["a", "b"]
    again = EhiVectorStore(EMBEDDINGS, path)
    assert again.similarity_search("b", k=1)[0].metadata == {"n": 2}
    retriever = again.as_retriever(search_kwargs={"k": 1, "filter": {"n": 1}})
    assert retriever.invoke("b")[0].page_content == "a"
    assert open_index(path).num_documents == 3
    assert EhiVectorStore(EMBEDDINGS).max_marginal_relevance_search("a") == []


def test_mistakes(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no index"):
        EhiRetriever(path=tmp_path / "nothing")
    store = EhiVectorStore(EMBEDDINGS)
    with pytest.raises(ValueError, match="2 texts, 1 metadatas and 2 ids"):
        store.add_texts(["a", "b"], [{}])
    with pytest.raises(ValueError, match="'\\$near'; allowed: \\$eq"):
        EhiVectorStore(path=folder).similarity_search("a", filter={"x": {"$near": 1}})
    with pytest.raises(ValueError, match="a function or a dict, got 'lang'"):
        EhiVectorStore(path=folder).similarity_search("a", filter="lang")
    with pytest.raises(ValueError, match="embeds queries only"):
        EhiVectorStore(path=folder).add_texts(["a"])


def test_the_readme_answers_a_question(tmp_path, monkeypatch, capsys):
    text_index(tmp_path / "runs" / "pydocs" / "index")
    readme = Path(retrievers.__file__).with_name("README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    assert len([line for line in block.splitlines() if line]) == 4
    tower = open_index(tmp_path / "runs" / "pydocs" / "index")
    save_index(tower, tower.folder.path, tower=True)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
