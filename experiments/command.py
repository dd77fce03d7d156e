"""Common parts of the commands: exit codes, paths, and streams of any encoding.

It imports only the standard library, so that `experiments.search` starts at once.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as shells have it

# Errors whose message is one sentence for the user.
EXPLAINED = (ValueError, OSError, FloatingPointError, ImportError)


def exit_code(work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Do the work of a command; return the exit code of the process.

    A user's mistake gives one sentence on stderr and 1. Ctrl-C gives the sentence
    `interrupted` and 130.
    """
    try:
        return work() or 0
    except EXPLAINED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED


def user_path(text: str | Path) -> Path:
    """Return a path of the command line, with `~` expanded.

    No shell expands `~` after `--workdir=`.
    """
    return Path(os.path.expanduser(text))


def explain_flags(error: Exception) -> str:
    """Return what is wrong with flags, in one sentence.

    absl and ml_collections put tracebacks into their messages.
    """
    cause = error
    while cause.args and isinstance(cause.args[0], Exception):
        cause = cause.args[0]
    text = str(cause.args[0]) if cause.args else repr(cause)
    if "Traceback" in text:
        text = text.strip().splitlines()[-1].strip().partition(": ")[2]
    unknown = isinstance(error, AttributeError | KeyError)
    said = "no such field of the config: " if unknown else ""
    return said + " ".join(text.split())


def explain_interrupt() -> str:
    """Return what Ctrl-C means for a run, in one sentence."""
    return (
        "interrupted; what is complete is kept, and the same command goes on (exit "
        f"code {INTERRUPTED})"
    )


def accept_any_text() -> None:
    """Let stdin and stdout pass text that their encodings cannot hold.

    A character that stdout lacks is printed as an escape sequence, as Python does on
    stderr. A byte that stdin cannot decode becomes a surrogate; see `clean`.
    """
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
    ):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def clean(text: str) -> str:
    """Return text without surrogates and without a byte order mark in front.

    Bytes that an ASCII terminal could not decode are read as UTF-8. What cannot be read
    becomes U+FFFD, as the Encoding Standard of the WHATWG has it.

    >>> clean("caf\\udcc3\\udca9"), clean("a\\udcff"), clean("b\\ud800")
    ('café', 'a\ufffd', 'b\ufffd')
    """
    try:
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text.removeprefix("\ufeff")


def is_utf8(stream) -> bool:
    """Whether a stream can hold every character."""
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower()
    return encoding.replace("-", "").replace("_", "").startswith("utf")


def close_pipe() -> None:
    """Stop writing to a pipe that its reader has closed, without an error at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
