"""tfds builder of MS MARCO's tables, a folder of files with tabs between the columns.

collection.tsv       document id, text; or id, title, text; or id, url, title, text
queries.<split>.tsv  query id, text                            may be missing
qrels.<split>.tsv    query id, 0, document id, grade (TREC)    may be missing

Other names of the releases are read too: msmarco-docs.tsv,
msmarco-doctrain-queries.tsv, msmarco-doctrain-qrels.tsv, 2019qrels-pass.txt. Every file
may be packed (`.gz`).
Files of triples and teacher scores are those of `ehi.data.candidates`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from ehi.data.candidates import candidate_files
from ehi.data.collection import Collection
from ehi.data.lines import numbered_cells, numbered_lines
from ehi.data.qrels import Judged, read_qrels
from ehi.files import files_sha256

COLLECTIONS = ("collection.tsv", "msmarco-docs.tsv")
QUERIES = re.compile(r".*queries.*\.tsv(\.gz)?", re.IGNORECASE)
QRELS = re.compile(r".*qrels.*\.(tsv|txt|trec|qrels)(\.gz)?", re.IGNORECASE)
SPLIT = re.compile(r"train|dev|test|valid|val|eval", re.IGNORECASE)


def corpus_file(root: Path) -> Path | None:
    """The file of documents if a folder is in this layout, else None."""
    for name in COLLECTIONS:
        for path in (root / name, root / f"{name}.gz"):
            if path.is_file():
                return path
    return None


class MsMarco(Collection):
    """tfds builder of a folder of MS MARCO's tables.

    Queries that no file judges are left out if others are judged: the releases have
    300,000 of them.

    Args:
        root: the folder of collection.tsv.
    """

    VERSION = tfds.core.Version("1.0.0")

    def raw_documents(self) -> Iterator[tuple[str, Any, Any, Any]]:
        expected = "id and text; id, title and text; or id, url, title and text"
        for where, cells in numbered_cells(self._corpus, (2, 3, 4), expected):
            title = cells[-2] if len(cells) > 2 else ""
            yield where, cells[0], title, cells[-1]

    def fields(self) -> Iterator[dict[str, Any]]:
        for _, cells in numbered_cells(self._corpus, (2, 3, 4), "a document"):
            yield {"url": cells[1]} if len(cells) > 3 else {}

    def raw_queries(self) -> Iterator[tuple[str, Any, Any]]:
        judged, texts, left_out = self._judged_queries(), {}, 0
        for path in _query_files(self.root):
            own = set()
            for where, (id, text) in numbered_cells(path, (2,), "query id and text"):
                # queries.dev.tsv holds those of queries.dev.small.tsv again.
                if id not in own and texts.get(id) == text:
                    continue
                own.add(id)
                if judged and id not in judged:
                    left_out += 1
                    continue
                texts[id] = text
                yield where, id, text
        if judged and not texts:
            raise ValueError(
                f"{self.root} has judgements, but none of their queries: put "
                "queries.<split>.tsv beside them"
            )
        if left_out:
            self.notes.append(f"{left_out:,} queries that no file judges are left out")

    def judged(self) -> Iterator[Judged]:
        for split, path in qrels_of(self.root).items():
            found = read_qrels(path, self.query_rows, self.doc_rows)
            yield Judged(split, path.name, found)

    def corpus_name(self) -> str:
        return f"{self._corpus}"

    @property
    def _corpus(self) -> Path:
        return corpus_file(self.root)

    def _judged_queries(self) -> set[str]:
        """Ids of the queries that any file judges."""
        paths = qrels_of(self.root).values()
        return {
            line.split(maxsplit=1)[0]
            for path in paths
            for _, line in numbered_lines(path)
        }


def qrels_of(root: Path) -> dict[str, Path]:
    """Split -> file of its judgements.

    A file is of the split that its name has in it, or else of 'test'. If several files
    are, as qrels.dev.tsv and qrels.dev.small.tsv, they are splits of their own: 'dev'
    and 'dev.small'.
    """
    by_split = {}
    for path in _matching(root, QRELS):
        word = SPLIT.search(path.name)
        by_split.setdefault(word.group().lower() if word else "test", []).append(path)
    splits = {}
    for split, paths in by_split.items():
        for path in paths:
            name = re.sub(r"\.(tsv|txt|trec|qrels)(\.gz)?$", "", path.name)
            own = re.sub("qrels", "", name, flags=re.IGNORECASE).strip("._-")
            own = split if len(paths) == 1 else own
            if own in splits:
                raise ValueError(
                    f"{path} and {splits[own].name} are both judgements of split "
                    f"{own!r}; keep one of them"
                )
            splits[own] = path
    return splits


def _query_files(root: Path) -> list[Path]:
    """Files of queries, those of the split 'train' first."""
    found = _matching(root, QUERIES)
    return sorted(found, key=lambda path: "train" not in path.name.lower())


def _matching(root: Path, pattern: re.Pattern) -> list[Path]:
    """Visible files of a folder whose names match, sorted by name."""
    return sorted(
        path
        for path in root.iterdir()
        if pattern.fullmatch(path.name) and not path.name.startswith(".")
    )


def source_sha256(root: Path) -> str:
    """sha256 of the names and contents of the files of a data set."""
    tables = [*_matching(root, QUERIES), *qrels_of(root).values()]
    return files_sha256([corpus_file(root), *tables, *candidate_files(root)])
