"""Questions and answers of `experiments.search` in any terminal, pipe and encoding.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from wild_cases import failed, passed

from ehi.eval.answers import describe_hits, format_hits
from ehi.index import build_index, open_index, save_index
from experiments import search
from experiments.command import clean

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ask(index_path, monkeypatch):
    """ask(*arguments, stdin=b'', encoding='utf-8') -> status, stdout, stderr"""

    def call(*arguments, stdin=b"", encoding="utf-8"):
        out = io.BytesIO()
        stdout = io.TextIOWrapper(out, encoding=encoding, write_through=True)
        source = io.TextIOWrapper(io.BytesIO(stdin), encoding=encoding)
        monkeypatch.setattr("sys.stdin", source)
        monkeypatch.setattr("sys.stdout", stdout)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            status = search.main([f"--index={index_path}", *arguments])
        return status, out.getvalue(), err.getvalue()

    return call


def questions(out: bytes) -> list[str]:
    """The queries of answers in JSON."""
    return [json.loads(line)["query"] for line in out.splitlines()]


# Answers


# A share of 0 documents is no number: 0 of 0.
def test_an_index_whose_documents_are_all_deleted_failed(tmp_path, monkeypatch, capsys):
    vectors = np.eye(4, dtype=np.float32)
    save_index(build_index(vectors, list("abcd"), tree=None), tmp_path / "index")
    index = open_index(tmp_path / "index")
    index.delete(list("abcd"))
    encode = lambda index, tower=None: lambda texts: vectors[:1]  # noqa: E731
    monkeypatch.setattr(search, "load_query_encoder", encode)
    for arguments in (["words"], ["words", "--json"]):
        assert search.main([f"--index={tmp_path / 'index'}", *arguments]) == 0
    shown, described = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert "visited 0 of 0 documents" in shown and "%" not in shown
    assert json.loads(described)["hits"] == []


# An index takes any JSON value for a document, so any can be shown.
@pytest.mark.parametrize(
    ("document", "title", "line"),
    [
        failed("\n a text\nof lines", "a", "a text", id="text"),
        failed(None, "a", "", id="null"),
        failed(7, "a", "7", id="number"),
        failed(["é", 1], "a", '["é", 1]', id="list"),
        passed({}, "a", "", id="empty object"),
        failed({"title": 5, "line": None}, "5", "", id="numbers"),
        failed({"title": "t\nu"}, "t", "", id="title of two lines"),
        failed({"line": "x" * 999}, "a", "x" * 200, id="long line"),
    ],
)
def test_documents_of_any_kind_are_shown(tmp_path, document, title, line):
    vectors = np.eye(4, dtype=np.float32)[:1]
    built = build_index(vectors, ["a"], tree=None)
    save_index(built, tmp_path / "i", documents=[document])
    index = open_index(tmp_path / "i")
    described = describe_hits(index, index.search(vectors, 1))
    assert [(h["title"], h["line"]) for h in described["hits"]] == [(title, line)]
    assert title in format_hits("q", described)


# ECMA-48 and ISO 6429: a terminal obeys the characters of C0, DEL and C1.
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        failed("\x1b[2Jgone", r"\x1b[2Jgone", id="ESC"),
        failed("a\x9b2J\x7f", r"a\x9b2J\x7f", id="C1 and DEL"),
        failed("a\rb\x07", r"a\rb\x07", id="CR and BEL"),
        passed("a\tb é 日本 👩\u200d💻", "a\tb é 日本 👩\u200d💻", id="text"),
    ],
)
def test_control_characters_are_shown_escaped(tmp_path, text, shown):
    vectors = np.eye(4, dtype=np.float32)[:1]
    documents = [{"title": text, "line": f"l {text}"}]
    save_index(
        build_index(vectors, ["a"], tree=None), tmp_path / "i", documents=documents
    )
    save_index(build_index(vectors, [text], tree=None), tmp_path / "ids")
    for folder, said in (("i", [shown, f"l {shown}"]), ("ids", [shown])):
        index = open_index(tmp_path / folder)
        described = describe_hits(index, index.search(vectors, 1))
        assert described["hits"][0]["title"] == text  # JSON has escapes of its own
        lines = format_hits(text, described).split("\n")
        assert lines[0] == f'"{shown}"' and len(lines) == 2 + len(said)
        assert lines[2] == f"  1  1.0000  {shown}"
        assert [line.strip() for line in lines[3:]] == said[1:]


# A line ends at CR LF on Windows.
def test_a_document_with_crlf_failed(tmp_path):
    vectors = np.eye(4, dtype=np.float32)[:1]
    built = build_index(vectors, ["a"], tree=None)
    save_index(built, tmp_path / "i", documents=["one\r\ntwo"])
    index = open_index(tmp_path / "i")
    described = describe_hits(index, index.search(vectors, 1))
    assert described["hits"][0]["line"] == "one"


# Streams and questions


# Python prints what a stream lacks with backslashes, on stderr (its documentation of
# sys.stderr); JSON has escapes of its own (RFC 8259, section 7).
@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        failed("ascii", rb"caf\xe9 0 \u65e5\u672c"),
        failed("latin-1", "café 0 ".encode("latin-1") + rb"\u65e5\u672c"),
        passed("utf-8", "café 0 日本".encode()),
    ],
)  # fmt: skip
def test_answers_in_any_encoding_of_the_terminal(ask, encoding, shown):
    status, out, err = ask("a b", "--k=40", encoding=encoding)
    assert (status, err) == (0, "") and shown in out
    status, out, err = ask("a b", "--k=40", "--json", encoding=encoding)
    titles = {hit["title"] for hit in json.loads(out)["hits"]}
    assert (status, err) == (0, "") and "café 0 日本" in titles


# What cannot be decoded becomes U+FFFD (Encoding Standard of the WHATWG, section 4.1);
# a line ends at LF, CR LF (POSIX, Windows) or the end of the input.
@pytest.mark.parametrize(
    ("stdin", "encoding", "found"),
    [
        passed(b"", "utf-8", [], id="no input"),
        passed(b"\n\n \t\n", "utf-8", [], id="blank lines"),
        passed(b"a b", "utf-8", ["a b"], id="no end of line"),
        passed(b"a b\r\nc\r\n", "utf-8", ["a b", "c"], id="CRLF"),
        failed(b"a\xff\nb\n", "utf-8", ["a\ufffd", "b"], id="a byte that is no UTF-8"),
        failed("é".encode("latin-1") + b" a\nb\n", "utf-8", ["\ufffd a", "b"],
               id="Latin-1 in a UTF-8 terminal"),
        failed("é a\nb\n".encode(), "ascii", ["é a", "b"],
               id="UTF-8 in an ASCII terminal"),
        failed("\ufeffa b\n".encode(), "utf-8", ["a b"], id="byte order mark"),
        passed(b"a\x00b\n", "utf-8", ["a\x00b"], id="NUL"),
        passed("a\u2028b\n".encode(), "utf-8", ["a\u2028b"],
               id="line separator of Unicode"),
        passed("ｆ é 😀\n".encode(), "utf-8", ["ｆ é 😀"], id="wide characters"),
    ],
)  # fmt: skip
def test_questions_on_stdin(ask, stdin, encoding, found):
    status, out, err = ask("--repl", "--json", stdin=stdin, encoding=encoding)
    assert (status, err) == (0, "") and questions(out) == found


# PEP 383: an argument that the locale cannot decode has surrogates.
@pytest.mark.parametrize(
    ("argument", "found"),
    [
        failed("a\udcff", "a\ufffd", id="a byte"),
        failed("\udcc3\udca9 a", "é a", id="bytes of UTF-8"),
        failed("a \ud800", "a \ufffd", id="a lone surrogate"),
    ],
)
def test_questions_as_arguments(ask, argument, found):
    assert clean(argument) == found
    status, out, err = ask("--json", argument)
    assert (status, err) == (0, "") and questions(out) == [found]


# The tower reads the first `query_length` tokens, as sentence-transformers does.
def test_a_very_long_question_is_cut_as_any_other_passed(ask):
    answers = [
        json.loads(ask("--json", "a b c " * times)[1])["hits"] for times in (4, 10**5)
    ]
    assert answers[0] == answers[1]


# PEP 538 and 540: a C locale means UTF-8. `| head`: documentation of the signal module,
# "Note on SIGPIPE".
def test_a_c_locale_and_a_closed_pipe_failed(index_path):
    code = "import sys; from experiments import search; sys.exit(search.main())"
    command = [sys.executable, "-c", code, f"--index={index_path}", "--repl"]
    environment = os.environ | {"LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONIOENCODING", None)
    started = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    started.stdin.write("é a\n".encode())
    started.stdin.flush()
    assert started.stdout.readline() == '"é a"\n'.encode()
    started.stdout.close()
    started.stdin.write(b"a b\n")
    started.stdin.close()
    assert started.wait(60) == 1
    assert started.stderr.read() == b""
    started.stderr.close()
