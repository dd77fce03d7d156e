"""The commands, with odd questions, streams, paths, configs, results and interruptions.

The id of a case ends in `failed` if it failed before this file was written, else in
`passed`. The comment above a case names the source of what is expected.
"""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_flags
from topics import FIXTURES, tiny, write_corpus

from ehi.data import download
from ehi.eval.answers import describe_hits, format_hits
from ehi.eval.records import write_records
from ehi.index import build_index, open_index, save_index
from ehi.model.pretrained import resolve
from experiments import main, reproduce, search, tables
from experiments.command import clean, user_path
from experiments.configs import pydocs
from experiments.run import checks

ROOT = Path(__file__).parents[2]
WIDTH = 32
FAILED_BEFORE, PASSED_BEFORE = "failed", "passed"


def case(*values, was, **options):
    """A parameter set whose id says whether it failed before."""
    name = options.pop("id", None) or "-".join(map(str, values))
    return pytest.param(*values, id=f"{name}-{was}", **options)


@pytest.fixture(scope="module")
def index_path(tmp_path_factory):
    """An index of 40 documents whose titles no ASCII terminal can print."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    identity = {"tower": str(FIXTURES / "bert_tiny"), "query_length": 8}
    index = build_index(vectors, range(40), tree=None, encoder=identity)
    shown = [{"title": f"café {n} 日本", "line": "µ"} for n in range(40)]
    path = tmp_path_factory.mktemp("commands") / "index"
    save_index(index, path, documents=shown)
    return path


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


# Row 15 of the table of issue 18: 0 of 0.
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


# Row 16: an index takes any JSON value for a document, so any can be shown.
@pytest.mark.parametrize(
    ("document", "title", "line"),
    [
        case("\n a text\nof lines", "a", "a text", was=FAILED_BEFORE, id="text"),
        case(None, "a", "", was=FAILED_BEFORE, id="null"),
        case(7, "a", "7", was=FAILED_BEFORE, id="number"),
        case(["é", 1], "a", '["é", 1]', was=FAILED_BEFORE, id="list"),
        case({}, "a", "", was=PASSED_BEFORE, id="empty object"),
        case({"title": 5, "line": None}, "5", "", was=FAILED_BEFORE, id="numbers"),
        case({"title": "t\nu"}, "t", "", was=FAILED_BEFORE, id="title of two lines"),
        case({"line": "x" * 999}, "a", "x" * 200, was=FAILED_BEFORE, id="long line"),
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


# Streams and questions


# Python prints what a stream lacks with backslashes, on stderr (its documentation of
# sys.stderr); JSON has escapes of its own (RFC 8259, section 7).
@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        case("ascii", rb"caf\xe9 0 \u65e5\u672c", was=FAILED_BEFORE),
        case("latin-1", "café 0 ".encode("latin-1") + rb"\u65e5\u672c",
             was=FAILED_BEFORE),
        case("utf-8", "café 0 日本".encode(), was=PASSED_BEFORE),
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
        case(b"", "utf-8", [], was=PASSED_BEFORE, id="no input"),
        case(b"\n\n \t\n", "utf-8", [], was=PASSED_BEFORE, id="blank lines"),
        case(b"a b", "utf-8", ["a b"], was=PASSED_BEFORE, id="no end of line"),
        case(b"a b\r\nc\r\n", "utf-8", ["a b", "c"], was=PASSED_BEFORE, id="CRLF"),
        case(b"a\xff\nb\n", "utf-8", ["a\ufffd", "b"], was=FAILED_BEFORE,
             id="a byte that is no UTF-8"),
        case("é".encode("latin-1") + b" a\nb\n", "utf-8", ["\ufffd a", "b"],
             was=FAILED_BEFORE, id="Latin-1 in a UTF-8 terminal"),
        case("é a\nb\n".encode(), "ascii", ["é a", "b"], was=FAILED_BEFORE,
             id="UTF-8 in an ASCII terminal"),
        case("\ufeffa b\n".encode(), "utf-8", ["a b"], was=FAILED_BEFORE,
             id="byte order mark"),
        case(b"a\x00b\n", "utf-8", ["a\x00b"], was=PASSED_BEFORE, id="NUL"),
        case("a\u2028b\n".encode(), "utf-8", ["a\u2028b"], was=PASSED_BEFORE,
             id="line separator of Unicode"),
        case("ｆ é 😀\n".encode(), "utf-8", ["ｆ é 😀"], was=PASSED_BEFORE,
             id="wide characters"),
    ],
)  # fmt: skip
def test_questions_on_stdin(ask, stdin, encoding, found):
    status, out, err = ask("--repl", "--json", stdin=stdin, encoding=encoding)
    assert (status, err) == (0, "") and questions(out) == found


# PEP 383: an argument that the locale cannot decode has surrogates.
@pytest.mark.parametrize(
    ("argument", "found"),
    [
        case("a\udcff", "a\ufffd", was=FAILED_BEFORE, id="a byte"),
        case("\udcc3\udca9 a", "é a", was=FAILED_BEFORE, id="bytes of UTF-8"),
        case("a \ud800", "a \ufffd", was=FAILED_BEFORE, id="a lone surrogate"),
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


# Paths


# Every program that is told a home folder by the shell gets it expanded; after `--out=`
# no shell does (POSIX, 2.6.1).
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        case("~/a b", "HOME/a b", was=FAILED_BEFORE),
        case("~", "HOME", was=FAILED_BEFORE),
        case("a b/c", "a b/c", was=PASSED_BEFORE),
        case("./~x", "~x", was=PASSED_BEFORE),
        case("~no-such-user/x", "~no-such-user/x", was=PASSED_BEFORE),
        case("/$HOME", "/$HOME", was=PASSED_BEFORE),
    ],
)
def test_paths_of_the_command_line(monkeypatch, given, meant):
    monkeypatch.setenv("HOME", "/home folder")
    expected = Path(meant.replace("HOME", "/home folder") if "~" in given else meant)
    assert user_path(given) == expected
    for parse, path in (
        (search.parse_arguments([f"--index={given}", "x"]), "index"),
        (tables.parse_arguments([f"--results={given}", "--out=x"]), "results"),
        (tables.parse_arguments(["--results=x", f"--out={given}"]), "out"),
        (
            reproduce.parse_arguments(
                ["--table=T1", "--dataset=pydocs", f"--workdir={given}"]
            ),
            "workdir",
        ),
    ):
        assert getattr(parse, path) == expected


# huggingface_hub expands `~` in HF_HOME; a relative folder is that of the process.
@pytest.mark.parametrize(
    "listed", [case("~/sets", was=FAILED_BEFORE), case("home/sets", was=PASSED_BEFORE)]
)
def test_folders_of_ehi_data(tmp_path, monkeypatch, listed):
    (tmp_path / "home" / "sets" / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EHI_DATA", f"/no/such:{listed}")
    found = download.search_folders("mine")
    assert found.resolve() == tmp_path / "home" / "sets" / "mine"


# `mkdir` of POSIX: a file is no folder; said before anything is computed.
@pytest.mark.parametrize(
    "name", [case("file", was=FAILED_BEFORE), case("file/below", was=FAILED_BEFORE)]
)
def test_a_workdir_that_is_a_file_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        main.run(tiny(tmp_path / "no corpus"), tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"


# Row 17: said with the smallest possible. The folder is relative and has a space: the
# command that is printed works as it stands (POSIX, 2.2).
def test_budgets_that_no_search_can_meet_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EHI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    corpus = write_corpus(tmp_path / "topics")
    config = tiny(corpus, systems=("kmeans-tree",), budgets=("visit-1", "visit-0.1"))
    main.run(config, Path("my runs/x"))
    out = capsys.readouterr().out
    assert "has no queries" not in out
    line = next(line for line in out.splitlines() if line.startswith("no budget"))
    assert line.startswith("no budget of visit-1, visit-0.1 could be reached")
    percent = float(line.partition("kmeans-tree visits at least ")[2].partition("%")[0])
    assert 1 < percent < 50
    command = next(line for line in out.splitlines() if line.startswith("ask it: "))
    index = search.parse_arguments(shlex.split(command)[5:]).index
    assert open_index(index).num_documents == 320


# Row 12: it would train, and then no question could be asked.
@pytest.mark.parametrize(
    "field",
    [
        case("query_length", was=FAILED_BEFORE),
        case("document_length", was=FAILED_BEFORE),
    ],
)
def test_lengths_beyond_the_positions_are_refused(tmp_path, monkeypatch, field):
    monkeypatch.setenv("EHI_CACHE", str(tmp_path / "cache"))
    config = tiny(write_corpus(tmp_path / "topics"), **{f"tower.{field}": 41})
    with pytest.raises(ValueError, match=f"tower.{field} is 41; must be at most 40"):
        main.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Interruptions

# A job in the background ignores SIGINT, and so do the programs that it starts.
INTERRUPT = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "signal.raise_signal(signal.SIGINT)"
)
START = {
    "main": f"""
