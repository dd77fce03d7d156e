"""The records of a table: added cell by cell, resumed, shared."""

import argparse
import itertools
import json
import logging
import re
import shutil
import signal

import pytest
from topics import tiny

from ehi.eval.records import read_records
from ehi.parallel import preemption
from experiments import reproduce
from experiments.ablations import apply_variant
from experiments.run import experiment

# Cheap cells: none of them trains more than `dense`.
CELLS = [
    ("dense", "", "flat"),
    ("opq", "", "flat-8x"),
    ("kmeans-tree-opq", "", "visit-50-8x"),
]
NO_PATH = ("ehi-pq", "no-path", "visit-50-8x")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A workdir with all of CELLS at seed 0, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EHI_CACHE", str(folder / "cache"))
        patch.setattr(reproduce, "config_for", tiny_config)
        reproduce.reproduce(
            str(corpus), CELLS, range(1), folder / "runs", folder / "results"
        )
    return folder


@pytest.fixture
def run(corpus, tmp_path, monkeypatch):
    """run(wanted, seeds, **options), in one workdir and one folder of results"""
    monkeypatch.setattr(reproduce, "config_for", tiny_config)

    def of_cells(wanted, seeds=range(1), **options):
        folders = tmp_path / "runs", tmp_path / "results"
        reproduce.reproduce(str(corpus), wanted, seeds, *folders, **options)

    return of_cells


@pytest.fixture
def resumed(finished, tmp_path, run):
    """The fixture `run`, after all of CELLS have been run."""
    for part in ("runs", "results"):
        shutil.copytree(finished / part, tmp_path / part)
    return run


def tiny_config(dataset, variant, seed, split):
    """Return the config of `config_for`, small enough to train in seconds."""
    return apply_variant(tiny(dataset, seed=seed, split=split), variant)


def found(results):
    """(system, variant, seed, budget) of every record of a folder -> the record."""
    records = read_records(results / "topics.jsonl")
    return {(r.system, r.variant, r.seed, r.budget): r for r in records}


