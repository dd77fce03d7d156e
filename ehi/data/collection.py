"""The checks that all layouts of documents, queries and judgements share."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from ehi.data.candidates import Candidates, read_candidates
from ehi.data.lines import count, shortened
from ehi.data.qrels import Judged, Judgement, check_any_known
from ehi.data.tfds_builder import Document, RetrievalBuilder

# Longer than any document: such a file has probably lost its line breaks.
MAX_CHARACTERS = 10_000_000


class Collection(RetrievalBuilder):
    """tfds builder of documents, queries and judgements of one layout.

    A subclass reads its files, and this class checks what it reads. A mistake is a
    ValueError that names the place.
    """

    ID = "id"  # name of the field of ids, for messages

    @abstractmethod
    def raw_documents(self) -> Iterator[tuple[str, Any, Any, Any]]:
        """Place, id, title and text of each document; None is the empty text."""

    @abstractmethod
    def raw_queries(self) -> Iterator[tuple[str, Any, Any]]:
        """Place, id and text of each query; there may be none."""

    @abstractmethod
    def judged(self) -> Iterator[Judged]:
        """The judgements of each split; there may be none."""

    def documents(self) -> Iterator[Document]:
        """The corpus, checked; `doc_rows` knows the ids so far."""
        empty = []
        for where, id, title, text in self.raw_documents():
            id = _checked_id(id, self.ID, where)
            if id in self.doc_rows:
                raise ValueError(f"{where}: duplicate id {id!r}")
            title = _checked_text(title, "title", id, where)
            document = Document(id, title, _checked_text(text, "text", id, where))
            if not document.content:
                empty.append(id)
            yield document
        if not self.doc_rows:
            raise ValueError(f"{self.corpus_name()} holds no document")
        if empty:
            self.notes.append(
                f"{count(len(empty), 'document')} without title and text, such as "
                f"{empty[0]!r}, embedded as the empty text"
            )

    def queries(self) -> Iterator[tuple[str, str]]:
        """Id and text of each query, checked."""
        seen = set()
        for where, id, text in self.raw_queries():
            id = _checked_id(id, self.ID, where)
            if id in seen:
                raise ValueError(f"{where}: duplicate id {id!r}")
            seen.add(id)
            text = _checked_text(text, "text", id, where)
            if not text.strip():
                raise ValueError(f"{where}: query {id!r} has no text")
            yield id, text

    def judgements(self) -> dict[str, np.ndarray]:
        """Split -> (query row, document row, grade); missing documents come last."""
        read = list(self.judged())
        found = [judgement for each in read for judgement in each.judgements]
        if read and not found:
            raise ValueError(
                f"{str(self.root).rstrip('/')}/{read[0].name} holds no judgement, and "
                "no other file of qrels does; delete qrels to index without scores"
            )
        check_any_known(found, self.doc_rows)
        for each in read:
            if not each.judgements:
                self.notes.append(f"{each.name} holds no judgement")
        return {each.split: self._rows(each.name, each.judgements) for each in read}

    def candidates(self) -> Candidates | None:
        found, notes = read_candidates(self.root, self.query_rows, self.doc_rows)
        self.notes += notes
        return found

    def corpus_name(self) -> str:
        """What holds the documents, for messages."""
        return f"{self.root}"

    def _rows(self, name: str, judgements: list[Judgement]) -> np.ndarray:
        """(R, 3) query row, document row, grade; missing documents come last."""
        rows, missing = [], {}
        for _, query, document, grade in judgements:
            row = self.doc_rows.get(document)
            if row is None:
                missing[document] = missing.get(document, 0) + 1
                number = self.missing_ids.setdefault(document, len(self.missing_ids))
                row = len(self.doc_rows) + number
            rows.append((self.query_rows[query], row, grade))
        if missing:
            self.notes.append(
                f"{count(sum(missing.values()), 'judgement')} of {name} "
                f"on {count(len(missing), 'document')} that the corpus lacks, such as "
                f"{next(iter(missing))!r}: no search can find them, but they count in "
                "the ideal ranking"
            )
        return np.array(rows, np.int64).reshape(-1, 3)


def _checked_id(value: Any, field: str, where: str) -> str:
    """The id of a document or query as text."""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value):
        raise ValueError(f"{where}: {field!r} is no id, got {shortened(value)}")
    id = str(value)
    _check_unicode(id, field, where)
    # A line break ends a line of qrels, and trec_eval ends a name at NUL.
    if "\n" in id or "\0" in id:
        raise ValueError(
            f'{where}: "{field}" holds a line break or NUL, got {shortened(id)}'
        )
    return id


def _checked_text(value: Any, field: str, id: str, where: str) -> str:
    """A text of the document or query `id`; None is the empty text."""
    value = "" if value is None else value
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} must be a string, got {shortened(value)}")
    _check_unicode(value, field, where)
    if len(value) > MAX_CHARACTERS:
        raise ValueError(
            f"{where}: {field!r} of {id!r} has {len(value):,} characters, "
            f"more than {MAX_CHARACTERS:,}"
        )
    return value


def _check_unicode(value: str, field: str, where: str) -> None:
    """Refuse half a character (a lone surrogate), which JSON can express."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(
            f"{where}: {field!r} holds half a character, {half!r}"
        ) from None