from absl import app
from experiments import main
def stop(*_): {INTERRUPT}
main.run = stop
app.run(main.main, flags_parser=main.parse_flags)
""",
    "encode": f"""
from absl import app
from experiments import encode, main
def stop(*_, **__): {INTERRUPT}
encode.run = stop
app.run(encode.main, flags_parser=main.parse_flags)
""",
    "reproduce": f"""
import sys
from experiments import reproduce
def stop(*_, **__): {INTERRUPT}
reproduce.reproduce = stop
sys.exit(reproduce.main())
""",
    "search": f"""
import sys
from experiments import search
def stop(*_, **__): {INTERRUPT}
search.load_query_encoder = stop
sys.exit(search.main())
""",
    "tables": f"""
import sys
from experiments import tables
def stop(*_, **__): {INTERRUPT}
tables.read_results = stop
sys.exit(tables.main())
""",
}
START["benchmark"] = f"""
from experiments import benchmark
def stop(*_): {INTERRUPT}
benchmark.main = stop
benchmark.command()
"""
ARGUMENTS = {
    "benchmark": [],
    "main": ["--config=experiments/configs/pydocs.py", "--workdir=/no/such"],
    "encode": [
        "--config=experiments/configs/pydocs.py",
        "--out=/no",
        "--checkpoint=/n",
    ],
    "reproduce": ["--table=T1", "--dataset=pydocs", "--workdir=/no/such"],
    "tables": ["--results=/no/such", "--out=/no"],
}


# Row 23; 128 + SIGINT is what a shell reports (POSIX, 2.8.2, and every shell).
@pytest.mark.parametrize("command", [case(name, was=FAILED_BEFORE) for name in START])
def test_ctrl_c_is_one_sentence_and_130(command, index_path):
    arguments = ARGUMENTS.get(command, [f"--index={index_path}", "words"])
    done = subprocess.run(
        [sys.executable, "-c", START[command], *arguments],
        cwd=ROOT, capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    said = done.stderr.strip()
    assert "Traceback" not in said and said.count("\n") == 0
    resumes = command in ("main", "encode", "reproduce")
    assert said.startswith("interrupted; what is complete is kept" if resumes else "")


# Configs


def parse(*overrides):
    """The config of pydocs with overrides, as `experiments.main` reads them."""
    values = flags.FlagValues()
    argv = ["main", "--config=experiments/configs/pydocs.py", *overrides]
    config = config_flags.DEFINE_config_file(
        "config", flag_values=values, lock_config=True, sys_argv=argv
    )
    main.parse_flags(argv, values)
    return config.value


def refusal(*overrides):
    """What is said of overrides; None if they are taken."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            checks.check_config(parse(*overrides))
    except ValueError as error:
        said = str(error)
    except SystemExit as stopped:
        assert stopped.code == 1
        said = err.getvalue().removeprefix("error: ")
    else:
        return None
    assert said.strip() and "\n" not in said.strip() and "Traceback" not in said
    return said.strip()


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


