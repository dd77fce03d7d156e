"""LangChain: a retriever over an index folder, and a vector store.

    from ehi.retrievers.langchain_store import EhiRetriever

    retriever = EhiRetriever(path="runs/pydocs/index", k=3)
    for document in retriever.invoke("how do I parse an ISO date"):
        print(document.page_content)

A filter is a function of a Document, or a dict: {"lang": "en", "year": {"$gte": 2020}},
with $eq $ne $gt $gte $lt $lte $in $nin, and {"$and": [...]}, $or and $not around them.
"""

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ehi.retrievers import absent
from ehi.retrievers.metadata_filters import rows_that_meet
from ehi.retrievers.text_records import METADATA, TEXT, Records

try:
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.vectorstores import VectorStore
    from langchain_core.vectorstores.utils import maximal_marginal_relevance
except ModuleNotFoundError:
    BaseRetriever = VectorStore = absent("LangChain", "langchain")

_OPERATORS = {
    "$eq": "==", "$ne": "!=", "$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<=",
    "$in": "in", "$nin": "not in",
}  # fmt: skip
_JOINS = {"$and": "and", "$or": "or"}


class EhiRetriever(BaseRetriever):
    """Documents for a question, by the index's own text encoder.

    Args:
        path: an index folder that keeps its documents and names its encoder.
        k: results.
        filter: of every question, as above, or None.
        options: of `Index.search`, such as {"beam": 8} or {"rerank": 100}.

    Raises:
        FileNotFoundError: no index there.
        ValueError: it keeps no documents, or names no encoder (when it is asked).
    """

    path: str | Path
    k: int = 4
    filter: Any = None
    options: dict[str, Any] = {}
    _records: Any = None

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        self._records = Records.existing(self.path)

    def _get_relevant_documents(
        self, query: str, *, run_manager: Any = None, k: int | None = None,
        filter: Any = None,
    ) -> list["Document"]:  # fmt: skip
        mask = _mask(self._records, self.filter if filter is None else filter)
        found = self._records.search_text(
            query, self.k if k is None else k, allow=mask, **self.options
        )
        return [_document(record) for record in found]


