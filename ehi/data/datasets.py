"""Open any data set: from a name or path to corpus, queries and judgements."""

import datetime
import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import numpy as np

from ehi.data import download, libraries, msmarco, pydocs, ratings
from ehi.data.beir import BeirFolder, source_sha256
from ehi.data.candidates import Candidates
from ehi.data.groups import connected_components
from ehi.data.libraries import Columnar, IrDatasets
from ehi.data.msmarco import MsMarco
from ehi.data.ratings import Interactions
from ehi.data.tfds_builder import Document, Documents, prepare
from ehi.files import cache_folder

LOG = logging.getLogger("ehi")

IR_DATASETS = "ir_datasets:"  # before ids of that library
# In these data sets a document with the id of a query is the query itself.
IDENTICAL_IDS = {"arguana", "quora"}


@dataclass(frozen=True)
class RetrievalDataset:
    """A corpus, its queries, and the judgements that link them.

    Args:
        name: short name for records; never a path, however the data set was opened.
        documents: the corpus, read lazily; row i has the id `doc_ids[i]`.
        qrels: split -> query id -> document id -> grade; positive means relevant. The
            corpus may lack a judged document.
        groups: (documents,) group of each document; a split must not divide a group.
            None if each document is its own group.
        corpus_sha256: hash of the documents in the form of corpus.jsonl.
        source: origin of the data for records, such as Python version and checksums.
        notes: what a user should know of the data, a sentence each.
        candidates: documents that come with a query: hard negatives, and documents that
            a teacher scored; None without such files.
        fields: reads what the sources say of each document beside its text, in their
            order; None if they cannot.
    """

    name: str
    documents: Sequence[Document]
    doc_ids: list[str]
    query_ids: list[str]
    query_texts: list[str]
    qrels: dict[str, dict[str, dict[str, int]]]
    groups: np.ndarray | None
    corpus_sha256: str
    source: dict[str, str]
    notes: tuple[str, ...] = ()
    candidates: Candidates | None = None
    fields: Callable[[], Iterator[dict]] | None = None

    def metadata(self, names: Sequence[str]) -> Iterator[dict]:
        """The chosen fields of each document, for an index to filter by.

        Keys of an object `metadata`, as BEIR has it, are fields as well. Dates become
        texts, which compare as dates.

        Args:
            names: of the fields; '*' for all whose value is a text, a number or a bool.

        Raises:
            ValueError: no document has one of the fields; it names those there are.
        """
        there = set()
        for record in self.fields() if self.fields is not None else ():
            inner = record.pop("metadata", None)
            record |= inner if isinstance(inner, dict) else {}
            there |= record.keys()
            yield {
                name: _plain(value)
                for name, value in record.items()
                if name in names or ("*" in names and _is_plain(value))
            }
        missing = [name for name in names if name not in there and name != "*"]
        if missing or not there:
            raise ValueError(
                f"no document of {self.name} has the metadata "
                f"{', '.join(map(repr, missing or names))}; there are "
                f"{', '.join(map(repr, sorted(there))) or 'none'}"
            )

    def positives(self, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query rows (R,), document rows (R,) and grades (R,) of the relevant pairs.

        Documents that the corpus lacks are left out.

        Raises:
            ValueError: the data set has no such split.
        """
        query_rows = {id: row for row, id in enumerate(self.query_ids)}
        doc_rows = {id: row for row, id in enumerate(self.doc_ids)}
        pairs = [
            (query_rows[query], doc_rows[doc], grade)
            for query, judged in self.judgements(split).items()
            for doc, grade in judged.items()
            if grade > 0 and doc in doc_rows
        ]
        columns = np.array(pairs, np.int64).reshape(-1, 3).T
        return columns[0], columns[1], columns[2]

    def judgements(self, split: str) -> dict[str, dict[str, int]]:
        """`qrels[split]`; a ValueError names the splits that exist."""
        if split not in self.qrels:
            there = ", ".join(sorted(self.qrels)) or "no judgements at all"
            carve = "train" in self.qrels and split == "test"
            advice = "; --config.split=dev carves one out of train" if carve else ""
            raise ValueError(
                f"{self.name} has no split {split!r}; it has {there}{advice}"
            )
        return self.qrels[split]

    def check_relevant(self, split: str) -> None:
        """Raise a ValueError if a split has no positive grade of a known document."""
        relevant = {
            doc
            for row in self.judgements(split).values()
            for doc, grade in row.items()
            if grade > 0
        }
        if relevant and relevant.isdisjoint(self.doc_ids):
            raise ValueError(
                f"the corpus of {self.name} has no relevant document of split "
                f"{split!r}, such as {min(relevant)!r}, so every score would be 0"
            )
        if not relevant:
            raise ValueError(
                f"no judgement of split {split!r} of {self.name} has a grade above 0, "
                "so no ranking can be scored"
            )

    def identical_ids(self, split: str, ignore: bool | None = None) -> frozenset[str]:
        """Queries of a split for which the document of the same id is no answer.

        A judged pair is never among them, whatever `ignore` says.

        Args:
            split: whose queries are asked.
            ignore: as BEIR's `ignore_identical_ids`. True: all queries with the id of a
                document; False: none. None: all of ArguAna and Quora; elsewhere those
                whose text is that of the document, since many data sets number queries
                and documents alike.
        """
        if ignore is False:
            return frozenset()
        doc_rows = {id: row for row, id in enumerate(self.doc_ids)}
        asked = [id for id in self.judgements(split) if id in doc_rows]
        judged = {
            id
            for judgements in self.qrels.values()
            for id in asked
            if id in judgements.get(id, ())
        }
        asked = [id for id in asked if id not in judged]
        if ignore or self.name.lower() in IDENTICAL_IDS:
            return frozenset(asked)
        text_of = dict(zip(self.query_ids, self.query_texts, strict=True))
        same = set()
        for id in asked:
            document = self.documents[doc_rows[id]]
            if text_of[id].strip() in (document.text.strip(), document.content):
                same.add(id)
        return frozenset(same)


def open_dataset(
    name: str | os.PathLike, *, data_dir: str | os.PathLike | None = None
) -> RetrievalDataset:
    """Open a data set; prepare it on first use.

    Args:
        name: 'pydocs'; 'beir/<name>', which is downloaded unless a folder of the
            environment variable EHI_DATA has `<name>` or `<name>.zip`;
            'beir/cqadupstack/<forum>'; the path of a BEIR folder or zip, of a folder of
            MS MARCO's tables (see `ehi.data.msmarco`), or of one of parquet or saved
            arrow files (see `ehi.data.libraries`), whose queries and judgements may be
            missing; 'ir_datasets:<id>', several ids joined by '+'; 'movielens-1m',
            'amazon-books', or the path of a folder in their layout (see
            `ehi.data.ratings`).
        data_dir: folder of prepared copies and downloads; default the environment
            variable EHI_CACHE, else ~/.cache/ehi.

    Raises:
        ValueError: there is no such data set, or it is malformed; the message names
            file and line.
        ConnectionError: a public set cannot be downloaded.
    """
    cache = cache_folder(data_dir) / "datasets"
    if str(name) == "pydocs":
        return _open_pydocs(cache)
    if str(name).startswith(IR_DATASETS):
        return _open_ir_datasets(str(name).removeprefix(IR_DATASETS), cache)
    rated = ratings.find(str(name), cache)
    if rated is not None:
        return _open_ratings(*rated, cache)
    path, part, short_name = _find_path(str(name), cache)
    if not part and path.is_dir() and not (path / download.CORPUS).exists():
        if msmarco.corpus_file(path):
            key = msmarco.source_sha256(path)
            source = {"layout": "msmarco", "sha256": key}
            return _read(MsMarco, path, cache, key, name=short_name, source=source)
        if libraries.is_columnar(path):
            key = libraries.columnar_sha256(path)
            source = {"layout": "columnar", "sha256": key}
            return _read(Columnar, path, cache, key, name=short_name, source=source)
    with download.explained_zip(path):
        root = download.find_root(path, part)
        key = source_sha256(root)  # reads every byte, so a damaged zip shows here
    source = {"layout": "beir", "sha256": key}
    return _read(BeirFolder, root, cache, key, name=short_name, source=source)


def _find_path(name: str, cache: Path) -> tuple[Path, str, str]:
    """Path, part of a collection, and short name of the data set called `name`."""
    public = download.public_sets()
    kind, _, rest = name.partition("/")
    base, _, part = rest.partition("/")
    if kind == "beir" and base:
        path = download.search_folders(base)
        if path is None and base in public:
            address, sha256 = public[base]
            path = download.download(address, sha256, cache / "zips" / f"{base}.zip")
        if path is not None:
            return path, part, f"{base}-{part}" if part else base
    path = download.expanded(name, "the data set").resolve()
    if not path.exists():
        raise ValueError(
            f"unknown data set {name!r}: expected 'pydocs', 'movielens-1m', "
            "'amazon-books', 'ir_datasets:<id>', the path of a BEIR folder or zip, of "
            "a folder of MS MARCO's tables or of parquet files, "
            "'beir/<folder or zip in a folder of EHI_DATA>', or "
            + ", ".join(f"'beir/{known}'" for known in sorted(public))
        )
    is_zip = path.suffix.lower() == ".zip"
    return path, "", path.stem if is_zip else path.name


def _open_pydocs(cache: Path) -> RetrievalDataset:
    root = pydocs.standard_library()
    key = pydocs.source_sha256(root)
    source = {"python": platform.python_version(), "sha256": key}
    found = _read(pydocs.PyDocs, root, cache, key, name="pydocs", source=source)
    return replace(found, fields=lambda: _fields_of_functions(found.documents, root))


def _fields_of_functions(documents, root: Path) -> Iterator[dict]:
    """Module, top package and number of lines of each function.

    They are not in `ehi.data.pydocs`, whose code is part of the identity of its data.
    """
    paths = (path.with_suffix("").parts for path in pydocs.source_files(root))
    modules = {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in paths
    }
    for document in documents:
        module = document.id.rpartition(".")[0]
        while module and module not in modules:
            module = module.rpartition(".")[0]
        yield {
            "module": module,
            "package": module.partition(".")[0],
            "lines": document.text.count("\n") + 1,
        }


def _open_ratings(root, name: str, cache: Path) -> RetrievalDataset:
    key = ratings.source_sha256(root)
    source = {"layout": "ratings", "sha256": key}
    return _read(Interactions, root, cache, key, name=name, source=source)


def _open_ir_datasets(ids: str, cache: Path) -> RetrievalDataset:
    libraries.load_ids(ids)  # says what is wrong with them
    key = libraries.ids_sha256(ids)
    source = {"layout": "ir_datasets", "ids": ids, "sha256": key}
    name = libraries.short_name(ids)
    return _read(IrDatasets, ids, cache, key, name=name, source=source)


def _read(
    builder_type, root, cache: Path, key: str, *, name: str, source: dict[str, str]
) -> RetrievalDataset:
    folder = cache / f"{name}-{key[:16]}"
    builder, tables = prepare(builder_type, root, folder)
    queries = []
    if "queries" in builder.info.splits:
        queries = list(Documents(builder.as_data_source("queries"), folder))
    judged_ids = [*tables.doc_ids, *tables.missing_ids]
    qrels = {
        split: _by_id(rows, queries, judged_ids)
        for split, rows in tables.judgements.items()
    }
    for note in tables.notes:
        LOG.warning("%s: %s", name, note)
    return RetrievalDataset(
        name=name,
        documents=Documents(builder.as_data_source("corpus"), folder),
        doc_ids=tables.doc_ids,
        query_ids=[query.id for query in queries],
        query_texts=[query.text for query in queries],
        qrels=qrels,
        groups=tables.groups,
        corpus_sha256=tables.corpus_sha256,
        source=source,
        notes=tables.notes,
        candidates=tables.candidates,
        fields=builder.fields,
    )


def _is_plain(value) -> bool:
    return isinstance(value, str | int | float | Decimal | datetime.date)


def _plain(value):
    """A value as an index stores it; others stay, and are refused there."""
    if isinstance(value, datetime.date):  # or a datetime
        return value.isoformat()
    return float(value) if isinstance(value, Decimal) else value


def _by_id(rows: np.ndarray, queries, doc_ids) -> dict[str, dict[str, int]]:
    judged = {}
    for query, doc, grade in rows.tolist():
        judged.setdefault(queries[query].id, {})[doc_ids[doc]] = grade
    return judged


def carve_dev(
    dataset: RetrievalDataset, *, fraction: float = 0.2, seed: int = 0
) -> RetrievalDataset:
    """Move train queries to a new split 'dev' that shares no answer with 'train'.

    Whole groups of documents move. Two documents are in one group if they answer the
    same train query or have the same number in `dataset.groups`, transitively.

    Args:
        dataset: has a split 'train' and no 'dev'.
        fraction: of the train queries. 'dev' gets at most this fraction, as close to it
            as whole groups allow.
        seed: for the order in which groups are tried.

    Raises:
        ValueError: `fraction` is not between 0 and 1, there is no 'train' or already a
            'dev', or no group is small enough to move.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    if "dev" in dataset.qrels:
        raise ValueError(f"{dataset.name} has a split 'dev' already")
    if "train" not in dataset.qrels:
        there = ", ".join(sorted(dataset.qrels)) or "no judgements at all"
        raise ValueError(
            f"{dataset.name} has no split 'train' to carve 'dev' out of; it has {there}"
        )
    queries, docs, _ = dataset.positives("train")
    links = _neighbours(docs, queries)
    if dataset.groups is not None:
        links += _neighbours(np.arange(len(dataset.doc_ids)), dataset.groups)
    component = np.array(connected_components(len(dataset.doc_ids), links))
    query_rows, first = np.unique(queries, return_index=True)
    component_of_query = component[docs[first]]
    names, sizes = np.unique(component_of_query, return_counts=True)
    room, moved = int(fraction * len(query_rows)), []
    for index in np.random.default_rng(seed).permutation(len(names)):
        if sizes[index] <= room:
            room -= sizes[index]
            moved.append(names[index])
    if not moved:
        raise ValueError(
            f"cannot carve {fraction:.0%} out of {dataset.name}: of its "
            f"{len(query_rows)} train queries, the smallest group of documents "
            f"answers {min(sizes, default=0)}"
        )
    to_dev = query_rows[np.isin(component_of_query, moved)]
    dev_ids = {dataset.query_ids[row] for row in to_dev}
    train = dataset.qrels["train"]
    qrels = dict(dataset.qrels)
    qrels["train"] = {id: train[id] for id in train if id not in dev_ids}
    qrels["dev"] = {id: train[id] for id in train if id in dev_ids}
    return replace(dataset, qrels=qrels)


def _neighbours(items: np.ndarray, labels: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of neighbours with the same label; they connect all items of a label."""
    order = np.argsort(labels, kind="stable")
    items, labels = items[order], labels[order]
    same = labels[1:] == labels[:-1]
    return list(zip(items[:-1][same].tolist(), items[1:][same].tolist(), strict=True))