# Every mistake in a config names the field, its value and what is allowed.
@pytest.mark.parametrize(
    ("override", "said"),
    [
        case("tree.heigth=2", 'Did you mean "height"', was=PASSED_BEFORE),
        case("treee.height=2", 'Did you mean "tree"', was=PASSED_BEFORE),
        case("tree.height.x=2", "no such field", was=PASSED_BEFORE),
        case("tree.height=2.5", "tree.height=2.5", was=PASSED_BEFORE),
        case("tree=5", "not a dict", was=PASSED_BEFORE),
        case("=3", "Could not parse", was=PASSED_BEFORE),
        case("budgets=5", "budgets is (5,)", was=FAILED_BEFORE),
        case("systems=5", "systems is (5,)", was=PASSED_BEFORE),
        case("systems=None", "systems is (None,)", was=PASSED_BEFORE),
        case("pseudo.kinds=5", "pseudo.kinds is (5,)", was=FAILED_BEFORE),
        case("pseudo.kinds=titel", "pseudo.kinds is 'titel'", was=FAILED_BEFORE),
        case("tree.scale=inf", "tree.scale is inf", was=FAILED_BEFORE),
        case("tree.scale=nan", "tree.scale is nan", was=PASSED_BEFORE),
        case("seed=4294967296", "must be at most 4294967295", was=FAILED_BEFORE),
        case("dev_fraction=1", "must be between 0 and 1", was=FAILED_BEFORE),
        case("sizes.documents=-1", "sizes.documents is -1", was=FAILED_BEFORE),
        case("variant=../x", "variant is '../x'", was=FAILED_BEFORE),
        case("variant=a/b", "variant is 'a/b'", was=FAILED_BEFORE),
        case("variant=.hidden", "variant is '.hidden'", was=FAILED_BEFORE),
    ],
)
def test_mistakes_in_a_config(override, said):
    assert said in refusal(f"--config.{override}")