def trained_runs(workdir):
    """Names of the runs that a workdir has logged steps of."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else ()
    return {json.loads(line)["run"] for line in lines}


def test_every_finished_cell_is_in_the_results_at_once(run, tmp_path, monkeypatch):
    seen, collect = [], reproduce.collect

    def counted(folders, results):
        written = collect(folders, results)
        seen.append(len(read_records(results / "topics.jsonl")))
        return written

    monkeypatch.setattr(reproduce, "collect", counted)
    run(CELLS[:2], seeds=range(1, 2))
    assert seen == [1, 2]
    assert (tmp_path / "results" / "topics.per_query.npz").exists()
    records = found(tmp_path / "results")
    assert list(records) == [("dense", "", 1, "flat"), ("opq", "", 1, "flat-8x")]
    assert records["opq", "", 1, "flat-8x"].compression == 8


def test_a_line_a_cell_and_none_for_what_is_there(resumed, tmp_path, capsys):
    before = (tmp_path / "results" / "topics.jsonl").read_bytes()
    resumed(CELLS)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "results" / "topics.jsonl").read_bytes() == before
    wanted = [*CELLS, ("kmeans-tree", "", "visit-50")]
    resumed(wanted)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("[4/4] topics seed 0 kmeans-tree visit-50: nDCG@10 0.")
    realised = r"% visited \(p95 [\d.]+%, most [\d.]+%, set on train\); 0 min left$"
    assert re.search(realised, line)
    assert len(found(tmp_path / "results")) == 4


def test_results_of_another_machine_are_not_run_again(finished, tmp_path, run):
    shutil.copytree(finished / "results", tmp_path / "results")
    run(CELLS)
    assert not (tmp_path / "runs").exists()


def test_a_budget_that_one_leaf_exceeds_has_a_line_and_no_record(
    resumed, tmp_path, capsys
):
    resumed([("kmeans-tree", "", "visit-1")])
    line = capsys.readouterr().out
    assert line.startswith("[1/1] topics seed 0 kmeans-tree visit-1: over the budget;")
    assert len(found(tmp_path / "results")) == len(CELLS)


def test_a_run_that_was_cut_goes_on_behind_its_last_cell(
    run, tmp_path, monkeypatch, capsys
):
    run_cells = reproduce.run_cells

    def cut(experiment, name, budgets):
        if name == "opq":
            raise KeyboardInterrupt
        yield from run_cells(experiment, name, budgets)

    monkeypatch.setattr(reproduce, "run_cells", cut)
    with pytest.raises(KeyboardInterrupt):
        run(CELLS)
    assert list(found(tmp_path / "results")) == [("dense", "", 0, "flat")]
    monkeypatch.setattr(reproduce, "run_cells", run_cells)
    log = tmp_path / "runs" / "topics" / "seed0" / "default" / "metrics.jsonl"
    steps = log.read_bytes()
    capsys.readouterr()
    run(CELLS)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["[2/3]", "[3/3]"]
    assert len(found(tmp_path / "results")) == len(CELLS)
    assert steps and log.read_bytes() == steps  # `dense` was not trained again


def test_a_cell_that_was_evaluated_and_not_added_is_added(
    resumed, tmp_path, monkeypatch
):
    before = found(tmp_path / "results")
    shutil.rmtree(tmp_path / "results")

    def evaluate(*_):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(experiment, "evaluate_budget", evaluate)
    resumed(CELLS)
    assert found(tmp_path / "results") == before


def test_a_variant_starts_from_the_default_dense(resumed, tmp_path):
    resumed([NO_PATH])
    seed = tmp_path / "runs" / "topics" / "seed0"
    dense = "checkpoints/dense/final"
    assert (seed / "no-path" / dense).exists()
    assert trained_runs(seed / "default") == {"dense"}
    assert trained_runs(seed / "no-path") == {"ehi-pq-8x"}
    (key,) = set(found(tmp_path / "results")) - {(s, v, 0, b) for s, v, b in CELLS}
    assert key == ("ehi-pq", "no-path", 0, "visit-50-8x")


def test_the_default_starts_from_the_dense_of_a_variant_run_first(run, tmp_path):
    run([NO_PATH])
    seed = tmp_path / "runs" / "topics" / "seed0"
    assert trained_runs(seed / "no-path") == {"dense", "ehi-pq-8x"}
    run(CELLS[:1])
    assert not trained_runs(seed / "default")
    assert ("dense", "", 0, "flat") in found(tmp_path / "results")


def test_a_workdir_of_another_config_is_refused(resumed, tmp_path, monkeypatch):
    def longer(*arguments):
        config = tiny_config(*arguments)
        config.dense.steps += 1
        return config

    before = (tmp_path / "results" / "topics.jsonl").read_bytes()
    monkeypatch.setattr(reproduce, "config_for", longer)
    with pytest.raises(ValueError, match="holds another experiment.* dense;"):
        resumed([("kmeans-tree", "", "visit-50")])
    assert (tmp_path / "results" / "topics.jsonl").read_bytes() == before


def test_rows_that_are_one_variant_run_together():
    wanted = reproduce.wanted_cells(["T1", "T2"], systems=["ehi", "dense", "ehi-pq"])
    assert len(set(wanted)) == len(wanted)
    variants = itertools.groupby(variant for _, variant, _ in wanted)
    assert [variant for variant, _ in variants] == ["", "paper", "no-residual"]
    assert ("ehi-pq", "", "flat-64x") in wanted
    only = reproduce.wanted_cells(["T4"], variants=["no-path"])
    assert only == [("ehi-pq", "no-path", "visit-10-64x")]
    with pytest.raises(ValueError, match=r"T4 has no cell of --systems=\['jpq'\]"):
        reproduce.wanted_cells(["T4"], systems=["jpq"])


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--table=T9"], "invalid choice: 'T9'"),
        (["--table=T1", "--systems=faiss"], "invalid choice: 'faiss'"),
        (["--table=T1", "--seeds=0"], "'0' is neither a number of seeds nor from:to"),
        (["--table=T1", "--seeds=2:1"], "'2:1' is neither a number of seeds"),
        (["--table=T1", "--seeds=all"], "'all' is neither a number of seeds"),
    ],
)
def test_bad_command_lines_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as refused:
        reproduce.main([*arguments, "--dataset=pydocs", "--workdir=unused"])
    assert refused.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "text,seeds", [("3", range(3)), ("1:2", range(1, 2)), ("0:3", range(3))]
)
def test_seeds_are_a_number_or_a_range(text, seeds):
    arguments = ["--table", "T2", "T3", "--dataset=pydocs", "--workdir=unused"]
    args = reproduce.parse_arguments([*arguments, f"--seeds={text}"])
    assert isinstance(args, argparse.Namespace)
    assert args.seeds == seeds and args.table == ["T2", "T3"]


def test_what_cannot_be_opened_is_one_line(tmp_path, capsys):
    missing = tmp_path / "missing"
    arguments = ["--table=T2", f"--dataset={missing}", f"--workdir={tmp_path / 'w'}"]
    assert reproduce.main([*arguments, f"--results={tmp_path}", "--seeds=1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "missing" in err


def test_sigterm_ends_with_the_code_that_says_try_again(monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        reproduce, "reproduce", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    )
    try:
        status = reproduce.main(["--table=T2", "--dataset=pydocs", "--workdir=unused"])
    finally:
        signal.signal(signal.SIGTERM, handler)
        preemption._asked.clear()
    assert status == preemption.EXIT_CODE
    assert "what was complete is kept" in capsys.readouterr().err


def test_progress_within_a_cell_is_logged_on_stderr(monkeypatch, capsys):
    def encode(*_, **__):
        logging.getLogger("ehi").info("encode: 41 of 82 tokens")

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(reproduce, "reproduce", encode)
    try:
        arguments = ["--table=T2", "--dataset=pydocs", "--workdir=unused"]
        assert reproduce.main(arguments) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert capsys.readouterr().err.endswith(" encode: 41 of 82 tokens\n")


@pytest.mark.parametrize(
    ("tables", "given", "expected"),
    [(["T1", "T3"], None, "test"), (["T4"], None, "dev"), (["T2"], "dev", "dev"),
     (["T1", "T4"], "dev", "dev")],
)  # fmt: skip
def test_choices_are_made_on_dev(tables, given, expected):
    assert reproduce.split_of(tables, given) == expected


def test_choices_never_look_at_test(capsys):
    arguments = ["--dataset=pydocs", "--workdir=unused"]
    assert reproduce.main(["--table=T4", "--split=test", *arguments]) == 1
    said = "error: T4 shows choices, which are made on dev: leave out --split=test\n"
    assert capsys.readouterr().err == said
    assert reproduce.main(["--table", "T1", "T4", *arguments]) == 1
    said = "error: tables of one split at a time, not T1 on test, T4 on dev\n"
    assert capsys.readouterr().err == said
