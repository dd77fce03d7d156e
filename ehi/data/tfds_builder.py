"""Prepared copies: tfds array records of the text, one .npz of ids and judgements.

A copy lies in a folder named after the sha256 of its sources, so that an edited corpus
is prepared again and the old copy stays valid for the old sources.
"""

import contextlib
import hashlib
import io
import json
import os
import tempfile
import zipfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from ehi.progress import track

TABLES = "tables.npz"
READ_AHEAD = 1024


@dataclass(frozen=True)
class Document:
    """One document of a corpus."""

    id: str
    title: str
    text: str

    @property
    def content(self) -> str:
        """What an encoder reads: title and text."""
        return f"{self.title} {self.text}".strip()


class Documents(Sequence):
    """The documents of a prepared copy, decoded only when asked for."""

    def __init__(self, source, folder: Path):
        self._source, self._folder = source, folder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return self._read(range(len(self))[row])
        row = range(len(self))[row]  # negative rows and IndexError as a list has them
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
    """What is small enough to be read whole.

    `judgements` holds a row (query row, document row, grade) per judgement of a split.
    """

    doc_ids: list[str]
    corpus_sha256: str
    groups: np.ndarray | None  # (documents,)
    judgements: dict[str, np.ndarray]  # split -> (judgements, 3)

    def save(self, path: Path) -> None:
        """Writes the arrays to one .npz file."""
        arrays = {f"qrels/{split}": rows for split, rows in self.judgements.items()}
        if self.groups is not None:
            arrays["groups"] = self.groups
        ids = np.frombuffer("\n".join(self.doc_ids).encode(), np.uint8)
        np.savez(path, doc_ids=ids, corpus_sha256=self.corpus_sha256, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Tables":
        """Reads what `save` wrote."""
        with np.load(path) as arrays:
            prefix = "qrels/"
            splits = [name for name in arrays.files if name.startswith(prefix)]
            return cls(
                doc_ids=arrays["doc_ids"].tobytes().decode().split("\n"),
                corpus_sha256=str(arrays["corpus_sha256"]),
                groups=arrays["groups"] if "groups" in arrays.files else None,
                judgements={name.removeprefix(prefix): arrays[name] for name in splits},
            )


class RetrievalBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A tfds builder of a corpus and its queries, in the order of their sources.

    Args:
        root: where the sources are.
        data_dir: where the prepared copy goes.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, root, data_dir: Path):
        self.root = root
        self.doc_rows, self.query_rows = {}, {}  # id -> row, filled while writing
        self.corpus_digest = hashlib.sha256()
        super().__init__(data_dir=data_dir, file_format="array_record")

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The corpus."""

    @abstractmethod
    def queries(self) -> Iterator[tuple[str, str]]:
        """(id, text) of every query; may be empty."""

    @abstractmethod
    def judgements(self) -> dict[str, np.ndarray]:
        """Split -> (query row, document row, grade) of every judgement (R, 3)."""

    def groups(self) -> np.ndarray | None:
        """Documents of one number must stay on one side of a split (documents,)."""
        return None

    def tables(self) -> Tables:
        """What `prepare` keeps beside the records, once those are written."""
        judged = {split: rows for split, rows in self.judgements().items() if len(rows)}
        return Tables(
            list(self.doc_rows), self.corpus_digest.hexdigest(), self.groups(), judged
        )

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"id": text, "title": text, "text": text})
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        queries = list(self.queries())
        self.query_rows = {id: row for row, (id, _) in enumerate(queries)}
        splits = {"corpus": self._corpus_examples()}
        if queries:  # tfds refuses a split without examples
            splits["queries"] = (
                (row, {"id": id, "title": "", "text": text})
                for row, (id, text) in enumerate(queries)
            )
        return splits

    def _corpus_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        documents = track(self.documents(), "prepare", "documents")
        for row, document in enumerate(documents):
            example = vars(document)
            self.doc_rows[document.id] = row
            self.corpus_digest.update(json.dumps(example).encode() + b"\n")
            yield row, example

    def _generate_examples(self):
        raise NotImplementedError("examples come from documents() and queries()")


@contextlib.contextmanager
def _quiet_tfds():
    """Our progress bar is the only output: tfds prints, logs, and draws its own."""
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
    """Opens the prepared copy `folder`, which is made from `root` if it is missing.

    The copy is made beside and renamed: an error or a kill leaves no half copy, and of
    two processes that make the same copy the first one wins.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".making-", dir=folder.parent
        ) as scratch:
            made = Path(scratch) / "copy"
            builder = builder_type(root=root, data_dir=made)
            builder.download_and_prepare()
            builder.tables().save(made / TABLES)
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    try:
        return builder_type(root=root, data_dir=folder), Tables.load(folder / TABLES)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"the prepared copy {folder} is damaged: delete it, and it is made again "
        f"({error})"
    )


def cache_folder(data_dir: str | os.PathLike | None) -> Path:
    """`data_dir`, else the environment variable EHI_CACHE, else ~/.cache/ehi."""
    chosen = data_dir or os.environ.get("EHI_CACHE") or Path.home() / ".cache" / "ehi"
    return Path(chosen).expanduser()