class EhiVectorStore(VectorStore):
    """Texts and their embeddings in an index folder; it may start empty.

    An empty one starts flat: every search scores every document, and scores are
    cosines. A folder that `ehi.fit` made searches as it was trained.

    Args:
        embedding: the Embeddings of documents and queries. None for the encoder of the
            index, which embeds queries only: then no texts can be added.
        path: an index folder, or one to make; None for a temporary one.
    """

    def __init__(self, embedding: Any = None, path: str | Path | None = None):
        self.embedding = embedding
        self.records = Records(path)

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], embedding: Any,
        metadatas: Sequence[dict] | None = None, *,
        ids: Sequence[str] | None = None, path: str | Path | None = None,
    ) -> "EhiVectorStore":  # fmt: skip
        store = cls(embedding, path)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    @property
    def embeddings(self) -> Any:
        return self.embedding

    def add_texts(
        self, texts: Iterable[str], metadatas: Sequence[dict] | None = None, *,
        ids: Sequence[str | None] | None = None, **_: Any,
    ) -> list[str]:  # fmt: skip
        """Adds texts, and replaces those whose id is there; returns the ids.

        Raises:
            ValueError: texts, metadatas and ids are not equally many, metadata are not
                JSON, or there are no Embeddings to embed the texts.
        """
        texts = list(texts)
        metadatas = [{} for _ in texts] if metadatas is None else list(metadatas)
        ids = [None] * len(texts) if ids is None else list(ids)
        if not len(texts) == len(metadatas) == len(ids):
            raise ValueError(
                f"{len(texts)} texts, {len(metadatas)} metadatas and {len(ids)} ids: "
                "there must be one of each for every text"
            )
        if self.embedding is None:
            raise ValueError(
                "the encoder of an index embeds queries only: give embedding= to add "
                "texts"
            )
        ids = [str(uuid.uuid4()) if id is None else id for id in ids]
        kept = [
            {TEXT: text, METADATA: metadata or {}}
            for text, metadata in zip(texts, metadatas, strict=True)
        ]
        if texts:
            self.records.put(ids, self.embedding.embed_documents(texts), kept)
        return ids

    def delete(self, ids: Sequence[str] | None = None, **_: Any) -> bool:
        """Deletes documents; ids that are not there do nothing."""
        self.records.remove(ids or [])
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list["Document"]:
        return [_document(record) for record in self.records.get(ids)]

    def similarity_search(
        self, query: str, k: int = 4, filter: Any = None, **options: Any
    ) -> list["Document"]:
        """The k best documents; `options` are those of `Index.search`."""
        found = self._search(query, k, filter, options)
        return [_document(record) for record in found]

    def similarity_search_with_score(
        self, query: str, k: int = 4, filter: Any = None, **options: Any
    ) -> list[tuple["Document", float]]:
        """The k best documents and their scores: a larger one is better."""
        found = self._search(query, k, filter, options)
        return [(_document(record), record.score) for record in found]

    def similarity_search_by_vector(
        self, embedding: Sequence[float], k: int = 4, filter: Any = None, **options: Any
    ) -> list["Document"]:
        mask = _mask(self.records, filter)
        found = self.records.search(embedding, k, allow=mask, **options)
        return [_document(record) for record in found]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5,
        **options: Any,
    ) -> list["Document"]:  # fmt: skip
        """k of the fetch_k best documents that differ from each other.

        Their texts are embedded again: an index of codes keeps no embeddings.
        """
        if self.embedding is None:
            raise ValueError("give embedding=: MMR compares documents with each other")
        return self.max_marginal_relevance_search_by_vector(
            self.embedding.embed_query(query), k, fetch_k, lambda_mult, **options
        )

    def max_marginal_relevance_search_by_vector(
        self, embedding: Sequence[float], k: int = 4, fetch_k: int = 20,
        lambda_mult: float = 0.5, **options: Any,
    ) -> list["Document"]:  # fmt: skip
        found = self.similarity_search_by_vector(embedding, fetch_k, **options)
        if not found:
            return []
        texts = [document.page_content for document in found]
        vectors = self.embedding.embed_documents(texts)
        chosen = maximal_marginal_relevance(
            np.array(embedding, np.float32), vectors, lambda_mult, k
        )
        return [found[i] for i in chosen]

    def _search(self, query, k, filter, options):
        options = {"allow": _mask(self.records, filter), **options}
        if self.embedding is None:
            return self.records.search_text(query, k, **options)
        if not len(self.records):
            return []
        return self.records.search(self.embedding.embed_query(query), k, **options)

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        """Cosine -> 0 .. 1. A trained index may score by something without bounds."""
        if not self.records.is_flat:
            raise NotImplementedError(
                "the scores of a trained index have no bounds: use "
                "similarity_search_with_score"
            )
        return lambda cosine: min(max((1 + cosine) / 2, 0.0), 1.0)


def _document(record):
    return Document(id=record.id, page_content=record.text, metadata=record.metadata)


def _mask(records, filter):
    """The documents that a filter of LangChain accepts, by row; None for no filter."""
    if callable(filter):
        return records.mask(lambda record: filter(_document(record)))
    return rows_that_meet(records, condition_of(filter) if filter else None)


def condition_of(filter: Mapping[str, Any]) -> tuple:
    """A dict in the way of MongoDB -> the form of `metadata_filters`.

    >>> condition_of({"lang": "en", "year": {"$gte": 2020}})
    ('and', [('lang', '==', 'en'), ('year', '>=', 2020)])

    Raises:
        ValueError: it is no dict, or has an operator that is not known.
    """
    if not isinstance(filter, Mapping):
        raise ValueError(f"a filter is a function or a dict, got {filter!r}")
    parts = []
    for name, value in filter.items():
        if name in _JOINS:
            parts.append((_JOINS[name], [condition_of(part) for part in value]))
        elif name == "$not":
            parts.append(("not", condition_of(value)))
        elif isinstance(value, Mapping):
            parts += [(name, _operator(word), each) for word, each in value.items()]
        elif str(name).startswith("$"):
            _operator(name)
        else:
            parts.append((name, "==", value))
    return parts[0] if len(parts) == 1 else ("and", parts)


def _operator(word):
    if word not in _OPERATORS:
        known = ", ".join([*_OPERATORS, *_JOINS, "$not"])
        raise ValueError(f"a filter has {word!r}; allowed: {known}")
    return _OPERATORS[word]
