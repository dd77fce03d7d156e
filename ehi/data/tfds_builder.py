"""Prepared copies of data sets: text as tfds array records, the rest as one .npz.

The folder of a copy is named after the sha256 of its sources. An edited corpus is
therefore prepared again, and the old copy stays valid for the old sources.
"""

import contextlib
import hashlib
import io
import itertools
import json
import zipfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from ehi.data.candidates import Candidates
from ehi.files import new_folder
from ehi.progress import track

TABLES = "tables.npz"
READ_AHEAD = 1024
RECORDS_OF_A_SHARD = 1_000_000


@dataclass(frozen=True)
class Document:
    """One document of a corpus."""

    id: str
    title: str
    text: str

    @property
    def content(self) -> str:
        """The text that an encoder reads: title and text."""
        return f"{self.title} {self.text}".strip()


class Documents(Sequence):
    """The documents of a prepared copy, decoded when they are read."""

    def __init__(self, source, folder: Path):
        self._source, self._folder = source, folder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return self._read(range(len(self))[row])
        row = range(len(self))[row]  # negative rows and IndexError as in a list
        return self._read([row])[0]

    def __iter__(self) -> Iterator[Document]:
        for start in range(0, len(self), READ_AHEAD):
            yield from self[start : start + READ_AHEAD]

    def _read(self, rows: Iterable[int]) -> list[Document]:
        try:
            records = self._source.__getitems__(list(rows))
        except (RuntimeError, ValueError) as error:
            raise _damaged(self._folder, error) from None
        return [
            Document(*(record[name].decode() for name in ("id", "title", "text")))
            for record in records
        ]


