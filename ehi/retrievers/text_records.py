"""Documents with a text and metadata in an index folder: what the adapters share.

A folder that `Records` made is flat: it has one leaf with all vectors, so a search is
exact, and scores are cosines. A folder that was trained (`experiments.main`, `ehi.fit`)
is opened as it is, and documents that are added are routed and coded as it learned.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ehi.index import Index, build_index, open_index, save_index
from ehi.index.commit import is_free
from ehi.index.contents import as_ids

FLAT = {"made_by": "ehi.retrievers", "similarity": "cosine"}  # config of our own
TEXT, METADATA = "text", "metadata"  # of a record that is ours
_BODIES = (TEXT, "line")  # of other records: the first of them follows the title
_NUMBER = re.compile("0|[1-9][0-9]{0,18}")  # '007' is not the id 7
_MOST_SEGMENTS = 32  # each call of `put` makes one, and every search reads all


@dataclass(frozen=True)
class Record:
    """A document that was found.

    Attributes:
        id: external id, as a text.
        text: what a reader sees.
        metadata: field -> value.
        kept: the JSON value that the index stores.
        score: of a search, or None.
    """

    id: str
    text: str
    metadata: dict[str, Any]
    kept: Any = field(default=None, repr=False)
    score: float | None = None


class Records:
    """An index folder of documents with texts; it may be empty.

    >>> records = Records()
    >>> records.put(["a", "b"], np.eye(2), [{"text": "one"}, {"text": "two"}])
    >>> [found.text for found in records.search(np.array([0.1, 0.9]), k=1)]
    ['two']

    Args:
        path: an index folder, or one to make; None for a temporary one, which goes with
            this object.

    Raises:
        FileExistsError: something else is there.
    """

    def __init__(self, path: str | Path | None = None):
        if path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="ehi-")
            path = Path(self._temporary.name) / "index"
        self.path = Path(path)
        free = is_free(self.path)
        self.index: Index | None = None if free else _opened(self.path)

    @classmethod
    def existing(cls, path: str | Path) -> "Records":
        """Those of a folder that must be there.

        Raises:
            FileNotFoundError: no index there.
            ValueError: the index keeps no documents, so there is nothing to show.
        """
        if is_free(Path(path)):
            raise FileNotFoundError(f"{path} holds no index")
        records = cls(path)
        if not records.index.has_documents:
            raise ValueError(
                f"the index in {path} keeps no documents, so a search has no text to "
                "return: save it with save_index(index, path, documents=[...])"
            )
        return records

    def __len__(self) -> int:
        return self.index.num_documents if self.index is not None else 0

    def put(self, ids: Sequence[str], vectors, kept: Sequence[Any]) -> None:
        """Adds documents, and replaces those whose id is there.

        Args:
            ids: N texts; of equal ones the last counts.
            vectors: (N, D) floats.
            kept: N JSON values, dicts with 'text' and 'metadata'.

        Raises:
            ValueError, IndexLockedError, OSError: as `Index.update`.
        """
        if not len(ids):
            return
        last = {id: row for row, id in enumerate(ids)}
        rows = list(last.values())
        vectors = np.asarray(vectors, np.float32)[rows]
        kept, ids = [kept[row] for row in rows], list(last)
        if self.index is None and not is_free(self.path):
            self.index = _opened(self.path)  # another store made it meanwhile
        if self.index is None:
            index = build_index(_unit(vectors), ids, tree=None, config=FLAT)
            save_index(index, self.path, documents=kept)
            self.index = open_index(self.path)
            return
        keys, options = self._keys(ids), {"documents": kept, "missing": "add"}
        if len(keys) < len(ids):
            wrong = next(id for id in ids if not self._keys([id]))
            raise ValueError(
                f"the ids of {self.path} are whole numbers below 2^63, got {wrong!r}"
            )
        if self.index.fields is not None:
            options["metadata"] = [
                {name: _parts(value)[1].get(name) for name in self.index.fields}
                for value in kept
            ]
        self.index.update(self._scaled(vectors), keys, **options)
        if len(self.index.segments) > _MOST_SEGMENTS:
            self.index.compact()

    def remove(self, ids: Iterable[str]) -> int:
        """Deletes documents and returns how many; ids that are not there do nothing."""
        ids = self._keys(set(ids))
        if self.index is None or not ids:
            return 0
        return self.index.delete(ids, missing="ignore")

    def get(self, ids: Sequence[str]) -> list[Record]:
        """The documents of these ids, in this order, without those that are absent."""
        rows = self._rows(ids)
        return [self._record(row) for row in rows[rows >= 0]]

    def all(self, mask: np.ndarray | None = None) -> list[Record]:
        """All documents, or those of a mask by row, in the order they were added."""
        if self.index is None:
            return []
        live = np.ones(self.index.contents.num_rows, bool) if mask is None else mask
        deleted = self.index.contents.deleted
        if deleted is not None:
            live = live & ~deleted
        return [self._record(row) for row in np.flatnonzero(live)]

    def mask(self, matches: Callable[[Record], bool]) -> np.ndarray:
        """Documents that a function accepts, each read: (R,) bool by row."""
        if self.index is None:
            return np.zeros(0, bool)
        found = np.zeros(self.index.contents.num_rows, bool)
        deleted = self.index.contents.deleted
        for row in range(len(found)):
            if deleted is None or not deleted[row]:
                found[row] = matches(self._record(row))
        return found

    def search(self, vector, k: int, **options) -> list[Record]:
        """The k best documents for an embedding (D,), best first.

        If the leaves that a search visits hold fewer than k documents, as under a
        narrow filter, all leaves are visited.

        Args:
            vector: as documents were embedded.
            k: most results.
            options: as of `Index.search`: allow=, deny=, beam=, min_prob=, rerank=.
        """
        if self.index is None:
            return []
        vector = self._scaled(np.atleast_2d(np.asarray(vector, np.float32)))
        return self._found(self._hits(vector, k, options))

    def search_text(self, text: str, k: int, **options) -> list[Record]:
        """The k best documents for a text, by the index's own encoder.

        Raises:
            ValueError: the index names no encoder.
        """
        if self.index is None:
            return []
        return self._found(self._hits(self.index.text_encoder([text]), k, options))

    def _hits(self, query, k, options):
        """A search; if the visited leaves hold too few documents, of all leaves."""
        index = self.index
        hits = index.search(query, k, **options)
        if options.get("beam") is not None or options.get("min_prob") is not None:
            return hits  # the caller chose what to visit
        if (hits.rows >= 0).sum() < min(k, self._eligible(options)):
            stored = (index.setting or {}).get("rerank")
            rerank = max(stored, k) if stored else None
            options = {"rerank": rerank, **options, "beam": index.num_leaves}
            hits = index.search(query, k, **options)
        return hits

    def _eligible(self, options):
        """At most how many documents allow= and deny= leave."""
        allow, deny = options.get("allow"), options.get("deny")
        deleted = self.index.contents.deleted
        if isinstance(allow, np.ndarray):
            live = allow if deleted is None else allow & ~deleted
            return int(live.sum())
        known = self.index.num_documents if allow is None else len(allow)
        return known - len(deny or ())

    @property
    def is_flat(self) -> bool:
        """Whether this class made the folder, so that scores are cosines."""
        return self.index is None or self.index.config == FLAT

    def _scaled(self, vectors):
        return _unit(vectors) if self.is_flat else vectors

    def _found(self, hits):
        rows, scores = hits.rows[0], hits.scores[0]
        return [
            self._record(row, float(score))
            for row, score in zip(rows, scores, strict=True)
            if row >= 0
        ]

    def _record(self, row, score=None):
        index, row = self.index, int(row)
        kept = index.document(row) if index.has_documents else None
        text, metadata = _parts(kept)
        if index.fields:
            metadata = {**index.metadata(row), **metadata}
        id = str(index.external_ids(np.array([row]))[0])
        return Record(id, text, metadata, kept, score)

    def _keys(self, ids):
        """Ids of the kind that the index has; those that cannot be there are left."""
        if self.index is None or not self._has_numbers:
            return list(ids)
        numbers = [int(id) for id in ids if _NUMBER.fullmatch(str(id))]
        return [number for number in numbers if number < 2**63]

    @property
    def _has_numbers(self):
        return isinstance(self.index.segments[0].ids, np.ndarray)

    def _rows(self, ids):
        keys = self._keys(ids)
        if self.index is None or not keys:
            return np.zeros(0, np.int64)
        if self._has_numbers:
            keys = np.array(keys, np.int64)
        return self.index.contents.find(as_ids(keys))


def _opened(path):
    index = open_index(path)
    if "vectors" in (index.encoder or {}):  # of ehi.fit: it takes vectors as given
        from ehi.vector_index import load

        return load(path)
    return index


def _unit(vectors):
    """Rows of length 1; a row of zeros stays."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def _parts(kept):
    """Text and metadata of what an index keeps of a document."""
    if not isinstance(kept, Mapping):
        return kept if isinstance(kept, str) else json.dumps(kept), {}
    if isinstance(kept.get(METADATA), Mapping):
        return kept.get(TEXT) or "", dict(kept[METADATA])
    bodies = [kept[name] for name in _BODIES if kept.get(name)]
    shown = [part for part in (kept.get("title"), *bodies[:1]) if part]
    others = {k: value for k, value in kept.items() if k not in (*_BODIES, "id")}
    return "\n".join(map(str, shown)), others
