"""A data set of vectors: documents, queries, and labels made by exact search.

    documents.npy        (N, T) float32 or float16, or documents-00000-of-00008.npy, ...
    queries.npy          (Q, T)                          may be missing
    ids.txt              an id on a line                 may be missing: row numbers
    query_ids.txt        the same of the queries         may be missing
    qrels/<split>.tsv    query id, document id, grade    may be missing

or documents.parquet and queries.parquet, or one .npy, .parquet or .hdf5 file.

Without judgements a query is labelled by its nearest documents, exactly (LibVQ's
virtual labels), and some queries are held out to evaluate. Without queries, some
documents are held out as queries: they stay in the corpus, ask for their neighbours
other than themselves, and no phase trains on them as queries.
"""

import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ehi.data.datasets import RetrievalDataset
from ehi.data.qrels import qrels_files, read_qrels
from ehi.data.rows import Counted
from ehi.data.tfds_builder import Document
from ehi.data.vectors.checks import check_queries, scan
from ehi.data.vectors.containers import Container, Vectors, open_container
from ehi.data.vectors.metric import metric_of
from ehi.data.vectors.neighbours import cached_neighbours
from ehi.data.vectors.pairs import NEIGHBOURS

LOG = logging.getLogger("ehi")

HELD_OUT = 1000  # most queries of a split that is made here
HELD_SHARE = 0.1  # largest share of the queries, or documents, that a split gets
MOST_TRAIN = 50_000  # training queries that are labelled
EXACT = 100  # nearest documents that recall is measured against


class Untitled(Sequence):
    """Documents without text: the id is shown as title."""

    def __init__(self, ids: Sequence[str]):
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [Document(id, id, "") for id in self._ids[row]]
        return Document(self._ids[row], self._ids[row], "")


@dataclass(frozen=True)
class VectorDataset(RetrievalDataset):
    """A `RetrievalDataset` of vectors instead of texts.

    Attributes:
      vectors: documents (N, T), memory-mapped.
      query_vectors: queries (Q, T) in the order of `query_ids`.
      metric: how they are compared, of `ehi.data.vectors.metric.METRICS`.
      own_rows: (Q,) document row that a query is, or -1; it is not ranked for it.
      unit: whether all documents have unit length.
      virtual: splits that exact search labelled.
    """

    vectors: Vectors = field(kw_only=True, repr=False)
    query_vectors: Vectors = field(kw_only=True, repr=False)
    metric: str = field(kw_only=True)
    own_rows: np.ndarray = field(kw_only=True, repr=False)
    unit: bool = field(kw_only=True)
    virtual: tuple[str, ...] = field(kw_only=True, default=())

    def identical_ids(self, split: str, ignore: bool | None = None) -> frozenset[str]:
        """Queries for which the document of the same id is no answer.

        `ignore` None: documents that stand in as queries.
        """
        if ignore is not None:
            return super().identical_ids(split, ignore)
        own = {self.query_ids[row] for row in np.flatnonzero(self.own_rows >= 0)}
        return frozenset(own.intersection(self.judgements(split)))

    def exact(self, rows: np.ndarray, k: int = EXACT) -> tuple[np.ndarray, np.ndarray]:
        """Document rows (n, k) and scores of the nearest documents of queries."""
        own = self.own_rows[rows]
        return cached_neighbours(
            self.vectors, np.asarray(self.query_vectors[rows], np.float32),
            min(k, len(self.vectors) - 1), metric=self.metric,
            key=self.corpus_sha256, exclude=own if (own >= 0).any() else None,
        )  # fmt: skip

    @functools.cached_property
    def training_rows(self) -> np.ndarray | Counted:
        """Documents that may be asked for as queries: none that is held out."""
        held = self.own_rows[self.own_rows >= 0]
        if not len(held):
            return Counted(0, len(self.vectors))
        return np.setdiff1d(np.arange(len(self.vectors)), held)


def open_vectors(
    path: str | Path, *, metric: str = "", name: str = "", seed: int = 0
) -> VectorDataset:
    """Open vectors, check them, and label the queries that nobody has judged.

    Args:
      path: see the top of this file.
      metric: 'cosine', 'ip' or 'l2'; '': that of the file, or any if all documents have
        unit length.
      name: short name for records; '': that of the file.
      seed: draws the queries that are held out.

    Raises:
      FileNotFoundError, ValueError, ImportError, OSError: one sentence says what is
        wrong, and names file and row.
    """
    path = Path(path).expanduser().resolve()
    if not path.exists():
        raise FileNotFoundError(f"there are no vectors in {path}")
    found = open_container(path)
    where = f"{path.name}/{found.document_file}" if found.folder else str(path)
    if found.queries is not None:
        query_where = where.replace(found.document_file, found.query_file)
        check_queries(found.queries, found.documents.shape[1], query_where)
    if metric and found.metric and metric != found.metric:
        raise ValueError(
            f"{path} was made for {found.metric!r}, so its neighbours are not those of "
            f"metric={metric!r}"
        )
    scanned = scan(found.documents, where)
    metric = metric_of(metric or found.metric, scanned.norms, scanned.uneven, where)
    source = {"layout": "vectors", "sha256": scanned.sha256, "metric": metric}
    if found.queries is not None and len(found.queries):
        source["queries"] = scan(found.queries, query_where).sha256
    doc_ids = found.doc_ids or list(map(str, range(len(found.documents))))
    ids = hashlib.sha256("\n".join(doc_ids).encode()).hexdigest()
    sha256 = hashlib.sha256(f"{scanned.sha256} {ids}".encode()).hexdigest()
    about = {
        "name": name or path.stem, "metric": metric, "unit": scanned.uneven < 0,
        "doc_ids": doc_ids, "corpus_sha256": sha256, "source": source,
    }  # fmt: skip
    return _with_splits(found, about, seed)


