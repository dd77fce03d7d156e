"""LlamaIndex: a retriever over an index folder, and a vector store.

from ehi.retrievers.llama_index_store import EhiRetriever

for found in EhiRetriever("runs/pydocs/index").retrieve("how do I parse a date"):
    print(found.score, found.node.get_content())
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ehi.index import save_index
from ehi.retrievers import absent
from ehi.retrievers.metadata_filters import rows_that_meet
from ehi.retrievers.text_records import METADATA, TEXT, Records

try:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
    from llama_index.core.vector_stores.types import (
        BasePydanticVectorStore,
        MetadataFilters,
        VectorStoreQueryMode,
        VectorStoreQueryResult,
    )
    from llama_index.core.vector_stores.utils import (
        metadata_dict_to_node,
        node_to_metadata_dict,
    )
except ModuleNotFoundError:
    BaseRetriever = BasePydanticVectorStore = absent("LlamaIndex", "llama-index")

_REF = "ref_doc_id"  # the document that a node is a part of
_OPERATORS = {
    "nin": "not in", "text_match": "text", "text_match_insensitive": "text, any case",
    "is_empty": "empty",
}  # fmt: skip  # the others are spelt as in `metadata_filters`


class EhiRetriever(BaseRetriever):
    """Nodes for a question, by the index's own text encoder.

    Args:
        path: an index folder that keeps its documents and names its encoder.
        similarity_top_k: results.
        filters: MetadataFilters, or None.
        options: of `Index.search`, such as {"beam": 8} or {"rerank": 100}.

    Raises:
        FileNotFoundError: no index there.
        ValueError: it keeps no documents, or names no encoder (when it is asked).
    """

    def __init__(
        self, path: str | Path, similarity_top_k: int = 4, filters: Any = None,
        options: dict[str, Any] | None = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(**kwargs)
        self.records = Records.existing(path)
        self.similarity_top_k, self.filters = similarity_top_k, filters
        self.options = options or {}

    def _retrieve(self, query_bundle: Any) -> list["NodeWithScore"]:
        mask = rows_that_meet(self.records, condition_of(self.filters))
        found = self.records.search_text(
            query_bundle.query_str, self.similarity_top_k, allow=mask, **self.options
        )
        return [NodeWithScore(node=_node(each), score=each.score) for each in found]


class EhiVectorStore(BasePydanticVectorStore):
    """Nodes and their embeddings in an index folder; it may start empty.

    An empty one starts flat: every search scores every node, and scores are cosines. A
    folder that `ehi.fit` made searches as it was trained.

    Args:
        path: an index folder, or one to make; None for a temporary one.
    """

    stores_text: bool = True
    flat_metadata: bool = False
    path: str | None = None
    _records: Any = None

    def __init__(self, path: str | Path | None = None, **kwargs: Any):
        super().__init__(path=None if path is None else str(path), **kwargs)
        self._records = Records(path)

    @classmethod
    def class_name(cls) -> str:
        return "EhiVectorStore"

    @property
    def client(self) -> Any:
        """The `ehi.index.Index`, or None before the first node."""
        return self._records.index

    def add(self, nodes: Sequence[Any], **_: Any) -> list[str]:
        """Adds nodes, and replaces those whose id is there.

        Raises:
            ValueError: metadata that are not JSON; a node without an embedding.
        """
        kept = [
            {
                TEXT: node.get_content(metadata_mode=MetadataMode.NONE),
                METADATA: node_to_metadata_dict(
                    node, remove_text=True, flat_metadata=self.flat_metadata
                ),
            }
            for node in nodes
        ]
        ids = [node.node_id for node in nodes]
        self._records.put(ids, [node.get_embedding() for node in nodes], kept)
        return ids

    def delete(self, ref_doc_id: str, **_: Any) -> None:
        """Deletes the nodes of a document."""
        mask = rows_that_meet(self._records, (_REF, "==", ref_doc_id))
        self._records.remove(record.id for record in self._records.all(mask))

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: Any = None, **_: Any
    ) -> None:
        self._records.remove(record.id for record in self._chosen(node_ids, filters))

    def clear(self) -> None:
        self._records.remove(record.id for record in self._records.all())

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: Any = None
    ) -> list[Any]:
        return [_node(record) for record in self._chosen(node_ids, filters)]

    def query(self, query: Any, **options: Any) -> "VectorStoreQueryResult":
        """The best nodes for an embedding; `options` are those of `Index.search`.

        Raises:
            ValueError: a mode other than the default one, or no embedding.
        """
        if query.mode != VectorStoreQueryMode.DEFAULT:
            raise ValueError(
                f"an index is searched in mode 'default', got {query.mode.value!r}"
            )
        if query.query_embedding is None:
            raise ValueError("a vector store is asked with an embedding, got None")
        mask = rows_that_meet(self._records, condition_of(query.filters))
        if query.node_ids or query.doc_ids:  # LlamaIndex passes [] for no choice
            chosen = self._records.all(mask)
            if query.doc_ids:
                parts = set(query.doc_ids)
                chosen = [r for r in chosen if r.metadata.get(_REF) in parts]
            ids = {record.id for record in chosen}
            ids &= set(query.node_ids or ids)
            if not ids:
                return VectorStoreQueryResult(nodes=[], similarities=[], ids=[])
            mask = list(ids)
        found = self._records.search(
            query.query_embedding, query.similarity_top_k, allow=mask, **options
        )
        return VectorStoreQueryResult(
            nodes=[_node(record) for record in found],
            similarities=[record.score for record in found],
            ids=[record.id for record in found],
        )

    def persist(self, persist_path: str, fs: Any = None) -> None:
        """Writes a temporary store to a folder; one with a path is there already.

        Raises:
            ValueError: a file system that is not this machine's.
        """
        if fs is not None and "file" not in getattr(fs, "protocol", ()):
            raise ValueError("an index is saved on this machine: then use ehi.push")
        if self.path is None and self._records.index is not None:
            save_index(self._records.index, persist_path)

    def _chosen(self, ids, filters):
        mask = rows_that_meet(self._records, condition_of(filters))
        records = self._records.all(mask)
        if ids is None:
            return records
        wanted = set(ids)
        return [record for record in records if record.id in wanted]


def _node(record):
    if "_node_content" in record.metadata:
        return metadata_dict_to_node(record.metadata, text=record.text)
    return TextNode(id_=record.id, text=record.text, metadata=record.metadata)


def condition_of(filters: Any) -> tuple | None:
    """MetadataFilters, nested or not -> the form of `metadata_filters`."""
    if filters is None or not filters.filters:
        return None
    parts = [
        condition_of(part)
        if isinstance(part, MetadataFilters)
        else (
            part.key,
            _OPERATORS.get(part.operator.value, part.operator.value),
            part.value,
        )
        for part in filters.filters
    ]
    parts = [part for part in parts if part is not None]
    join = (filters.condition.value if filters.condition else None) or "and"
    if join == "not":  # none of them
        return ("not", ("or", parts))
    return (join, parts)
