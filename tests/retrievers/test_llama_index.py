"""LlamaIndex publishes no standard tests: these are the properties of its interface."""

import pytest

pytest.importorskip(
    "llama_index.core", reason="LlamaIndex is not installed: .[llama-index]"
)

from llama_index.core import StorageContext, VectorStoreIndex  # noqa: E402
from llama_index.core.embeddings import MockEmbedding  # noqa: E402
from llama_index.core.schema import (  # noqa: E402
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.simple import SimpleVectorStore  # noqa: E402
from llama_index.core.vector_stores.types import (  # noqa: E402
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from retriever_cases import IDS, METADATA, TEXTS, text_index  # noqa: E402

from ehi.index import open_index  # noqa: E402
from ehi.retrievers.llama_index_store import (  # noqa: E402
    EhiRetriever,
    EhiVectorStore,
)

OPERATORS = [
    ("lang", "en", "=="), ("lang", "en", "!="), ("year", 2020, ">"),
    ("year", 2020, ">="), ("year", 2020, "<"), ("year", 2020, "<="),
    ("lang", ["en", "fr"], "in"), ("lang", ["en"], "nin"), ("lang", "e", "contains"),
    ("lang", "e", "text_match"), ("lang", "E", "text_match_insensitive"),
    ("lang", None, "is_empty"), ("tags", ["x", "y"], "any"),
    ("tags", ["x", "y"], "all"),
]  # fmt: skip


def nodes():
    made = [
        TextNode(
            id_=id, text=text, metadata=dict(about), embedding=[1.0, i, i * i],
            relationships={
                NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"doc{i % 2}")
            },
        )
        for i, (id, text, about) in enumerate(zip(IDS, TEXTS, METADATA, strict=True))
    ]  # fmt: skip
    made[0].metadata["tags"], made[1].metadata["tags"] = ["x"], ["x", "y", "z"]
    return made


@pytest.fixture
def store(tmp_path):
    store = EhiVectorStore(tmp_path / "index")
    assert store.add(nodes()) == IDS
    return store


def query(**options):
    options = {"query_embedding": [1.0, 2.0, 4.0], "similarity_top_k": 9, **options}
    return VectorStoreQuery(**options)


def filters(*parts, condition="and"):
    made = [
        part if isinstance(part, MetadataFilters)
        else MetadataFilter(key=part[0], value=part[1], operator=part[2])
        for part in parts
    ]  # fmt: skip
    return MetadataFilters(filters=made, condition=condition)


def reference():
    simple = SimpleVectorStore()
    simple.add(nodes())
    return simple


@pytest.mark.parametrize("part", OPERATORS, ids=lambda part: part[2])
def test_filters_are_those_of_the_store_of_llama_index(store, part):
    for condition in ("and", "or", "not"):
        asked = query(filters=filters(part, ("year", 2021, ">="), condition=condition))
        expected, found = reference().query(asked), store.query(asked)
        assert found.ids == expected.ids
        assert found.similarities == pytest.approx(expected.similarities, abs=1e-6)


def test_filters_may_be_nested(store):
    inner = filters(("lang", "de", "=="), ("lang", None, "is_empty"), condition="or")
    asked = filters(inner, ("year", 2021, "<="))
    assert store.query(query(filters=asked)).ids == ["d1"]


def test_nodes_come_back_as_they_were(store):
    found = store.query(query(similarity_top_k=1)).nodes[0]
    expected = nodes()[2]
    assert found.id_ == "d2" and found.get_content() == TEXTS[2]
    assert found.ref_doc_id == "doc0" and found.metadata == expected.metadata
    assert [node.id_ for node in store.get_nodes(["d3", "d1", "none"])] == ["d1", "d3"]
    assert [n.id_ for n in store.get_nodes(filters=filters(("lang", "de", "==")))] == [
        "d1"
    ]


def test_some_nodes_or_documents_may_be_asked_for(store):
    assert set(store.query(query(node_ids=["d1", "d4"])).ids) == {"d1", "d4"}
    assert set(store.query(query(doc_ids=["doc1"])).ids) == {"d1", "d3"}
    assert store.query(query(doc_ids=["doc1"], node_ids=["d0"])).ids == []


def test_nodes_are_replaced_and_deleted(store, tmp_path):
    node = nodes()[0]
    node.set_content("new")
    store.add([node])
    assert store.get_nodes(["d0"])[0].get_content() == "new"
    store.delete("doc1")
    assert set(store.query(query()).ids) == {"d0", "d2", "d4"}
    store.delete_nodes(["d0", "none"])
    store.delete_nodes(filters=filters(("year", 2022, "==")))
    assert EhiVectorStore(tmp_path / "index").query(query()).ids == ["d4"]
    store.clear()
    assert store.query(query()).ids == [] and store.client.num_documents == 0
    store.add(nodes()[:1])
    assert store.query(query()).ids == ["d0"]


def test_a_vector_store_index_is_built_asked_and_persisted(tmp_path):
    store, embedding = EhiVectorStore(), MockEmbedding(embed_dim=4)
    assert store.query(query()).ids == []
    storage = StorageContext.from_defaults(vector_store=store)
    bare = [TextNode(id_=id, text=text) for id, text in zip(IDS, TEXTS, strict=True)]
    index = VectorStoreIndex(bare, storage_context=storage, embed_model=embedding)
    found = index.as_retriever(similarity_top_k=3).retrieve("anything")
    assert len(found) == 3 and found[0].score == pytest.approx(1)
    store.persist(str(tmp_path / "saved"))
    assert open_index(tmp_path / "saved").num_documents == 5
    again = VectorStoreIndex.from_vector_store(
        EhiVectorStore(tmp_path / "saved"), embed_model=embedding
    )
    assert len(again.as_retriever(similarity_top_k=2).retrieve("anything")) == 2


@pytest.mark.parametrize("columns", [True, False])
def test_a_question_in_words(tmp_path, columns):
    path = text_index(tmp_path / "index", columns)
    found = EhiRetriever(path, similarity_top_k=1).retrieve(TEXTS[3])[0]
    assert (found.node.id_, found.node.get_content()) == (IDS[3], TEXTS[3])
    assert found.node.metadata == METADATA[3]
    some = filters(("lang", "en", "!="), ("year", 2022, "<"))
    asked = EhiRetriever(path, filters=some, similarity_top_k=9)
    assert [n.node.id_ for n in asked.retrieve(TEXTS[3])] == ["d1"]


def test_mistakes(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no index"):
        EhiRetriever(tmp_path / "nothing")
    with pytest.raises(ValueError, match="mode 'default', got 'hybrid'"):
        store.query(query(mode=VectorStoreQueryMode.HYBRID))
    with pytest.raises(ValueError, match="asked with an embedding"):
        store.query(query(query_embedding=None))
