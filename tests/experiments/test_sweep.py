"""Sweeps: the same trials for every system, on dev, resumed where they stopped."""

import pytest
from topics import PHASES, tiny

from ehi.eval.records import read_records
from ehi.train.phase import Phase
from experiments import reproduce, sweep
from experiments.configs import base
from experiments.systems import SYSTEMS, get_system

TRAINED = [name for name, system in SYSTEMS.items() if system.phases]


@pytest.mark.parametrize("system", TRAINED)
@pytest.mark.parametrize("trial", sweep.TRIALS)
def test_every_trial_of_every_system_is_a_valid_config(system, trial):
    config = base.get_config()
    changed = sweep.overrides(config, system, trial)
    before = config.to_json()
    config.update_from_flattened_dict(changed)
    for phase in get_system(system).phases:
        Phase.from_mapping(config[phase].to_dict())
    same = config.to_json() == before
    assert same == (trial == "as-it-is" or not changed)


def test_a_trial_multiplies_what_it_names():
    config = base.get_config()
    assert sweep.overrides(config, "jpq", "index-triple") == {
        "jpq.rates.quantiser": pytest.approx(9e-4)
    }
    assert sweep.overrides(config, "jpq", "heads-third") == {
        "jpq.rates.query_head": pytest.approx(1e-4)
    }
    both = sweep.overrides(config, "repconc", "steps-five")
    assert both == {"repconc.steps": 2000, "repconc_jpq.steps": 1000}
    assert sweep.overrides(config, "jpq", "pool-double") == {
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
