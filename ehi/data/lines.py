"""Lines of a text file, JSON objects and cells in them, each with its place.

The place goes into the messages: every mistake names file and line.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any


def numbered_lines(path, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """Yield place and text of each line that is not blank, without a byte order mark.

    Args:
        path: a `pathlib.Path` or `zipfile.Path`; a file `*.gz` is unpacked on the way.
        encoding: of the file.

    Raises:
        ValueError: a line has another encoding, or the file is no whole gzip file; the
            message names file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(_unpacked(file, path), start=1):
            where = f"{path}, line {number}"
            mark = "-sig" if number == 1 and encoding == "utf-8" else ""
            try:
                text = line.decode(encoding + mark).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not {encoding.upper()} ({error})") from None
            if text.strip():
                yield where, text


def plain_lines(path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file faster than `numbered_lines`, blank ones too."""
    with path.open("rb") as file:
        for number, line in enumerate(_unpacked(file, path), start=1):
            try:
                yield line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 ({error})"
                ) from None


def _unpacked(file, path) -> Iterator[bytes]:
    if not path.name.lower().endswith(".gz"):
        yield from file
        return
    try:
        yield from gzip.GzipFile(fileobj=file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}") from None


def parse_json(line: str, where: str) -> Any:
    """Parse one line of JSON.

    Raises:
        ValueError: it is not JSON, or Python cannot read it.
    """
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:  # also an integer of more than 4,300 digits
        raise ValueError(f"{where}: not JSON ({error})") from None


def numbered_cells(
    path, counts: Sequence[int], expected: str
) -> Iterator[tuple[str, list[str]]]:
    """Yield place and cells of each line of a table with tabs between its columns.

    Args:
        path: as in `numbered_lines`.
        counts: allowed numbers of columns; the first line decides for all.
        expected: what a line holds, for messages.

    Raises:
        ValueError: a line has another number of columns.
    """
    for where, line in numbered_lines(path):
        cells = line.split("\t")
        if len(cells) not in counts:
            raise ValueError(
                f"{where}: expected {expected} between tabs, got {len(cells)} "
                f"column{'s' * (len(cells) != 1)}: {shortened(line)}"
            )
        counts = (len(cells),)
        yield where, cells


def count(number: int, noun: str) -> str:
    """'1 document' or '2,000 documents'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def shortened(value: Any, most: int = 80) -> str:
    """`repr` of a value for a message, cut after `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
