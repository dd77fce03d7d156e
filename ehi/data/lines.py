"""Lines of a text file, and JSON objects in them, each with its place for messages."""

import json
from collections.abc import Iterator
from typing import Any


def numbered_lines(path, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """Yield place and text of each line that is not blank, without a byte order mark.

    Args:
        path: a `pathlib.Path` or `zipfile.Path`.
        encoding: of the file.

    Raises:
        ValueError: a line has another encoding; the message names file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            mark = "-sig" if number == 1 and encoding == "utf-8" else ""
            try:
                text = line.decode(encoding + mark).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not {encoding.upper()} ({error})") from None
            if text.strip():
                yield where, text


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


def shortened(value: Any, most: int = 80) -> str:
    """`repr` of a value for a message, cut after `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
