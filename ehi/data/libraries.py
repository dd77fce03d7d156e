"""tfds builders of data sets that other libraries hold.

Columnar: a folder of parquet files, or of `datasets.Dataset.save_to_disk`, with the
tables of BEIR on the Hugging Face hub:

    corpus    _id, title, text             corpus/*.parquet, corpus.parquet,
    queries   _id, text                    data/corpus-*.parquet, or a saved
    qrels     query-id, corpus-id, score   folder `corpus`; qrels/<split>-*.parquet,
                                           data/<split>-*.parquet, qrels/<split>.tsv

IrDatasets: ids of the library `ir_datasets`, joined by '+'.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from ehi.data.candidates import Candidates, candidate_files, gather
from ehi.data.collection import Collection
from ehi.data.lines import parse_json, shortened
from ehi.data.qrels import Judged, JudgedLines, qrels_files, read_qrels
from ehi.files import files_sha256

ROWS_AT_ONCE = 4096
TABLES = ("corpus", "queries")
SHARD = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<all>\d{5})\.\w+")
# Names of columns, the first that a table has.
IDS = ("_id", "id", "doc_id", "docid", "query_id", "qid", "pid")
TEXTS = ("text", "body", "contents", "passage", "query")
QUERY_IDS, GRADES = ("query-id", "query_id", "qid"), ("score", "relevance", "grade")
DOCUMENT_IDS = ("corpus-id", "corpus_id", "doc_id", "docid", "pid")


class Columnar(Collection):
    """tfds builder of a folder of parquet or arrow files.

    Args:
        root: the folder.
    """

    VERSION = tfds.core.Version("1.0.0")

    def raw_documents(self) -> Iterator[tuple[str, Any, Any, Any]]:
        for path in _files(self.root, "corpus"):
            columns = {"id": IDS, "text": TEXTS, "title?": ("title",)}
            for where, row in _rows(path, columns):
                yield where, row["id"], row["title"], row["text"]

    def fields(self) -> Iterator[dict[str, Any]]:
        for path in _files(self.root, "corpus"):
            names, batches = _batches(path)
            read = [_first(IDS, names), _first(TEXTS, names), "title"]
            others = [name for name in names if name not in read]
            wanted = others or names[:1]  # without a column, rows are not counted
            for batch in batches(wanted):
                for row in batch.select(wanted).to_pylist():
                    yield {name: row[name] for name in others}

    def raw_queries(self) -> Iterator[tuple[str, Any, Any]]:
        for path in _files(self.root, "queries"):
            for where, row in _rows(path, {"id": IDS, "text": TEXTS}):
                yield where, row["id"], row["text"]

    def judged(self) -> Iterator[Judged]:
        for path in _tsv_files(self.root):
            found = read_qrels(path, self.query_rows, self.doc_rows)
            yield Judged(path.name.removesuffix(".tsv"), f"qrels/{path.name}", found)
        for split, paths in _judgement_files(self.root).items():
            lines = JudgedLines(self.query_rows)
            for path in paths:
                columns = {"query": QUERY_IDS, "document": DOCUMENT_IDS}
                columns["grade"] = GRADES
                for where, row in _rows(path, columns):
                    lines.add(where, str(row["query"]), str(row["document"]),
                              row["grade"])  # fmt: skip
            yield Judged(split, f"qrels {split!r}", lines.judgements)


def is_columnar(root: Path) -> bool:
    """Whether a folder has a table `corpus` of parquet or saved arrow files."""
    return bool(_tables(root, "corpus"))


def columnar_sha256(root: Path) -> str:
    """sha256 of the names and contents of the files of a data set."""
    judged = [file for files in _judgement_files(root).values() for file in files]
    return files_sha256(
        [*_files(root, "corpus"), *_files(root, "queries"), *judged]
        + _tsv_files(root) + candidate_files(root)
    )  # fmt: skip


def _files(root: Path, name: str) -> list[Path]:
    return [file for files in _tables(root, name).values() for file in files]


def _judgement_files(root: Path) -> dict[str, list[Path]]:
    """Split -> files of its judgements."""
    for name in ("qrels", "default"):
        if found := _tables(root, name):
            return found
    found = _in_folder(root / "data")
    return {split: files for split, files in found.items() if split not in TABLES}


def _tsv_files(root: Path) -> list[Path]:
    """Judgements of the BEIR layout, which the hub has beside parquet files."""
    return qrels_files(root) if any((root / "qrels").glob("*.tsv")) else []


def _tables(root: Path, name: str) -> dict[str, list[Path]]:
    """Split -> files, in order, of the table `name` of a folder."""
    beside = {
        split: files
        for folder in (root, root / "data")
        for split, files in _in_folder(folder).items()
        if split == name
    }
    return beside or _in_folder(root / name)


def _in_folder(folder: Path) -> dict[str, list[Path]]:
    """Split -> files of a folder of parquet files, or of a saved data set."""
    if not folder.is_dir():
        return {}
    state = folder / "state.json"
    if state.exists():  # of `Dataset.save_to_disk`
        found = parse_json(state.read_text(), f"{state}")
        return {"test": [folder / each["filename"] for each in found["_data_files"]]}
    splits = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".parquet":
            shard = SHARD.fullmatch(file.name)
            splits.setdefault(shard["name"] if shard else file.stem, []).append(file)
        elif file.is_dir() and folder.name in (*TABLES, "qrels", "default"):
            inside = [one for files in _in_folder(file).values() for one in files]
            if inside:  # a split of `DatasetDict.save_to_disk`, or <split>/0000.parquet
                splits.setdefault(file.name, []).extend(inside)
    for files in splits.values():
        _check_shards(files)
    return splits


def _check_shards(files: list[Path]) -> None:
    """Raise a ValueError if one of the files *-00000-of-00005 is missing."""
    for number, file in enumerate(files):
        shard = SHARD.fullmatch(file.name)
        if shard and (
            int(shard["number"]) != number or int(shard["all"]) != len(files)
        ):
            raise ValueError(
                f"{file} is one of {int(shard['all'])} shards, and {len(files)} are "
                f"there: shard {number} is missing or too many"
            )


def _rows(path: Path, columns: dict) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and wanted cells of each row.

    Args:
        path: of a parquet file, or an arrow file of `datasets`.
        columns: cell -> names that its column may have; a cell that ends in '?' is None
            if there is no such column.
    """
    names, batches = _batches(path)
    found = {}
    for cell, allowed in columns.items():
        name = _first(allowed, names)
        if name is None and not cell.endswith("?"):
            raise ValueError(
                f"{path} has no column {' or '.join(map(repr, allowed))}; it has "
                f"{', '.join(names)}"
            )
        found[cell.removesuffix("?")] = name
    wanted, number = [name for name in found.values() if name], 0
    for batch in batches(wanted):
        for row in batch.select(wanted).to_pylist():
            number += 1
            cells = {cell: row[n] if n else None for cell, n in found.items()}
            yield f"{path}, row {number}", cells