# The names that the hub allows (huggingface_hub.utils.validate_repo_id).
@pytest.mark.parametrize(
    "name",
    [
        case(" ", was=FAILED_BEFORE, id="blank"),
        case("a\udcff", was=FAILED_BEFORE, id="surrogate"),
        case("owner/model/x", was=PASSED_BEFORE, id="two slashes"),
        case("https://huggingface.co/owner/model", was=PASSED_BEFORE, id="address"),
        case("owner--model", was=FAILED_BEFORE, id="name of a cache folder"),
    ],
)
def test_towers_that_are_no_hub_ids(tmp_path, name):
    words = "neither a folder nor a hub id|no model folder"
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        resolve(name, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


FIELDS = sorted(pydocs.get_config().to_dict())
NESTED = [
    f"{section}.{name}"
    for section, fields in pydocs.get_config().to_dict().items()
    if isinstance(fields, dict)
    for name in fields
]
LETTERS = "abcdefghijklmnopqrstuvwxyz_"


@st.composite
def misspelt(draw):
    """A field with one letter too many, too few, another one, or two exchanged."""
    name = draw(st.sampled_from(FIELDS + NESTED))
    start = name.rfind(".") + 1
    at = draw(st.integers(start, len(name) - 1))
    letter = draw(st.sampled_from(LETTERS))
    changed = draw(
        st.sampled_from(
            [
                name[:at] + letter + name[at:],
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
            ]
        )
    )
    known = changed in FIELDS + NESTED
    return name if known or changed.endswith(".") or not changed else changed


# The promise of the command line: a misspelt field is one sentence, never a traceback.
@settings(max_examples=60, deadline=None)
@given(name=misspelt(), value=st.sampled_from(["1", "x", "", "None", "(1,", "true"]))
def test_misspelt_fields_passed(name, value):
    said = refusal(f"--config.{name}={value}")
    if name not in FIELDS + NESTED:
        assert said and "no such field of the config" in said


VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["()", "[]", "{}", "('a',)", "None", "True", "1e9", "0x10", "-0"]),
)


# Any value is taken or refused in one sentence.
@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(FIELDS + NESTED), value=VALUES)
def test_any_value_is_taken_or_refused_failed(name, value):
    refusal(f"--config.{name}={value}")


# Results of another version


# Row of issue 17, part 9: what was written before opens, or is refused in one sentence.
@pytest.mark.parametrize(
    ("change", "said"),
    [
        case(lambda r: r | {"new_field": 1}, "new_field", was=PASSED_BEFORE,
             id="a field of a later version"),
        case(lambda r: {k: v for k, v in r.items() if k != "seed"}, "seed",
             was=PASSED_BEFORE, id="without a field"),
        case(lambda r: r | {"seed": "0"}, "seed", was=PASSED_BEFORE, id="a string"),
        case(lambda r: [], "line 1", was=PASSED_BEFORE, id="a list"),
        case(lambda r: None, "line 1", was=PASSED_BEFORE, id="null"),
        case(lambda r: r | {"ndcg@10": None}, "ndcg", was=PASSED_BEFORE,
             id="null nDCG"),
    ],
)  # fmt: skip
def test_records_of_another_version(tmp_path, make_record, capsys, change, said):
    path = tmp_path / "pydocs.jsonl"
    write_records(path, [make_record()])
    record = json.loads(path.read_text())
    path.write_text(json.dumps(change(record)) + "\n")
    assert tables.main([f"--results={tmp_path}", f"--out={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert str(path) in err and said in err


@pytest.mark.parametrize(
    "content",
    [
        case(b"", was=FAILED_BEFORE, id="empty"),
        case(b"PK\x03\x04 cut", was=FAILED_BEFORE, id="truncated"),
        case(b"\x93NUMPY", was=FAILED_BEFORE, id="another format"),
    ],
)
def test_damaged_values_are_named(tmp_path, make_record, capsys, content):
    write_records(tmp_path / "pydocs.jsonl", [make_record()])
    path = tmp_path / "pydocs.per_query.npz"
    path.write_bytes(content)
    assert tables.main([f"--results={tmp_path}", f"--out={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(path) in err


# An installed package has no folder of records.
def test_reproduce_outside_a_checkout_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--table=T1", "--dataset=pydocs", "--workdir=runs"]
    assert reproduce.main(arguments) == 1
    err = capsys.readouterr().err
    assert "give --results=DIR" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
