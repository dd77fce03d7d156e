"""The index as it is now: a search sees one state of it, from its query to its texts.

Another process may add, delete and compact meanwhile. `refresh` looks for a new
manifest and opens what it names. Files of the state before are mapped into memory, so
searches that began with it end with it, although the files have no name any more.
"""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from ehi.index import Index, open_index
from ehi.index.folder import MANIFEST
from ehi.index.text.encoder import TextEncoder
from ehi.serve.limits import Limits
from ehi.serve.schema import UNSET, Hit, Leaf, Member, Result, Visited, request_type


@dataclass(eq=False, frozen=True)
class State:
    """An index at one moment. No update changes it.

    Attributes:
        index: its documents and parameters.
        encoder: texts -> embeddings, or None if the index has no text encoder.
        why_not: why it has none.
        decoder: bytes -> a checked request for this index.
    """

    index: Index
    encoder: TextEncoder | None
    why_not: str
    decoder: msgspec.json.Decoder

    @property
    def generation(self) -> int:
        return self.index.folder.manifest["generation"]


class Question(NamedTuple):
    """All that queries of one search have in common; `State` is compared by identity.

    Attributes:
        state: what is searched.
        words: whether the queries are texts.
        k, settings: arguments of `Index.search`, its filters among them.
        documents, paths: whether answers have them.
    """

    state: State
    words: bool
    k: int
    settings: tuple[tuple[str, Any], ...]
    documents: bool
    paths: bool


class Reader:
    """Opens an index folder, follows what is written to it, and answers.

    Args:
        path: the folder.
        limits: of one request.
        threads: threads of one search.

    Raises:
        FileNotFoundError: no index there.
        IndexCorruptError: a file is missing, truncated, altered or does not fit.
    """

    def __init__(self, path: Path, limits: Limits, threads: int = 1):
        self.path, self.limits, self.threads = Path(path), limits, threads
        self.error: str | None = None  # of the last refresh
        self._lock = threading.Lock()
        self._seen = None  # of the manifest
        self._newest = open_index(path)
        self.state = self._state(self._newest, None)

    def refresh(self) -> bool:
        """Takes over what others wrote; returns whether they did. It never raises.

        What cannot be read leaves the state as it is, with the reason in `error`, and
        is tried again by the next call.
        """
        with self._lock:
            try:
                seen = self._signature()
                if seen == self._seen:
                    self.error = None
                    return False
                changed = self._take_over()
            except Exception as error:  # a damaged manifest may raise anything
                self.error = str(error) or repr(error)
                return False
            self._seen, self.error = seen, None
            return changed

    def _take_over(self):
        try:
            if not self._newest.refresh():
                return False
            old = self.state
        except ValueError:  # other parameters: another index has taken its place
            self._newest, old = open_index(self.path), None
        self.state = self._state(self._newest, old)
        return True

    def _signature(self):
        """What changes whenever a writer replaces the manifest."""
        found = os.stat(self.path / MANIFEST)
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _state(self, newest, old):
        index = Index(newest.parameters, newest.contents)
        encoder, why_not = None, ""
        if old is not None:
            encoder, why_not = old.encoder, old.why_not
        else:
            try:
                encoder = index.text_encoder
            except (ValueError, OSError, ImportError) as error:
                why_not = str(error)
        decoder = msgspec.json.Decoder(request_type(index, self.limits))
        return State(index, encoder, why_not, decoder)

    def answer(self, question: Question, queries: list) -> list[Result]:
        """One Result for each text, or each vector (D,) float32.

        Raises:
            ValueError: the index refuses a setting or a filter.
        """
        state, index = question.state, question.state.index
        if question.words:
            vectors = state.encoder(queries, threads=self.threads)
        else:
            vectors = np.stack(queries)
        settings = dict(question.settings)
        hits = index.search(vectors, question.k, threads=self.threads, **settings)
        return [_result(question, hits, number) for number in range(len(queries))]

    def leaf(self, number: int, limit: int) -> Leaf:
        """The documents in a leaf, the first `limit` of them."""
        index = self.state.index
        rows = index.contents.rows_in_leaf(number)
        first = rows[:limit]
        ids = index.external_ids(first).tolist()
        members = [
            Member(id, _document(index, row))
            for id, row in zip(ids, first.tolist(), strict=True)
        ]
        return Leaf(number, list(index.leaf_path(number)), len(rows), members)


def _result(question, hits, number):
    """The Result of one of the queries."""
    index = question.state.index
    leaves, found = hits.leaves[number], []
    columns = hits.rows[number], hits.ids[number], hits.scores[number]
    holding = _leaves_of(index, columns[0], leaves) if question.paths else {}
    columns = zip(*(column.tolist() for column in columns), strict=True)
    for rank, (row, id, score) in enumerate(columns, start=1):
        if row < 0:
            break
        hit = Hit(rank, id, score)
        if question.documents:
            hit.document = _document(index, row)
            if index.fields:
                hit.metadata = index.metadata(row)
        if question.paths:
            hit.leaf = holding[row]
            hit.path = list(index.leaf_path(hit.leaf))
        found.append(hit)
    result = Result(found, int(hits.visited[number]))
    if question.paths:
        there = leaves[leaves >= 0].tolist()
        result.leaves = [Visited(leaf, list(index.leaf_path(leaf))) for leaf in there]
    return result


def _leaves_of(index, rows, leaves):
    """Row -> the best visited leaf that holds it; several may hold copies of it."""
    found, rest = {}, rows[rows >= 0]
    for leaf in leaves[leaves >= 0].tolist():
        inside = np.isin(rest, index.contents.rows_in_leaf(leaf))
        found |= dict.fromkeys(rest[inside].tolist(), leaf)
        rest = rest[~inside]
        if not len(rest):
            break
    return found


def _document(index, row):
    return index.document(row) if index.has_documents else UNSET
