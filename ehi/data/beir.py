"""tfds builder of the BEIR layout, read from a folder or directly from a zip.

corpus.jsonl       {"_id": ..., "title": ..., "text": ...}    a line for each document
queries.jsonl      {"_id": ..., "text": ...}                  may be missing
qrels/<split>.tsv  query id, document id, grade               may be missing
"""

import json
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from ehi.data.tfds_builder import Document, RetrievalBuilder
from ehi.files import files_sha256

QRELS_HEADER = "query-id"
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
        path = self.root / "corpus.jsonl"
        for where, record in _records(path):
            document = Document(
                record["_id"],
                _text(record, "title", where),
                _text(record, "text", where),
            )
            if not document.content:
                raise ValueError(
                    f"{where}: document {document.id!r} has neither title nor text"
                )
            yield document
        if not self.doc_rows:
            raise ValueError(f"{path} holds no document")

    def queries(self) -> Iterator[tuple[str, str]]:
        path = self.root / "queries.jsonl"
        judged = [file.name for file in _qrels_files(self.root)]
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
        return {
            path.name.removesuffix(".tsv"): self._judgements(path)
            for path in _qrels_files(self.root)
        }

    def _judgements(self, path) -> np.ndarray:
        grades = {}
        for number, line in _lines(path):
            where = f"{path}, line {number}"
            fields = line.rstrip("\r\n").split("\t")
            if number == 1 and fields[0] == QRELS_HEADER:
                continue
            try:
                query_id, doc_id, grade = fields
                grade = int(grade)
            except ValueError:
                raise ValueError(
                    f"{where}: expected query id, document id and an integer grade "
                    f"between tabs, got {_short(line.rstrip())}"
                ) from None
            for kind, id, rows in (
                ("query", query_id, self.query_rows),
                ("document", doc_id, self.doc_rows),
            ):
                if id not in rows:
                    raise ValueError(f"{where}: unknown {kind} {id!r}")
            pair = self.query_rows[query_id], self.doc_rows[doc_id]
            if grades.setdefault(pair, grade) != grade:
                raise ValueError(
                    f"{where}: query {query_id!r} and document {doc_id!r} are judged "
                    f"twice, {grades[pair]} and {grade}"
                )
        rows = [(*pair, grade) for pair, grade in grades.items()]
        return np.array(rows, np.int64).reshape(-1, 3)


def _records(path) -> Iterator[tuple[str, dict]]:
    """Place and JSON object of each line of a .jsonl file."""
    seen = set()
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        id = record.get("_id") if isinstance(record, dict) else None
        if not isinstance(id, str | int) or "\n" in str(id) or not str(id):
            raise ValueError(
                f'{where}: expected an object with an "_id", got {_short(line)}'
            )
        record["_id"] = id = str(id)
        _check_unicode(id, "_id", where)
        if id in seen:
            raise ValueError(f"{where}: duplicate id {id!r}")
        seen.add(id)
        yield where, record


def _lines(path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 ({error})"
                ) from None
            if text.strip():
                yield number, text


def _text(record: dict, field: str, where: str) -> str:
    value = record.get(field)
    value = "" if value is None else value
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} must be a string, got {_short(value)}")
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


def _short(value, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _qrels_files(root) -> list:
    folder = root / "qrels"
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; judgements must be in qrels/<split>.tsv"
        )
    files = folder.iterdir() if folder.is_dir() else []
    return sorted((f for f in files if f.name.endswith(".tsv")), key=lambda f: f.name)


def source_sha256(root) -> str:
    """sha256 of the names and contents of the files of a data set."""
    files = [root / "corpus.jsonl", root / "queries.jsonl"]
    there = [file for file in files if file.exists()]
    return files_sha256(there + _qrels_files(root))
