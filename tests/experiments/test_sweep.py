"""Sweeps: the same trials for every system, on dev, resumed where they stopped."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import topics
from topics import PHASES, tiny

import ehi
from ehi.eval.records import read_records
from ehi.train.phase import Phase
from experiments import reproduce, sweep
from experiments.configs import base
from experiments.sweeps import cells, grid, trials
from experiments.sweeps.table import table_rows
from experiments.systems import SYSTEMS, get_system

ROOT = Path(ehi.__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0))
TRAINED = [name for name, system in SYSTEMS.items() if system.phases]


@pytest.mark.parametrize("system", TRAINED)
@pytest.mark.parametrize("trial", trials.TRIALS)
def test_every_trial_of_every_system_is_a_valid_config(system, trial):
    config = base.get_config()
    changed = trials.overrides(config, system, trial)
    before = config.to_json()
    config.update_from_flattened_dict(changed)
    for phase in get_system(system).phases:
        Phase.from_mapping(config[phase].to_dict())
    same = config.to_json() == before
    assert same == (trial == "as-it-is" or not changed)


def test_a_trial_multiplies_what_it_names():
    config = base.get_config()
    assert trials.overrides(config, "jpq", "index-triple") == {
        "jpq.rates.quantiser": pytest.approx(9e-4)
    }
    assert trials.overrides(config, "jpq", "heads-third") == {
        "jpq.rates.query_head": pytest.approx(1e-4)
    }
    both = trials.overrides(config, "repconc", "steps-five")
    assert both == {"repconc.steps": 2000, "repconc_jpq.steps": 1000}
    assert trials.overrides(config, "jpq", "pool-double") == {
        "jpq.pool": 128,
        "jpq.top_k": 400,
    }


def test_a_sweep_is_on_dev_and_resumes(corpus, tmp_path, monkeypatch, capsys):
    ran = []

    def config_for(dataset, variant, seed, split):
        assert split == "dev" and not variant
        ran.append(seed)
        config = tiny(dataset, seed=seed, split=split)
        for phase in PHASES:
            config[phase].steps = 4
        return config

    monkeypatch.setattr(reproduce, "config_for", config_for)
    first = ["--systems", "joint-pq", "--budget=flat-8x", f"--dataset={corpus}"]
    first += [f"--workdir={tmp_path}", "--trials", "as-it-is"]
    assert sweep.main(first) == 0
    assert "[1/1] topics seed 0 joint-pq:as-it-is flat-8x" in capsys.readouterr().out
    assert sweep.main([*first, "steps-double"]) == 0
    printed = capsys.readouterr().out
    assert "as-it-is flat-8x" not in printed and "[2/2]" in printed
    assert printed.count("\n| steps-double | 0.") == 1 and "| as-it-is | 0." in printed
    records = read_records(tmp_path / "results" / "topics.jsonl")
    assert {r.variant for r in records} == {"as-it-is", "steps-double"}
    assert {r.split for r in records} == {"dev"}


@pytest.mark.parametrize("budget", ["visit-10", "flat-64x"])
def test_a_budget_that_does_not_fit_is_refused(budget, tmp_path, capsys):
    system = "jpq" if budget == "visit-10" else "ehi"
    words = ["--systems", system, f"--budget={budget}", "--dataset=pydocs"]
    assert sweep.main([*words, f"--workdir={tmp_path}"]) == 1
    assert f"budget '{budget}' does not apply to {system}" in capsys.readouterr().err


# A config file of a tiny run, and the words that every sweep of it shares.
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from topics import tiny

def get_config(variant=""):
    c = tiny({corpus!r})
    c.systems = ("dense", "ehi-pq")
    return c
"""
GRID = ["--set", "joint.rates.head=1e-3,3e-3", "leaves.score=ip"]


def command_of(folder, corpus):
    """The command line of a grid of two cells, whose config is a file."""
    path, tests = folder / "tiny_config.py", str(Path(topics.__file__).parent)
    path.write_text(CONFIG.format(tests=tests, corpus=str(corpus)))
    return [f"--config={path}", f"--workdir={folder / 'w'}", *GRID]


@pytest.fixture
def command(corpus, tmp_path):
    return command_of(tmp_path, corpus)


