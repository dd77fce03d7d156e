"""Semantic search over Python's standard library: docstring summary -> function.

This real text needs no download. The sources of the running Python are parsed with
`ast`, never imported. A function or method is a document if the summary of its
docstring has at least four words; the summary is its query.
"""

import ast
import hashlib
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from ehi.data.groups import connected_components
from ehi.data.tfds_builder import Document, RetrievalBuilder

# Installed packages, tests, and applications that nobody searches for.
EXCLUDED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "ensurepip",
        "__pycache__",
    }
)
MIN_SUMMARY_WORDS = 4


@dataclass(frozen=True)
class Function:
    """A documented function or method.

    Args:
        name: qualified name, such as 'datetime.datetime.fromisoformat'.
        summary: first paragraph of the docstring, on one line.
        text: signature and body without docstring.
        body: the body without comments and layout; '' for a stub (see `_is_stub`).
    """

    name: str
    summary: str
    text: str
    body: str


class PyDocs(RetrievalBuilder):
    """tfds builder of the functions below `root`.

    Functions with the same summary or body form a group. Each distinct summary is one
    query, named after the first function with that summary. All functions of the group
    are relevant to it. A group lies in one split, so no document is relevant in two.
    """

    VERSION = tfds.core.Version("1.0.0")

    @cached_property
    def functions(self) -> list[Function]:
        return find_functions(self.root)

    def documents(self) -> Iterator[Document]:
        for function in self.functions:
            yield Document(function.name, function.name, function.text)

    def queries(self) -> Iterator[tuple[str, str]]:
        for row in _first_with_summary(self.functions):
            yield f"query:{self.functions[row].name}", self.functions[row].summary

    def groups(self) -> np.ndarray:
        return np.array(group_functions(self.functions), np.int64)

    def judgements(self) -> dict[str, np.ndarray]:
        groups, members, rows = self.groups().tolist(), {}, {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        for query, row in enumerate(_first_with_summary(self.functions)):
            together = members[groups[row]]
            split = split_of(min(self.functions[doc].name for doc in together))
            rows.setdefault(split, []).extend((query, doc, 1) for doc in together)
        return {split: np.array(rows[split], np.int64) for split in sorted(rows)}


def standard_library() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_files(root: Path) -> list[Path]:
    """Files to parse, relative to `root` and sorted."""
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    return sorted(path for path in files if not EXCLUDED_FOLDERS & set(path.parts))


def source_sha256(root: Path) -> str:
    """sha256 of the names and contents of `source_files`, and of this module."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in source_files(root):
        digest.update(path.as_posix().encode() + b"\0")
        digest.update(hashlib.sha256((root / path).read_bytes()).digest())
    return digest.hexdigest()


def find_functions(root: Path) -> list[Function]:
    """Find all documented functions below `root`, in the order of files and lines.

    A name that is defined again (in another branch of an `if`) gets `#2`, `#3`, ...
    """
    functions, seen = [], {}
    for path in source_files(root):
        with tokenize.open(root / path) as file:
            source = file.read()
        parts = path.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        lines = source.encode().split(b"\n")
        for name, node in _definitions(ast.parse(source), module):
            summary = _summary(node)
            if len(summary.split()) < MIN_SUMMARY_WORDS:
                continue
            seen[name] = seen.get(name, 0) + 1
            number = f"#{seen[name]}" if seen[name] > 1 else ""
            body = "" if _is_stub(node.body[1:]) else ast.unparse(node.body[1:])
            text = _without_docstring(node, lines)
            functions.append(Function(name + number, summary, text, body))
    return functions


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """Functions and methods under `node`, except functions inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, f"{prefix}.{child.name}")
        else:
            yield from _definitions(child, prefix)


def _summary(node: ast.AST) -> str:
    """First paragraph of the docstring, on one line; '' without a docstring."""
    docstring = (ast.get_docstring(node) or "").strip()
    return " ".join(re.split(r"\n\s*\n", docstring)[0].split())


def _without_docstring(node: ast.AST, lines: list[bytes]) -> str:
    """Source of `node` from `def` on, without its docstring.

    The original lines are cut, not unparsed, so that comments stay. They are bytes
    because columns of `ast` count UTF-8 bytes.
    """
    docstring = node.body[0]
    before = lines[node.lineno - 1 : docstring.lineno]
    before[-1] = before[-1][: docstring.col_offset]
    after = lines[docstring.end_lineno - 1 : node.end_lineno]
    after[0] = after[0][docstring.end_col_offset :]
    kept = [line.decode() for line in before + after]
    indent = len(kept[0]) - len(kept[0].lstrip())
    dedented = [line[indent:] if line[:indent].isspace() else line for line in kept]
    return "\n".join(line.rstrip() for line in dedented if line.strip())


def _is_stub(body: list[ast.stmt]) -> bool:
    """Whether a body is too short to show that two functions are the same.

    A stub is empty, or a single `pass`, `...`, `raise`, or `return` of a constant, name
    or attribute. Grouping by stubs would join some 90 unrelated abstract methods.
    """
    if len(body) != 1:
        return not body
    statement = body[0]
    if isinstance(statement, ast.Return | ast.Expr):
        trivial = ast.Constant | ast.Name | ast.Attribute | None
        return isinstance(statement.value, trivial)
    return isinstance(statement, ast.Pass | ast.Raise)


def normalised(summary: str) -> str:
    """A summary without capitals, spacing and final full stop, for comparison."""
    return " ".join(summary.lower().rstrip(" .").split())


def group_functions(functions: list[Function]) -> list[int]:
    """Find the row of the first member of each function's group.

    Functions with the same normalised summary or the same body are in one group,
    transitively.
    """
    first, links = {}, []
    for row, function in enumerate(functions):
        keys = [("summary", normalised(function.summary))]
        if function.body:
            keys.append(("body", function.body))
        links += [(first.setdefault(key, row), row) for key in keys]
    return connected_components(len(functions), links)


def split_of(name: str) -> str:
    """'train' (64%), 'dev' (16%) or 'test' (20%), by the sha256 of a group's name."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return "train" if position < 0.64 else "dev" if position < 0.8 else "test"


def _first_with_summary(functions: list[Function]) -> list[int]:
    first = {}
    for row, function in enumerate(functions):
        first.setdefault(normalised(function.summary), row)
    return list(first.values())
