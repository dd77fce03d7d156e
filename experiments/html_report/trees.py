"""The leaves of an index: their documents, and the words that mark them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ehi.index import Index

# A tree of more documents is drawn whole, and lists this many of them.
MOST_DOCUMENTS = 20_000
# Titles of hits are looked up in corpora of at most this size.
MOST_NAMED = 1_000_000
WORDS = 8
# Parts of names such as `parseDate` and `parse_date` are words.
_WORD = re.compile(r"[^\W\d_]+")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")


class Documents:
    """The documents that the page shows; each is stored once and named by its number.

    Attributes:
      shown: [id, title, line] of each; title and line are None where they add nothing.
    """

    def __init__(self):
        self.shown: list[list[str | None]] = []
        self._numbers: dict[str, int] = {}

    def number(self, doc_id: str, look_up: Callable[[], Any] = lambda: None) -> int:
        """Return the number of a document; `look_up` gives what its index shows."""
        found = self._numbers.get(doc_id)
        if found is None:
            found = self._numbers[doc_id] = len(self.shown)
            self.shown.append([doc_id, *_texts(doc_id, look_up())])
        return found

    def text(self, number: int) -> str:
        """Return title and line of a document, or its id without them."""
        doc_id, title, line = self.shown[number]
        return " ".join((title or doc_id, line or ""))


def _texts(doc_id: str, stored: Any) -> tuple[str | None, str | None]:
    title, line = None, None
    if isinstance(stored, dict):
        title, line = (_text(stored.get(name)) for name in ("title", "line"))
    elif stored is not None:
        line = _text(stored)
    title = None if title == doc_id else title
    return title, None if line in (doc_id, title) else line


def _text(value: Any) -> str | None:
    return str(value)[:200] or None if value is not None else None


def described_tree(name: str, index: Index, documents: Documents) -> dict[str, Any]:
    """Return a tree as JSON values: path, size, documents and words of each leaf.

    Args:
      name: of the system, as the page has it.
      index: one with a tree.
      documents: receives those that are listed.
    """
    every = index.num_documents <= MOST_DOCUMENTS
    most = index.num_documents if every else max(1, MOST_DOCUMENTS // index.num_leaves)
    sizes, listed = [], []
    for leaf in range(index.num_leaves):
        rows = np.asarray(index.contents.rows_in_leaf(leaf))
        sizes.append(len(rows))
        listed.append(_numbers(index, rows[:most], documents))
    return {
        "name": name,
        "paths": [list(map(int, index.leaf_path(n))) for n in range(index.num_leaves)],
        "sizes": sizes,
        "documents": listed,
        "words": marking_words(
            [[documents.text(number) for number in leaf] for leaf in listed]
        ),
    }


def _numbers(index: Index, rows: np.ndarray, documents: Documents) -> list[int]:
    ids = map(str, np.asarray(index.external_ids(rows)).tolist())
    return [
        documents.number(doc_id, lambda row=row: shown_by(index, row))
        for doc_id, row in zip(ids, rows.tolist(), strict=True)
    ]


def shown_by(index: Index, row: int) -> Any:
    """Return what an index stores to show a document, or None."""
    return index.document(row) if index.has_documents else None


def rows_by_id(index: Index) -> dict[str, int]:
    """Return document id -> row, or {} for a corpus that is too large for it."""
    if index.num_documents > MOST_NAMED or not index.has_documents:
        return {}
    leaves = range(index.num_leaves)
    rows = [np.asarray(index.contents.rows_in_leaf(leaf)) for leaf in leaves]
    rows = np.unique(np.concatenate(rows))
    ids = map(str, np.asarray(index.external_ids(rows)).tolist())
    return dict(zip(ids, rows.tolist(), strict=True))


def marking_words(leaves: Iterable[Iterable[str]]) -> list[list[str]]:
    """Return for each leaf the words that are frequent there and rare elsewhere.

      n_leaf log(N / n), with the numbers of documents that have the word

    >>> marking_words([["a parse tree", "a parser", "parse it"], ["a socket"]])
    [['parse'], []]
    """
    counts, total, number = [], Counter(), 0
    for texts in leaves:
        count: Counter[str] = Counter()
        for text in texts:
            count.update(_words(text))
            number += 1
        counts.append(count)
        total.update(count)
    found = []
    for count in counts:
        weight = {w: n * np.log(number / total[w]) for w, n in count.items() if n > 1}
        best = sorted(weight, key=lambda word: (-weight[word], word))
        found.append([word for word in best if weight[word] > 0][:WORDS])
    return found


def _words(text: str) -> set[str]:
    parts = _WORD.findall(_HUMP.sub(" ", text))
    return {part.lower() for part in parts if len(part) > 2}
