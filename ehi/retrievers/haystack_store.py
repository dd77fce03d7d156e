"""Haystack: retrievers and a document store over an index folder.

from ehi.retrievers.haystack_store import EhiTextRetriever

retriever = EhiTextRetriever("runs/pydocs/index", top_k=3)
for document in retriever.run("how do I parse an ISO date")["documents"]:
    print(document.score, document.content)
"""

from pathlib import Path
from typing import Any

import numpy as np

from ehi.retrievers import absent
from ehi.retrievers.metadata_filters import JOINS, where_text
from ehi.retrievers.text_records import METADATA, TEXT, Records

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.document_stores.errors import DuplicateDocumentError
    from haystack.document_stores.types import DuplicatePolicy
    from haystack.errors import FilterError
    from haystack.utils.filters import document_matches_filter
except ModuleNotFoundError:
    Document = Any
    component = absent("Haystack", "haystack")
    component.__new__ = lambda _, decorated: decorated
    component.output_types = lambda **_: lambda function: function
    _Framework = absent("Haystack", "haystack")
else:
    _Framework = object

_KEPT = "haystack"  # what a document has beside its text and metadata
_EMBEDDED = "embedded"


class EhiDocumentStore(_Framework):
    """Documents and their embeddings in an index folder; it may start empty.

    An empty one starts flat: every search scores every document, and scores are
    cosines. A folder that `ehi.fit` made searches as it was trained. Documents come
    back without their embeddings; one that has none is kept, and only filters find it.

    Args:
        path: an index folder, or one to make; None for a temporary one.
        embedding_dim: width of the embeddings of a new folder.
    """

    def __init__(self, path: str | Path | None = None, embedding_dim: int = 768):
        self.path = None if path is None else str(path)
        self.embedding_dim = embedding_dim
        self.records = Records(path)
        self._without: set[str] | None = None  # ids of documents with no embedding

    def to_dict(self) -> dict[str, Any]:
        return default_to_dict(self, path=self.path, embedding_dim=self.embedding_dim)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EhiDocumentStore":
        return default_from_dict(cls, data)

    def count_documents(self) -> int:
        return len(self.records)

    def filter_documents(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """The documents that filters accept, in the order they were written.

        Raises:
            FilterError: the filters cannot be read.
        """
        mask = _mask(self.records, filters)
        return [_document(record) for record in self.records.all(mask)]

    def write_documents(self, documents: list[Document], policy: Any = None) -> int:
        """Writes documents and returns how many were written.

        Args:
            documents: with or without embeddings.
            policy: what happens to an id that is there: FAIL, the default, SKIP or
                OVERWRITE.

        Raises:
            ValueError: something is no Document; an embedding of another width;
                metadata that are not JSON.
            DuplicateDocumentError: an id is there and the policy is FAIL.
        """
        policy = policy or DuplicatePolicy.NONE
        if not isinstance(documents, list) or not all(
            isinstance(document, Document) for document in documents
        ):
            raise ValueError(
                f"documents must be a list of Documents, got {documents!r}"
            )
        wanted = {document.id: document for document in documents}
        if policy != DuplicatePolicy.OVERWRITE:
            there = {record.id for record in self.records.get(list(wanted))}
            repeated = len(wanted) < len(documents)
            if policy == DuplicatePolicy.SKIP:
                wanted = {id: d for id, d in wanted.items() if id not in there}
            elif there or repeated:
                first = min(there) if there else "one of the documents"
                raise DuplicateDocumentError(
                    f"{first} is there already: policy SKIP or OVERWRITE allows that"
                )
        written = len(wanted)
        if policy == DuplicatePolicy.OVERWRITE:
            written = len(documents)
        self.records.put(
            list(wanted),
            self._vectors(wanted.values()),
            [_kept(document) for document in wanted.values()],
        )
        self._without = None
        return written

    def delete_documents(self, document_ids: list[str]) -> None:
        """Deletes documents; ids that are not there do nothing."""
        self.records.remove(document_ids)
        self._without = None

    def delete_all_documents(self) -> None:
        self.delete_documents([record.id for record in self.records.all()])

    def delete_by_filter(self, filters: dict[str, Any]) -> int:
        """Deletes the documents that filters accept, and returns how many."""
        found = self.records.all(_mask(self.records, filters))
        self.delete_documents([record.id for record in found])
        return len(found)

    def count_documents_by_filter(self, filters: dict[str, Any]) -> int:
        return len(self.records.all(_mask(self.records, filters)))

    def search(
        self, embedding: list[float], top_k: int = 10,
        filters: dict[str, Any] | None = None, **options: Any,
    ) -> list[Document]:  # fmt: skip
        """The best documents for an embedding; `options` are of `Index.search`."""
        mask = _mask(self.records, filters)
        without = self._ids_without()
        found = self.records.search(
            embedding, top_k, allow=mask, deny=list(without) or None, **options
        )
        return [_document(record, record.score) for record in found]

    def _ids_without(self):
        if self._without is None:
            self._without = {
                record.id for record in self.records.all() if not _is_embedded(record)
            }
        return self._without

    def _vectors(self, documents):
        """Embeddings (N, D); zeros where there is none."""
        index = self.records.index
        width = self.embedding_dim if index is None else index.width
        maps = getattr(index, "maps", None)  # of ehi.fit: vectors as they were given
        width = width if maps is None else maps.given
        vectors = np.zeros((len(documents), width), np.float32)
        for row, document in zip(vectors, documents, strict=True):
            if document.embedding is None:
                continue
            if len(document.embedding) != width:
                raise ValueError(
                    f"the embedding of document {document.id} has width "
                    f"{len(document.embedding)}, the store {width} (embedding_dim)"
                )
            row[:] = document.embedding
        return vectors


@component
class EhiEmbeddingRetriever(_Framework):
    """Documents of a store for the embedding of a question.

    Args:
        document_store: an EhiDocumentStore.
        filters: of every question that brings none.
        top_k: results.
    """

    def __init__(
        self, document_store: Any, filters: dict[str, Any] | None = None,
        top_k: int = 10,
    ):  # fmt: skip
        self.document_store = document_store
        self.filters, self.top_k = filters, top_k

    def to_dict(self) -> dict[str, Any]:
        return default_to_dict(
            self, document_store=self.document_store.to_dict(),
            filters=self.filters, top_k=self.top_k,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EhiEmbeddingRetriever":
        parameters = dict(data["init_parameters"])
        store = EhiDocumentStore.from_dict(parameters.pop("document_store"))
        return cls(store, **parameters)

    @component.output_types(documents=list[Document])
    def run(
        self, query_embedding: list[float], filters: dict[str, Any] | None = None,
        top_k: int | None = None,
    ) -> dict[str, list[Document]]:  # fmt: skip
        found = self.document_store.search(
            query_embedding,
            self.top_k if top_k is None else top_k,
            self.filters if filters is None else filters,
        )
        return {"documents": found}


@component
class EhiTextRetriever(_Framework):
    """Documents for a question, by the index's own text encoder.

    Args:
        path: an index folder that keeps its documents and names its encoder.
        filters: of every question that brings none.
        top_k: results.
        options: of `Index.search`, such as {"beam": 8} or {"rerank": 100}.

    Raises:
        FileNotFoundError: no index there.
        ValueError: it keeps no documents, or names no encoder (when it is asked).
    """

    def __init__(
        self, path: str, filters: dict[str, Any] | None = None, top_k: int = 10,
        options: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.path, self.filters, self.top_k = str(path), filters, top_k
        self.options = options or {}
        self._records = Records.existing(path)

    def to_dict(self) -> dict[str, Any]:
        return default_to_dict(
            self, path=self.path, filters=self.filters, top_k=self.top_k,
            options=self.options,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EhiTextRetriever":
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, filters: dict[str, Any] | None = None,
        top_k: int | None = None,
    ) -> dict[str, list[Document]]:  # fmt: skip
        mask = _mask(self._records, self.filters if filters is None else filters)
        found = self._records.search_text(
            query, self.top_k if top_k is None else top_k, allow=mask, **self.options
        )
        return {"documents": [_document(record, record.score) for record in found]}


def _kept(document):
    """The record of a document: its embedding is in the index alone."""
    others = document.to_dict(flatten=False)
    embedded = others.pop("embedding") is not None
    others.pop("score")
    text, metadata = others.pop("content"), others.pop("meta")
    others[_EMBEDDED] = embedded
    return {TEXT: text, METADATA: metadata, _KEPT: others}


def _others(record):
    kept = record.kept if isinstance(record.kept, dict) else {}
    return kept.get(_KEPT, {})


def _is_embedded(record):
    return _others(record).get(_EMBEDDED, True)


def _document(record, score=None):
    others = {key: v for key, v in _others(record).items() if key != _EMBEDDED}
    content = record.kept[TEXT] if others else record.text  # which may be None
    values = {"id": record.id, **others, "content": content, "meta": record.metadata}
    return Document.from_dict({**values, "score": score})


def _mask(records, filters):
    """The documents that filters of Haystack accept, by row; None for no filters.

    Raises:
        FilterError: they cannot be read.
    """
    if not filters:
        return None
    if "operator" not in filters:
        raise FilterError(f"filters need an 'operator', got {filters!r}")
    condition = _condition(filters)
    if condition is not None and records.index is not None:
        text = where_text(condition, records.index.fields)
        if text is not None:
            return records.index.where(text)
    return records.mask(
        lambda record: document_matches_filter(filters, _document(record))
    )


def _condition(filters):
    """The form of `metadata_filters`; None if Haystack alone knows what is meant."""
    if "conditions" in filters:
        parts = [_condition(part) for part in filters["conditions"]]
        join = str(filters.get("operator")).lower()
        if None in parts or join not in JOINS:
            return None
        return ("not", ("and", parts)) if join == "not" else (join, parts)
    if not {"field", "operator", "value"} <= filters.keys():
        return None
    name, value = filters["field"].removeprefix("meta."), filters["value"]
    ordered = filters["operator"] in ("<", "<=", ">", ">=")
    if isinstance(value, str) and (ordered or value[:4].isdigit()):
        return None  # it may be a date, which Haystack reads as a moment
    if filters["operator"] in ("in", "not in") and not isinstance(value, list):
        return None
    return (name, filters["operator"], value)
