"""Qrels files of the BEIR layout: finding and reading them.

qrels/<split>.tsv   query id, document id, grade, between tabs; usually with a header

A file without a header may have the four columns of TREC instead, between any white
space: query id, iteration, document id, grade.
"""

import re
from collections.abc import Container
from typing import NamedTuple

from ehi.data.lines import numbered_lines, shortened

# First column of a header, in lower case.
HEADERS = {"query-id", "query_id", "queryid", "query", "qid"}
# Names of splits; a table of such a name beside corpus.jsonl is taken for judgements.
SPLITS = ("train", "dev", "test", "val", "valid", "validation")
TABLE = re.compile(r".*\.(tsv|txt|csv|qrels)(\.gz)?")
JUDGED = re.compile(r"judge?ments?")  # a word that texts of law have in names too
GRADE = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
LARGEST_GRADE = 2**31 - 1


class Judgement(NamedTuple):
    """One line of a qrels file: ids as the data set has them, and the line's place."""

    where: str
    query: str
    document: str
    grade: int


class Judged(NamedTuple):
    """The judgements of one split, and the name of their file for messages."""

    split: str
    name: str
    judgements: list[Judgement]


def qrels_files(root) -> list:
    """Find the qrels files of a BEIR folder, sorted by name; hidden files are ignored.

    Args:
        root: a `pathlib.Path` or `zipfile.Path` to the folder of corpus.jsonl.

    Raises:
        ValueError: judgements are somewhere else or have another ending.
    """
    folder = root / "qrels"
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; judgements must be in qrels/<split>.tsv"
        )
    inside = _visible(folder) if folder.is_dir() else []
    found = [file for file in inside if file.name.endswith(".tsv")]
    splits = {file.name.lower().removesuffix(".tsv") for file in found}
    beside = [file for file in _visible(root) if file.name.lower() != "qrels"]
    misplaced = [file for file in beside if _is_misplaced(file, splits)]
    if not folder.exists():  # such as Qrels
        misplaced += [file for file in _visible(root) if file not in beside]
    for file in inside:
        if file.is_dir():
            below = [file, *_visible(file)]
            misplaced += [each for each in below if _names_new(each, splits)]
        elif file not in found and _names_new(file, splits):
            misplaced.append(file)
    if not found:  # beside judgements, other files are notes or licences
        misplaced += inside
    if misplaced:
        raise ValueError(
            f"{misplaced[0]} is not read: judgements must be in qrels/<split>.tsv"
        )
    return found


def _visible(folder) -> list:
    """Files and folders in `folder` by name, except hidden ones (macOS: `._name`)."""
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(files, key=lambda file: file.name)


def _names_new(file, splits: Container[str]) -> bool:
    """Whether a file is called after a split that `splits` lacks, as is train.csv."""
    stem = file.name.lower().partition(".")[0]
    return stem in SPLITS and stem not in splits


def _is_misplaced(file, splits: Container[str]) -> bool:
    """Whether a file beside corpus.jsonl holds judgements that `splits` lack."""
    name = file.name.lower()
    stem = name.partition(".")[0]
    if "qrel" in name and (not splits or name == "qrels.tsv"):
        return True
    if file.is_dir():
        inside = _visible(file) if "qrel" in name or JUDGED.fullmatch(name) else []
        return any(_names_new(each, splits) for each in inside)
    if "qrel" not in name:
        judged = not splits and JUDGED.fullmatch(stem)
        return bool(TABLE.fullmatch(name) and (judged or _names_new(file, splits)))
    named = [word for word in re.split(r"[^a-z]+", name) if word in SPLITS]
    return any(word not in splits for word in named)


def read_qrels(
    path, query_ids: Container[str], doc_ids: Container[str]
) -> list[Judgement]:
    """Read a qrels file; its documents need not be in the corpus.

    Raises:
        ValueError: a line is malformed, names an unknown query or contradicts another
            line, or the columns seem to be those of TREC and the corpus has none of
            the documents.
    """
    found, columns = JudgedLines(query_ids), 3
    for number, (where, line) in enumerate(numbered_lines(path)):
        fields = line.rstrip().split("\t")
        if number == 0:
            name = fields[0].strip(' "').lower()
            if name in HEADERS and not GRADE.fullmatch(_unquoted(fields[-1])):
                continue
            columns = 4 if len(line.split()) == 4 and len(fields) != 3 else 3
        if columns == 4:
            fields = line.split()
            fields[1:2] = []
        if len(fields) != 3 or _grade(fields[2]) is None:
            raise ValueError(
                f"{where}: expected query id, document id and an integer grade "
                f"between tabs, got {shortened(line.rstrip())}"
            )
        query, document = _known(fields[0], query_ids), _known(fields[1], doc_ids)
        found.add(where, query, document, fields[2])
    if columns == 4:  # a fourth column may be something else, such as a date
        check_any_known(found.judgements, doc_ids)
    return found.judgements


class JudgedLines:
    """Judgements of one split, gathered line by line; repeated lines count once.

    Args:
        query_ids: the known queries.
    """

    def __init__(self, query_ids: Container[str]):
        self.judgements, self._grades, self._query_ids = [], {}, query_ids

    def add(self, where: str, query: str, document: str, grade) -> None:
        """Add a judgement; a ValueError names its place if it cannot be meant."""
        value = _grade(str(grade))
        if value is None:
            raise ValueError(
                f"{where}: expected an integer grade, got {shortened(grade)}"
            )
        if query not in self._query_ids:
            raise ValueError(f"{where}: unknown query {query!r}")
        if (query, document) not in self._grades:
            self.judgements.append(Judgement(where, query, document, value))
        first = self._grades.setdefault((query, document), value)
        if first != value:
            raise ValueError(
                f"{where}: query {query!r} and document {document!r} are judged twice, "
                f"{first} and {value}"
            )


def check_any_known(judgements: list[Judgement], doc_ids: Container[str]) -> None:
    """Raise a ValueError if the corpus has none of the judged documents."""
    if judgements and not any(j.document in doc_ids for j in judgements):
        raise ValueError(
            f"{judgements[0].where}: unknown document {judgements[0].document!r}, and "
            "the corpus has none of the other judged documents either"
        )


def _unquoted(text: str) -> str:
    """The text without the quotes that CSV writers put around it."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _grade(text: str) -> int | None:
    """An integer, which may be written as a float ('1.0'); None for anything else."""
    text = _unquoted(text)
    if not GRADE.fullmatch(text):
        return None
    value = float(text)
    whole = abs(value) <= LARGEST_GRADE and value.is_integer()
    return int(value) if whole else None


def _known(id: str, ids: Container[str]) -> str:
    """The id, without the quotes that CSV writers put around it if `ids` has that."""
    if id not in ids and len(id) > 1 and id[0] == id[-1] == '"':
        bare = id[1:-1].replace('""', '"')
        return bare if bare in ids else id
    return id
