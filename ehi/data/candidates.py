"""Documents that come with a query: hard negatives, and those that a teacher scored.

qidpidtriples.*.tsv    query id, id of a positive, id of a negative (MS MARCO)
*scores_ids*.tsv       score of the positive, score of the negative, query id, id of
                       the positive, id of the negative (Hofstaetter et al. 2020)

Both have tabs between their columns, may be packed (`.gz`), and are read beside any
layout of a folder.
"""

import fnmatch
import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ehi.data.lines import count, plain_lines, shortened

PATTERNS = ("*scores_ids*.tsv", "qidpidtriples*.tsv")  # in the order they are read
TEXTS = "triples*.tsv"  # the release of MS MARCO with texts instead of ids
# Most documents kept of a query, the first of the files: MS MARCO has up to 1,000, and
# 200 for 500,000 queries take 0.8 GB.
KEPT = 200


@dataclass(frozen=True)
class Candidates:
    """Documents that come with each query.

    Args:
        offsets: (queries + 1,) int64; query i has rows offsets[i] to offsets[i + 1].
        documents: (rows,) int32 document rows; known positives may be among them.
        scores: (rows,) float32 score by a teacher; NaN if it gave none.
    """

    offsets: np.ndarray
    documents: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, gathered: Mapping[int, tuple[array, array]], num_queries: int):
        """Join the lists of each query; None if there are none."""
        if not gathered:
            return None
        lists = [gathered.get(row, ((), ())) for row in range(num_queries)]
        lengths = [len(documents) for documents, _ in lists]
        return cls(
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([np.asarray(ids, np.int32) for ids, _ in lists]),
            np.concatenate([np.asarray(s, np.float32) for _, s in lists]),
        )


def candidate_files(root) -> list:
    """The files of triples and teacher scores in a folder, scores first.

    Args:
        root: a `pathlib.Path` or `zipfile.Path`.

    Raises:
        ValueError: there are triples of texts, but none of ids.
    """
    names = {file.name: file for file in root.iterdir()}
    found = [
        names[name]
        for pattern in PATTERNS
        for name in sorted(names)
        if fnmatch.fnmatch(name.removesuffix(".gz"), pattern)
    ]
    texts = fnmatch.filter([name.removesuffix(".gz") for name in names], TEXTS)
    if texts and not found:
        raise ValueError(
            f"{root / texts[0]} holds texts: give qidpidtriples.*.tsv, the triples of "
            "ids, or move it elsewhere"
        )
    return found


def read_candidates(
    root, query_rows: Mapping[str, int], doc_rows: Mapping[str, int]
) -> tuple[Candidates | None, list[str]]:
    """Read the files of `candidate_files`; return them and notes for the user.

    Triples of unknown queries or documents are left out and counted.

    Raises:
        ValueError: a line is malformed, or a file names nothing that is known.
    """
    gathered, notes = {}, []
    for path in candidate_files(root):
        scored = fnmatch.fnmatch(path.name.removesuffix(".gz"), PATTERNS[0])
        lines = _scored(path) if scored else _triples(path)
        notes += gather(lines, gathered, query_rows, doc_rows, f"{path}")
    return Candidates.of(gathered, len(query_rows)), notes


def gather(
    triples: Iterable[tuple], gathered: dict[int, tuple[array, array]],
    query_rows: Mapping[str, int], doc_rows: Mapping[str, int], name: str,
) -> list[str]:  # fmt: skip
    """Add triples to the lists of their queries; return notes.

    Args:
        triples: query id, positive id, negative id and the scores of both, or None.
        gathered: query row -> document rows and scores.
        query_rows, doc_rows: id -> row.
        name: of the triples, for messages.
    """
    unknown, known, example = 0, 0, None
    for query, positive, negative, scores in triples:
        row, document = query_rows.get(query), doc_rows.get(negative)
        if row is None or document is None:
            unknown += 1
            example = query if row is None else negative
            continue
        known += 1
        documents, values = gathered.setdefault(row, (array("i"), array("f")))
        asked = doc_rows.get(positive)
        if scores and asked is not None and asked not in documents:
            documents.append(asked)
            values.append(scores[0])
        if len(documents) < KEPT and document not in documents:
            documents.append(document)
            values.append(scores[1] if scores else math.nan)
    if unknown and not known:
        raise ValueError(
            f"{name}: the data set has neither query nor document of any triple, such "
            f"as {example!r}"
        )
    if not unknown:
        return []
    return [
        f"{count(unknown, 'triple')} of {name} left out, whose query or document is "
        f"unknown, such as {example!r}"
    ]


def _triples(path):
    for number, line in enumerate(plain_lines(path), start=1):
        cells = line.split()
        if len(cells) != 3:
            raise _malformed(
                path, number, line, "query id, positive id and negative id"
            )
        yield *cells, None


def _scored(path):
    expected = "two scores, query id, positive id and negative id"
    for number, line in enumerate(plain_lines(path), start=1):
        cells = line.split()
        try:
            high, low, query, positive, negative = cells
            scores = float(high), float(low)
        except ValueError:
            raise _malformed(path, number, line, expected) from None
        if not all(map(math.isfinite, scores)):
            raise _malformed(path, number, line, expected)
        yield query, positive, negative, scores


def _malformed(path, number: int, line: str, expected: str) -> ValueError:
    return ValueError(
        f"{path}, line {number}: expected {expected} between tabs, got "
        f"{shortened(line)}"
    )