@pytest.fixture(scope="module")
def swept(corpus, tmp_path_factory):
    """The workdir of a finished sweep."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EHI_CACHE", str(folder / "cache"))
        assert sweep.main(command_of(folder, corpus)) == 0
    return folder / "w"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def trained(folder):
    """(run, phase, step) of every logged step below a folder, with repetitions."""
    logs = folder.rglob("metrics.jsonl")
    rows = [row for log in logs for row in lines_of(log)]
    return sorted((row["run"], row["phase"], row["step"]) for row in rows)


def test_a_table_has_the_cells_of_a_grid_the_best_first(swept):
    rows = lines_of(swept / "sweep.jsonl")
    there = {tuple(row["changed"].values()) for row in rows}
    assert there == {(1e-3, "ip"), (3e-3, "ip")}
    values = [row["ndcg@10"] for row in rows]
    assert values == sorted(values, reverse=True)
    records = read_records(swept / "results" / "topics.jsonl")
    assert {r.split for r in records} == {"dev"}
    assert {r.variant: r.ndcg_at_10 for r in records} == pytest.approx(
        {row["cell"]: row["ndcg@10"] for row in rows}
    )
    head, _, *lines = (swept / "sweep.md").read_text().splitlines()[2:]
    assert head.startswith("| joint.rates.head | leaves.score | ndcg@10 | recall@100 |")
    shown = [line.split(" | ")[:3] for line in lines]
    assert shown == [
        [f"| {r['changed']['joint.rates.head']}", "ip", f"{r['ndcg@10']:.4f}"]
        for r in rows
    ]


def test_what_cells_share_is_trained_once(swept):
    steps = trained(swept)
    assert [step for run, _, step in steps if run == "dense"] == [2, 4, 6]
    assert len([run for run, _, _ in steps if run == "ehi-pq-8x"]) == 2 * 3
    (shared,) = (swept / "seed0").glob("dense-*")
    fits = sorted(path.name for path in (shared / "starts").iterdir())
    assert len(fits) == 2 and fits[0].startswith("kmeans") and fits[1].startswith("opq")
    for cell in (swept / "seed0").glob("ehi-pq-*"):
        assert not (cell / "checkpoints" / "dense").exists()
        assert (cell / "starts").resolve() == (shared / "starts").resolve()


def test_a_sweep_that_was_stopped_goes_on_and_gives_the_same(
    swept, command, tmp_path, monkeypatch, capsys
):
    run_cells = cells.run_cells

    def stopped_at_the_second(experiment, name, budgets):
        if "0.003" in experiment.config.variant:
            raise KeyboardInterrupt
        yield from run_cells(experiment, name, budgets)

    monkeypatch.setattr(cells, "run_cells", stopped_at_the_second)
    assert sweep.main(command) == 130
    capsys.readouterr()
    monkeypatch.setattr(cells, "run_cells", run_cells)
    assert sweep.main(command) == 0
    printed = capsys.readouterr().out
    assert "[1/2]" not in printed and "[2/2]" in printed
    assert_same(tmp_path / "w", swept)
    assert sweep.main(command) == 0
    assert "/2]" not in capsys.readouterr().out


def assert_same(ours, theirs):
    """Two sweeps have trained the same steps and have the same table."""
    assert trained(ours) == trained(theirs)
    tables = (lines_of(workdir / "sweep.jsonl") for workdir in (ours, theirs))
    for one, two in zip(*tables, strict=True):
        for row in (one, two):
            del row["train_seconds"], row["train_seconds sd"]
        assert one == two


@pytest.mark.slow
@pytest.mark.skipif(CORES < 2, reason="two processes need two cores")
def test_processes_that_are_killed_go_on_and_share(swept, command, tmp_path):
    words = [sys.executable, "-m", "experiments.sweep", *command, "--processes=2"]
    first = subprocess.Popen(words, cwd=ROOT)
    while not list((tmp_path / "w").glob("seed0/dense-*/starts/opq*")):
        assert first.poll() is None
        time.sleep(0.1)
    first.kill()
    first.wait()
    subprocess.run(words, cwd=ROOT, check=True)
    assert_same(tmp_path / "w", swept)


def test_a_cell_that_diverges_has_its_row_and_the_others_go_on(
    command, tmp_path, monkeypatch, capsys
):
    def diverges(experiment, name, budgets):
        if "0.003" in experiment.config.variant:
            raise FloatingPointError("step 3 is not finite")
        yield budgets[0], None

    monkeypatch.setattr(cells, "run_cells", diverges)
    assert sweep.main(command) == 0
    assert "0.003_score-ip diverged: step 3" in capsys.readouterr().out
    states = [row["state"] for row in lines_of(tmp_path / "w" / "sweep.jsonl")]
    assert sorted(states) == ["diverged", "over the budget"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("joint.steps=10,20", [10, 20]),
        ("leaves.score='',ip", ["", "ip"]),
        ("pseudo.kinds=('title','span'),('title',),title", None),
        ("ignore_identical_ids=None,True", [None, True]),
        ("tree.adaptive=true,False", [True, False]),
        ("joint.rates.head=1", [1.0]),
    ],
)
def test_values_are_those_of_the_command_line(text, values):
    if values is None:
        with pytest.raises(ValueError, match=r"the value \('title',\) twice"):
            grid.parse_grid(base.get_config(), [text])
        text, values = text.removesuffix(",title"), [("title", "span"), ("title",)]
    assert list(grid.parse_grid(base.get_config(), [text]).values()) == [values]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "joint.rates.hed=1"], "near ones are joint.rates.head"),
        (["--set", "joint.rates.hed=1"], "joint.rates has head, leaf_centroids"),
        (["--set", "head=1"], "it is a section; name one of its fields, head.hidden"),
        (["--set", "joint.steps="], "has an empty value"),
        (["--set", "joint.steps=1,,2"], "has an empty value"),
        (["--set", "joint.steps"], "write it as FIELD=VALUE"),
        (["--set", "pseudo.kinds=('title'"], "a bracket or quote is not closed"),
        (["--set", "joint.steps=1.5"], "1.5 is no int, as 6 is"),
        (["--set", "joint.steps=1", "joint.steps=2"], "names joint.steps twice"),
        (["--set", "joint.steps=2,2"], "has the value 2 twice"),
        (["--set", "split=dev,test"], "it is on dev"),
        (["--set", "seed=1,2"], "use --seeds"),
        (["--set", "jpq.steps=1"], "ehi-pq has no phase jpq, but joint, dense"),
        (["--set", "leaves.score=foo"], "leaves.score is 'foo'; allowed"),
        (["--set", "leaves.residual=True", "--systems=opq"], "opq always has False"),
        (["--config.split=test", *GRID], "a sweep chooses, so it is on dev"),
        (["--config.joint.stps=1", *GRID], "no such field of the config"),
        (["--config.leaves.score=ip", *GRID], "in --set and in --config.leaves.score"),
        (["--processes=1000", *GRID], "--processes=1000; it may be 1 to"),
        (["--metric=exact_recall@10", *GRID], "only records of vectors have it"),
    ],
)
def test_mistakes_are_one_sentence_before_any_work(words, said, command, capsys):
    words = [*command[:2], *words]
    assert sweep.main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not Path(command[1].partition("=")[2]).exists()


def test_deviations_are_those_of_a_sample(swept, command, make_record):
    words = command[:1] + [f"--workdir={swept}", *GRID, "--seeds=2"]
    of = sweep.sweep_of(sweep.parse_arguments(words))
    cell = next(iter(of.columns("ehi-pq")))
    records = [
        make_record(
            system="ehi-pq", variant=cell, split="dev", seed=seed,
            budget=of.budgets["ehi-pq"], ndcg_at_10=value,
        )
        for seed, value in ((0, 0.5), (1, 0.7))
    ]  # fmt: skip
    row = table_rows(of, "ehi-pq", records)[0]
    assert row["ndcg@10"] == pytest.approx(0.6)
    assert row["ndcg@10 sd"] == pytest.approx(0.2 / 2**0.5)
    assert table_rows(of, "ehi-pq", records[:1])[0]["ndcg@10 sd"] is None


def test_a_workdir_of_another_sweep_is_refused(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run_sweep", lambda *_: None)
    assert sweep.main(command) == 0
    kept = (tmp_path / "w" / "sweep.json").read_bytes()
    for words, said in (
        ([*command[:2], "--set", "joint.steps=1"], "not of joint.steps; choose"),
        ([*command, "--config.tree.height=2"], "another config, which differs in tree"),
        ([*command[:2], "--trials", "as-it-is"], "not of trial; choose another"),
    ):
        assert sweep.main(words) == 1
        assert said in capsys.readouterr().err
        assert (tmp_path / "w" / "sweep.json").read_bytes() == kept
    assert sweep.main([*command, "--seeds=2"]) == 0  # more of the same
