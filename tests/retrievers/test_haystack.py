"""Haystack's own standard tests, and what they leave out."""

from dataclasses import replace

import pytest

pytest.importorskip("haystack", reason="Haystack is not installed: .[haystack]")

from haystack import Document, Pipeline  # noqa: E402
from haystack.document_stores.errors import DuplicateDocumentError  # noqa: E402
from haystack.document_stores.types import DuplicatePolicy  # noqa: E402
from haystack.errors import FilterError  # noqa: E402
from haystack.testing import document_store as standard  # noqa: E402
from retriever_cases import IDS, METADATA, TEXTS, text_index  # noqa: E402

from ehi.retrievers.haystack_store import (  # noqa: E402
    EhiDocumentStore,
    EhiEmbeddingRetriever,
    EhiTextRetriever,
)


class TestDocumentStore(
    standard.DocumentStoreBaseTests,
    standard.DeleteAllTest,
    standard.DeleteByFilterTest,
    standard.CountDocumentsByFilterTest,
):
    @pytest.fixture
    def document_store(self):
        return EhiDocumentStore()

    @staticmethod
    def assert_documents_are_equal(received, expected):
        """Documents come back without their embeddings, as the class says."""
        assert received == [replace(document, embedding=None) for document in expected]

    def test_write_documents(self, document_store):
        document = Document(content="test doc")
        assert document_store.write_documents([document]) == 1
        with pytest.raises(DuplicateDocumentError):
            document_store.write_documents([document])
        self.assert_documents_are_equal(document_store.filter_documents(), [document])


def test_a_store_in_a_pipeline_that_is_written_out_and_read(tmp_path):
    store = EhiDocumentStore(tmp_path / "index", embedding_dim=2)
    documents = [
        Document(content="one", embedding=[1.0, 0.1], meta={"n": 1}),
        Document(content="two", embedding=[0.0, 1.0], meta={"n": 2}),
        Document(content=None, meta={"n": 3}),
    ]
    assert store.write_documents(documents) == 3
    pipeline = Pipeline()
    pipeline.add_component("retriever", EhiEmbeddingRetriever(store, top_k=5))
    ours = EhiDocumentStore.__module__
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=[ours])
    found = again.run({"retriever": {"query_embedding": [0.0, 3.0]}})
    found = found["retriever"]["documents"]
    assert [(d.content, d.id) for d in found] == [  # none without an embedding
        ("two", documents[1].id),
        ("one", documents[0].id),
    ]
    assert found[0].score == pytest.approx(1)
    small = {"field": "meta.n", "operator": "<", "value": 2}
    options = {"query_embedding": [0.0, 3.0], "filters": small}
    found = again.run({"retriever": options})["retriever"]["documents"]
    assert [d.content for d in found] == ["one"]
    assert store.filter_documents()[2].content is None
    store.write_documents([replace(documents[2], embedding=[1.0, 1.0])],
                          policy=DuplicatePolicy.OVERWRITE)  # fmt: skip
    assert len(store.search([1.0, 1.0])) == 3


@pytest.mark.parametrize("columns", [True, False])
def test_a_question_in_words_with_filters(tmp_path, columns):
    retriever = EhiTextRetriever(text_index(tmp_path / "index", columns))
    retriever = EhiTextRetriever.from_dict(retriever.to_dict())
    found = retriever.run(TEXTS[0], top_k=1)["documents"][0]
    assert (found.id, found.content, found.meta) == (IDS[0], TEXTS[0], METADATA[0])

    def ids(filters):
        return {d.id for d in retriever.run(TEXTS[0], filters)["documents"]}

    english = {"field": "meta.lang", "operator": "==", "value": "en"}
    late = {"field": "meta.year", "operator": ">=", "value": 2020}
    assert ids({"operator": "AND", "conditions": [english, late]}) == {"d0"}
    assert ids({"operator": "NOT", "conditions": [english, late]}) == set(IDS[1:])
    assert ids({"operator": "OR", "conditions": [english, late]}) == set(IDS[:4])
    with pytest.raises(FilterError):
        ids({"operator": "XOR", "conditions": [english]})
    with pytest.raises(FilterError):
        ids({"field": "meta.lang", "operator": "==="})


def test_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no index"):
        EhiTextRetriever(str(tmp_path / "nothing"))
    store = EhiDocumentStore(embedding_dim=2)
    with pytest.raises(ValueError, match="has width 3, the store 2"):
        store.write_documents([Document(content="x", embedding=[1.0, 2.0, 3.0])])
    assert store.count_documents() == 0