@dataclass(frozen=True)
class Tables:
    """The part of a prepared copy that is small enough to be read whole.

    `judgements` has a row (query row, document row, grade) for each judgement. Document
    rows from the size of the corpus on count `missing_ids`.
    """

    doc_ids: list[str]
    corpus_sha256: str
    groups: np.ndarray | None  # (documents,)
    judgements: dict[str, np.ndarray]  # split -> (judgements, 3)
    missing_ids: tuple[str, ...] = ()  # judged documents that the corpus lacks
    notes: tuple[str, ...] = ()  # remarks on the data for its user
    candidates: Candidates | None = None

    def save(self, path: Path) -> None:
        """Write the arrays to one .npz file."""
        arrays = {f"qrels/{split}": rows for split, rows in self.judgements.items()}
        if self.groups is not None:
            arrays["groups"] = self.groups
        for name in ("missing_ids", "notes"):
            if values := getattr(self, name):
                arrays[name] = _joined(values)
        if self.candidates is not None:
            for name, values in vars(self.candidates).items():
                arrays[f"candidates/{name}"] = values
        ids = _joined(self.doc_ids)
        np.savez(path, doc_ids=ids, corpus_sha256=self.corpus_sha256, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Tables":
        """Read a file of `save`."""
        with np.load(path) as arrays:
            prefix = "qrels/"
            splits = [name for name in arrays.files if name.startswith(prefix)]
            candidates = {
                name.removeprefix("candidates/"): arrays[name]
                for name in arrays.files
                if name.startswith("candidates/")
            }
            return cls(
                doc_ids=_split(arrays["doc_ids"]),
                corpus_sha256=str(arrays["corpus_sha256"]),
                groups=arrays["groups"] if "groups" in arrays.files else None,
                judgements={name.removeprefix(prefix): arrays[name] for name in splits},
                candidates=Candidates(**candidates) if candidates else None,
                **{
                    name: tuple(_split(arrays[name]))
                    for name in ("missing_ids", "notes")
                    if name in arrays.files
                },
            )


def _joined(lines: Iterable[str]) -> np.ndarray:
    return np.frombuffer("\n".join(lines).encode(), np.uint8)


def _split(joined: np.ndarray) -> list[str]:
    return joined.tobytes().decode().split("\n")


class RetrievalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A tfds builder of a corpus and its queries; it keeps the order of the sources.

    Args:
        root: folder of the sources.
        data_dir: folder of the prepared copy.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, root, data_dir: Path):
        self.root = root
        self.doc_rows, self.query_rows = {}, {}  # id -> row, filled while writing
        self.missing_ids = {}  # id -> number, of judged documents not in the corpus
        self.notes = []
        self.corpus_digest = hashlib.sha256()
        super().__init__(data_dir=data_dir, file_format="array_record")

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The corpus."""

    @abstractmethod
    def queries(self) -> Iterator[tuple[str, str]]:
        """(id, text) of each query; there may be none."""

    @abstractmethod
    def judgements(self) -> dict[str, np.ndarray]:
        """Split -> (query row, document row, grade) of each judgement (R, 3)."""

    def groups(self) -> np.ndarray | None:
        """Group of each document (documents,); a split must not divide a group."""
        return None

    def candidates(self) -> Candidates | None:
        """Documents that come with a query, or None."""
        return None

    def fields(self) -> Iterator[dict]:
        """What the sources say of each document beside its text, in their order."""
        return iter(())

    def tables(self) -> Tables:
        """The tables of the prepared copy; call this after the records are written."""
        judged = {split: rows for split, rows in self.judgements().items() if len(rows)}
        candidates = self.candidates()
        return Tables(
            list(self.doc_rows), self.corpus_digest.hexdigest(), self.groups(), judged,
            tuple(self.missing_ids), tuple(self.notes), candidates,
        )  # fmt: skip

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"id": text, "title": text, "text": text})
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def write(self) -> None:
        """Write the records of the prepared copy, one after the other.

        `download_and_prepare` of tfds would keep the whole corpus in memory to sort it,
        and needs TensorFlow if that is more than 1 GB.
        """
        writer = tfds.core.SequentialWriter(
            self.info, RECORDS_OF_A_SHARD, file_format="array_record"
        )
        Path(self.data_dir).mkdir(parents=True)
        queries = list(self.queries())
        self.query_rows = {id: row for row, (id, _) in enumerate(queries)}
        asked = ({"id": id, "title": "", "text": text} for id, text in queries)
        splits = {"corpus": self._corpus_examples()}
        if queries:  # tfds cannot read a split without examples
            splits["queries"] = asked
        writer.initialize_splits(list(splits))
        for split, examples in splits.items():
            while some := list(itertools.islice(examples, READ_AHEAD)):
                writer.add_examples({split: some})
        writer.close_all()

    def _corpus_examples(self) -> Iterator[dict[str, str]]:
        documents = track(self.documents(), "prepare", "documents")
        for row, document in enumerate(documents):
            example = vars(document)
            self.doc_rows[document.id] = row
            self.corpus_digest.update(json.dumps(example).encode() + b"\n")
            yield example

    def _split_generators(self, dl_manager):
        raise NotImplementedError("`write` writes the examples")

    def _generate_examples(self):
        raise NotImplementedError("examples come from documents() and queries()")


@contextlib.contextmanager
def _quiet_tfds():
    """Silence the prints, logs and progress bars of tfds; ours remains."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        logging.set_verbosity(verbosity)


@_quiet_tfds()
def prepare(
    builder_type: type[RetrievalBuilder], root, folder: Path
) -> tuple[RetrievalBuilder, Tables]:
    """Open the prepared copy `folder`; if it is missing, make it from `root`.

    The copy is made in a folder beside it and renamed, so an error or a kill leaves no
    half copy. If two processes make the same copy, the first one wins.
    """
    if not folder.exists():
        with new_folder(folder, exists="keep") as made:
            builder = builder_type(root=root, data_dir=made)
            builder.write()
            builder.tables().save(made / TABLES)
    try:
        return builder_type(root=root, data_dir=folder), Tables.load(folder / TABLES)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"the prepared copy {folder} is damaged: delete it and run again ({error})"
    )
