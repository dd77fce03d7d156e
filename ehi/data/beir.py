"""tfds builder of the BEIR layout, read from a folder or directly from a zip.

corpus.jsonl       {"_id": ..., "title": ..., "text": ...}    a line for each document
queries.jsonl      {"_id": ..., "text": ...}                  may be missing
qrels/<split>.tsv  query id, document id, grade               may be missing
"""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from ehi.data.lines import numbered_lines, parse_json, shortened
from ehi.data.qrels import Judgement, check_any_known, qrels_files, read_qrels
from ehi.data.tfds_builder import Document, RetrievalBuilder
from ehi.files import files_sha256

# Longer than any document: such a file has probably lost its line breaks.
MAX_CHARACTERS = 10_000_000


class BeirFolder(RetrievalBuilder):
    """tfds builder of a BEIR folder.

    A class `Beir` would have the name, and so the cache, of the tfds builder.

    Args:
        root: a `pathlib.Path` or `zipfile.Path` to the folder of corpus.jsonl.
    """

    VERSION = tfds.core.Version("1.0.0")

    def documents(self) -> Iterator[Document]:
        path, empty = self.root / "corpus.jsonl", []
        for where, record in _records(path):
            document = Document(
                record["_id"],
                _text(record, "title", where),
                _text(record, "text", where),
            )
            if not document.content:
                empty.append(document.id)
            yield document
        if not self.doc_rows:
            raise ValueError(f"{path} holds no document")
        if empty:
            self.notes.append(
                f"{_count(len(empty), 'document')} without title and text, such as "
                f"{empty[0]!r}, embedded as the empty text"
            )

    def queries(self) -> Iterator[tuple[str, str]]:
        path = self.root / "queries.jsonl"
        judged = [file.name for file in qrels_files(self.root)]
        if judged and not path.exists():
            raise ValueError(
                f"{path} is missing, though qrels/{judged[0]} judges queries"
            )
        for where, record in _records(path) if path.exists() else ():
            text = _text(record, "text", where)
            if not text.strip():
                raise ValueError(f"{where}: query {record['_id']!r} has no text")
            yield record["_id"], text

    def judgements(self) -> dict[str, np.ndarray]:
        read = {
            path.name: read_qrels(path, self.query_rows, self.doc_rows)
            for path in qrels_files(self.root)
        }
        judged = [judgement for found in read.values() for judgement in found]
        if read and not judged:
            raise ValueError(
                f"{self.root / 'qrels' / next(iter(read))} holds no judgement, and no "
                "other file of qrels does; delete qrels to index without scores"
            )
        check_any_known(judged, self.doc_rows)
        for name, found in read.items():
            if not found:
                self.notes.append(f"qrels/{name} holds no judgement")
        return {
            name.removesuffix(".tsv"): self._rows(name, found)
            for name, found in read.items()
        }

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
                f"{_count(sum(missing.values()), 'judgement')} of qrels/{name} "
                f"on {_count(len(missing), 'document')} that the corpus lacks, such as "
                f"{next(iter(missing))!r}: no search can find them, but they count in "
                "the ideal ranking"
            )
        return np.array(rows, np.int64).reshape(-1, 3)


def _records(path) -> Iterator[tuple[str, dict]]:
    """Place and JSON object of each line of a .jsonl file."""
    seen = set()
    for where, line in numbered_lines(path):
        record = parse_json(line, where)
        id = record.get("_id") if isinstance(record, dict) else None
        if isinstance(id, bool) or not isinstance(id, str | int) or not str(id):
            raise ValueError(
                f'{where}: expected an object with an "_id", got {shortened(line)}'
            )
        record["_id"] = id = str(id)
        _check_unicode(id, "_id", where)
        # A line break ends a line of qrels, and trec_eval ends a name at NUL.
        if "\n" in id or "\0" in id:
            raise ValueError(
                f'{where}: "_id" holds a line break or NUL, got {shortened(id)}'
            )
        if id in seen:
            raise ValueError(f"{where}: duplicate id {id!r}")
        seen.add(id)
        yield where, record


def _text(record: dict, field: str, where: str) -> str:
    value = record.get(field)
    value = "" if value is None else value
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} must be a string, got {shortened(value)}")
    _check_unicode(value, field, where)
    if len(value) > MAX_CHARACTERS:
        raise ValueError(
            f"{where}: {field!r} of {record['_id']!r} has {len(value):,} characters, "
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


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def source_sha256(root) -> str:
    """sha256 of the names and contents of the files of a data set."""
    files = [root / "corpus.jsonl", root / "queries.jsonl"]
    there = [file for file in files if file.exists()]
    return files_sha256(there + qrels_files(root))