def _with_splits(found: Container, about: dict, seed: int) -> VectorDataset:
    doc_ids = about["doc_ids"]
    queries, query_ids, own, splits = _queries_of(found, doc_ids, seed)
    qrels = _read_judgements(found, query_ids, doc_ids)
    judged = {id for split in qrels.values() for id in split}
    if qrels:  # queries that nobody judged are logged ones: they train
        logged = [r for r, id in enumerate(query_ids) if id not in judged]
        splits = {"train": np.array(logged, np.int64)[:MOST_TRAIN]}
    dataset = VectorDataset(
        **about, documents=Untitled(doc_ids), query_ids=query_ids,
        query_texts=query_ids, qrels=qrels, groups=None, vectors=found.documents,
        query_vectors=queries, own_rows=own,
    )  # fmt: skip
    virtual = []
    for split, rows in splits.items():
        if len(rows):
            qrels[split] = qrels.get(split, {}) | _labels(dataset, rows)
            virtual.append(split)
    notes = _notes(found, virtual, bool(judged))
    for text in notes:
        LOG.info("%s: %s", dataset.name, text)
    return replace(dataset, qrels=qrels, virtual=tuple(virtual), notes=notes)


def _queries_of(found: Container, doc_ids, seed: int):
    """Queries, their ids, the documents that they are, and rows by split."""
    rng, documents = np.random.default_rng(seed), found.documents
    held, vectors, ids = np.zeros(0, np.int64), [], []
    if found.queries is not None:
        vectors.append(found.queries)
        ids = found.query_ids or [f"q{row}" for row in range(len(found.queries))]
    known = len(ids)
    own = np.full(known, -1)
    splits = {"test": np.arange(known)}
    if known and not found.metric:
        order, some = rng.permutation(known), _held_out(known)
        splits = {
            "test": np.sort(order[:some]),
            "dev": np.sort(order[some : 2 * some]),
            "train": np.sort(order[2 * some :][:MOST_TRAIN]),
        }
    elif found.folder is None or not known:
        some = _held_out(len(documents))
        held = rng.choice(len(documents), size=2 * some, replace=False)
        test, dev = np.sort(held[:some]), np.sort(held[some:])
        if known:  # the queries of ann-benchmarks evaluate
            held = dev
            splits["dev"] = known + np.arange(some)
        else:
            held = np.concatenate([test, dev])
            splits = {"test": np.arange(some), "dev": some + np.arange(some)}
        own = np.concatenate([own, held])
        vectors.append(documents[held])
        ids = [*ids, *(doc_ids[row] for row in held)]
    if len(vectors) == 2:
        vectors = [np.concatenate(vectors)]
    return vectors[0], ids, own, splits


def _held_out(rows: int) -> int:
    return max(1, min(HELD_OUT, int(HELD_SHARE * rows)))


def _read_judgements(found: Container, query_ids, doc_ids) -> dict:
    if found.folder is None or not (found.folder / "qrels").is_dir():
        return {}
    known = dict.fromkeys(query_ids), dict.fromkeys(doc_ids)
    qrels: dict = {}
    for file in qrels_files(found.folder):
        split = qrels.setdefault(file.name.removesuffix(".tsv"), {})
        for judged in read_qrels(file, *known):
            split.setdefault(judged.query, {})[judged.document] = judged.grade
    return qrels


def _labels(dataset: VectorDataset, rows: np.ndarray) -> dict[str, dict[str, int]]:
    """The nearest documents of some queries, as judgements of grade 1."""
    nearest, _ = dataset.exact(rows, NEIGHBOURS)
    return {
        dataset.query_ids[row]: {dataset.doc_ids[d]: 1 for d in found if d >= 0}
        for row, found in zip(rows.tolist(), nearest.tolist(), strict=True)
    }


def _notes(found: Container, virtual, judged: bool) -> tuple[str, ...]:
    """What a reader of a report must know of the labels."""
    if not virtual:
        return ()
    who = "queries"
    if found.queries is None:
        who = "documents that stand in as queries and do not find themselves"
    what = "logged queries without judgements" if judged else f"{who} of split"
    return (
        f"labels of {what} {', '.join(virtual)} are their {NEIGHBOURS} exact nearest "
        "documents",
    )
