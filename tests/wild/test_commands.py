"""The commands, with odd paths, budgets, interruptions and results.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from topics import tiny, write_corpus
from wild_cases import failed, passed

from ehi.data import download
from ehi.eval.records import write_records
from ehi.index import open_index
from ehi.model import pretrained
from experiments import main, reproduce, search, tables
from experiments.command import user_path

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


# Paths


# Every program that is told a home folder by the shell gets it expanded; after `--out=`
# no shell does (POSIX, 2.6.1).
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        failed("~/a b", "HOME/a b"),
        failed("~", "HOME"),
        passed("a b/c", "a b/c"),
        passed("./~x", "~x"),
        passed("~no-such-user/x", "~no-such-user/x"),
        passed("/$HOME", "/$HOME"),
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
@pytest.mark.parametrize("listed", [failed("~/sets"), passed("home/sets")])
def test_folders_of_ehi_data(tmp_path, monkeypatch, listed):
    (tmp_path / "home" / "sets" / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EHI_DATA", f"/no/such:{listed}")
    found = download.search_folders("mine")
    assert found.resolve() == tmp_path / "home" / "sets" / "mine"


# `mkdir` of POSIX: a file is no folder; said before anything is computed.
@pytest.mark.parametrize("name", [failed("file"), failed("file/below")])
def test_a_workdir_that_is_a_file_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        main.run(tiny(tmp_path / "no corpus"), tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"


# The message names the smallest possible budget. The folder is relative and has a
# space: the command that is printed works as it stands (POSIX, 2.2).
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


# Otherwise it would train, and then no question could be asked.
@pytest.mark.parametrize(
    "field",
    [
        failed("query_length"),
        failed("document_length"),
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


# 128 + SIGINT is what a shell reports (POSIX, 2.8.2, and every shell).
@pytest.mark.parametrize("command", [failed(name) for name in START])
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


# The imports of a command take seconds, and Ctrl-C may come during them.
@pytest.mark.parametrize("command", [failed(name) for name in START])
def test_ctrl_c_during_the_imports_is_one_sentence_and_130(tmp_path, command):
    (tmp_path / "numpy.py").write_text(INTERRUPT)
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{command}"],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


# A library leaves signals and the hook to the program that imports it.
def test_importing_experiments_changes_no_hook_passed():
    code = (
        "import signal, sys; before = sys.excepthook, signal.getsignal(signal.SIGINT); "
        "import experiments.command; "
        "assert before == (sys.excepthook, signal.getsignal(signal.SIGINT))"
    )
    subprocess.run(
        [sys.executable, "-c", code, "experiments.main"], cwd=ROOT, check=True
    )
    assert sys.excepthook.__module__ != "experiments"


# As the other commands: a mistake is one sentence and 1, Ctrl-C is 130.
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        failed(ValueError("no home folder"), "error: no home folder", "", id="value"),
        failed(OSError("disk full"), "error: disk full", "", id="system"),
        failed(KeyboardInterrupt(), 130, "interrupted\n", id="Ctrl-C"),
    ],
)
def test_a_float16_copy_that_fails(monkeypatch, capsys, error, code, said):
    def fail(name):
        raise error

    monkeypatch.setattr(pretrained, "resolve", fail)
    monkeypatch.setattr(sys, "argv", ["x", "--to-float16", "owner/model", "out"])
    with pytest.raises(SystemExit) as ended:  # a sentence goes to stderr, with code 1
        pretrained.main()
    assert (ended.value.code, capsys.readouterr().err) == (code, said)


# Results of another version


# What another version wrote opens, or is refused in one sentence.
@pytest.mark.parametrize(
    ("change", "said"),
    [
        passed(lambda r: r | {"new_field": 1}, "new_field",
               id="a field of a later version"),
        passed(lambda r: {k: v for k, v in r.items() if k != "seed"}, "seed",
               id="without a field"),
        passed(lambda r: r | {"seed": "0"}, "seed", id="a string"),
        passed(lambda r: [], "line 1", id="a list"),
        passed(lambda r: None, "line 1", id="null"),
        passed(lambda r: r | {"ndcg@10": None}, "ndcg", id="null nDCG"),
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
        failed(b"", id="empty"),
        failed(b"PK\x03\x04 cut", id="truncated"),
        failed(b"\x93NUMPY", id="another format"),
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
