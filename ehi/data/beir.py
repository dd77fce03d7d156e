"""tfds builder of the BEIR layout, read from a folder or directly from a zip.

corpus.jsonl       {"_id": ..., "title": ..., "text": ...}    a line for each document;
                                                              other keys are metadata
queries.jsonl      {"_id": ..., "text": ...}                  may be missing
qrels/<split>.tsv  query id, document id, grade               may be missing
"""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from ehi.data.candidates import candidate_files
from ehi.data.collection import Collection
from ehi.data.lines import numbered_lines, parse_json, shortened
from ehi.data.qrels import Judged, qrels_files, read_qrels
from ehi.files import files_sha256

_READ = ("_id", "title", "text")  # of a document; others are its metadata


class BeirFolder(Collection):
    """tfds builder of a BEIR folder.

    A class `Beir` would have the name, and so the cache, of the tfds builder.

    Args:
        root: a `pathlib.Path` or `zipfile.Path` to the folder of corpus.jsonl.
    """

    VERSION = tfds.core.Version("1.0.0")
    ID = "_id"

    def corpus_name(self) -> str:
        return f"{self.root / 'corpus.jsonl'}"

    def raw_documents(self) -> Iterator[tuple[str, Any, Any, Any]]:
        for where, record in _records(self.root / "corpus.jsonl"):
            yield where, record["_id"], record.get("title"), record.get("text")

    def fields(self) -> Iterator[dict[str, Any]]:
        for _, record in _records(self.root / "corpus.jsonl"):
            yield {key: record[key] for key in record if key not in _READ}

    def raw_queries(self) -> Iterator[tuple[str, Any, Any]]:
        path = self.root / "queries.jsonl"
        judged = [file.name for file in qrels_files(self.root)]
        if judged and not path.exists():
            raise ValueError(
                f"{path} is missing, though qrels/{judged[0]} judges queries"
            )
        for where, record in _records(path) if path.exists() else ():
            yield where, record["_id"], record.get("text")

    def judged(self) -> Iterator[Judged]:
        for path in qrels_files(self.root):
            split = path.name.removesuffix(".tsv")
            found = read_qrels(path, self.query_rows, self.doc_rows)
            yield Judged(split, f"qrels/{path.name}", found)


def _records(path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and JSON object of each line of a .jsonl file."""
    for where, line in numbered_lines(path):
        record = parse_json(line, where)
        id = record.get("_id") if isinstance(record, dict) else None
        if isinstance(id, bool) or not isinstance(id, str | int) or not str(id):
            raise ValueError(
                f'{where}: expected an object with an "_id", got {shortened(line)}'
            )
        yield where, record


def source_sha256(root) -> str:
    """sha256 of the names and contents of the files of a data set."""
    files = [root / "corpus.jsonl", root / "queries.jsonl"]
    there = [file for file in files if file.exists()]
    return files_sha256(there + qrels_files(root) + candidate_files(root))