def _first(allowed, names) -> str | None:
    """The first of the allowed names of a column that a table has."""
    return next((each for each in allowed if each in names), None)


def _batches(path: Path):
    """Names of the columns of a file, and a function that reads some of them."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            f"{path} needs pyarrow: python -m pip install 'ehi[parquet]'"
        ) from None
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            return file.schema_arrow.names, lambda names: file.iter_batches(
                ROWS_AT_ONCE, columns=names
            )
        reader = pa.ipc.open_stream(pa.memory_map(f"{path}"))
        return reader.schema.names, lambda _: reader
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {shortened(str(error))}") from None


class IrDatasets(Collection):
    """tfds builder of ids of the library `ir_datasets`.

    Args:
        root: ids joined by '+', such as 'beir/scifact/train+beir/scifact/test'. All
            have the same documents; each brings its queries and the judgements of a
            split, which is the last of train, dev, valid and test in the id, or 'test'.
    """

    VERSION = tfds.core.Version("1.0.0")

    def raw_documents(self) -> Iterator[tuple[str, Any, Any, Any]]:
        for number, document in enumerate(self._sets[0][1].docs_iter(), start=1):
            text = next(
                (getattr(document, n) for n in TEXTS if hasattr(document, n)), None
            )
            if text is None:
                text = document.default_text()
            title = getattr(document, "title", "")
            yield f"{self.root}, document {number}", document.doc_id, title, text

    def fields(self) -> Iterator[dict[str, Any]]:
        for document in self._sets[0][1].docs_iter():
            known = document._asdict()
            read = ("doc_id", "title", _first(TEXTS, known))
            yield {name: known[name] for name in known if name not in read}

    def raw_queries(self) -> Iterator[tuple[str, Any, Any]]:
        texts = {}
        for id, dataset in self._sets:
            if not dataset.has_queries():
                continue
            for query in dataset.queries_iter():
                text = getattr(query, "text", None) or query.default_text()
                if texts.get(query.query_id) != text:  # ids may share queries
                    texts[query.query_id] = text
                    yield f"{id}, query {query.query_id!r}", query.query_id, text

    def judged(self) -> Iterator[Judged]:
        for id, dataset in self._sets:
            if dataset.has_qrels():
                lines = JudgedLines(self.query_rows)
                for number, qrel in enumerate(dataset.qrels_iter(), start=1):
                    where = f"{id}, judgement {number}"
                    lines.add(where, qrel.query_id, qrel.doc_id, qrel.relevance)
                yield Judged(split_of(id), f"judgements of {id}", lines.judgements)

    def candidates(self) -> Candidates | None:
        gathered = {}
        for id, dataset in self._sets:
            if dataset.has_docpairs():
                triples = (
                    (pair.query_id, pair.doc_id_a, pair.doc_id_b, None)
                    for pair in dataset.docpairs_iter()
                )
                self.notes += gather(
                    triples, gathered, self.query_rows, self.doc_rows, id
                )
        return Candidates.of(gathered, len(self.query_rows))

    @cached_property
    def _sets(self) -> list[tuple[str, Any]]:
        return load_ids(self.root)


def load_ids(ids: str) -> list[tuple[str, Any]]:
    """Ids joined by '+' -> each id and its data set.

    Raises:
        ValueError: `ir_datasets` is not installed, an id is unknown, has no documents,
            other documents than the first one, or a split that another one has.
    """
    try:
        import ir_datasets
    except ImportError:
        raise ValueError(
            f"'ir_datasets:{ids}' needs ir_datasets: python -m pip install "
            "'ehi[ir-datasets]'"
        ) from None
    found, splits, parents = [], {}, {}
    for id in ids.split("+"):
        try:
            dataset = ir_datasets.load(id)
        except KeyError:
            raise ValueError(
                f"ir_datasets knows no data set {id!r}; see https://ir-datasets.com"
            ) from None
        if not dataset.has_docs():
            raise ValueError(f"the data set {id!r} of ir_datasets has no documents")
        parents.setdefault(ir_datasets.docs_parent_id(id) or id, id)
        if dataset.has_qrels() and splits.setdefault(split_of(id), id) != id:
            raise ValueError(
                f"{splits[split_of(id)]!r} and {id!r} are both split {split_of(id)!r}"
            )
        found.append((id, dataset))
    if len(parents) > 1:
        raise ValueError(
            f"{' and '.join(map(repr, parents.values()))} have other documents; join "
            "ids of one corpus"
        )
    return found


def split_of(id: str) -> str:
    """'msmarco-passage/dev/small' -> 'dev'; 'test' for ids that name no split."""
    words = [
        part for part in id.split("/") if part in ("train", "dev", "valid", "test")
    ]
    return words[-1] if words else "test"


def short_name(ids: str) -> str:
    """'beir/scifact/train+beir/scifact/test' -> 'scifact'."""
    import ir_datasets

    first = ids.split("+")[0]
    parent = ir_datasets.docs_parent_id(first) or first
    return parent.removeprefix("beir/").replace("/", "-")


def ids_sha256(ids: str) -> str:
    """sha256 of ids, their sizes and the version of `ir_datasets`.

    An id stands for fixed data; its files are not read.
    """
    import ir_datasets

    counts = [f"{id} {dataset.docs_count()}" for id, dataset in load_ids(ids)]
    version = getattr(ir_datasets, "__version__", "")
    return hashlib.sha256(" ".join([version, *counts]).encode()).hexdigest()
