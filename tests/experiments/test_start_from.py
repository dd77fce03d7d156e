"""A run trains on from the parameters of a finished one: `config.start_from`."""

import json
import shutil

import numpy as np
import pytest
from topics import PHASES, tiny

from ehi.eval.records import read_records
from ehi.train import loop
from experiments import main
from experiments.run.evaluate import _config_hash
from experiments.run.experiment import open_experiment
from experiments.run.finished import open_run
from experiments.run.train import Job, _tables, train_system
from experiments.run.workdir import CONTINUED
from experiments.systems import SYSTEMS, Budget, get_system, phase_of, phases_of

# What a trained tower needs.
ENCODED = {f"{phase}.encoded": 4 for phase in ("dense", "joint")}
TRAINED = [name for name, system in SYSTEMS.items() if system.phases]


def train(config, workdir, name):
    """The trained system, and its experiment."""
    experiment = open_experiment(config, workdir)
    compression = 8 if get_system(name).pq else None
    system = train_system(
        experiment.config, name, compression, experiment.inputs, workdir,
        experiment.log, {},
    )  # fmt: skip
    return system, experiment


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The workdir of a run that trained every system."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EHI_CACHE", str(folder / "cache"))
        experiment = open_experiment(tiny(corpus, systems=TRAINED), folder / "run")
        trained = {}
        for name in TRAINED:
            train_system(
                experiment.config, name, 8 if get_system(name).pq else None,
                experiment.inputs, folder / "run", experiment.log, trained,
            )  # fmt: skip
    return folder / "run", trained


@pytest.fixture
def grown(corpus, tmp_path):
    """The corpus with 80 more documents; a new train query asks for one of them."""
    folder = shutil.copytree(corpus, tmp_path / "grown")
    with (folder / "corpus.jsonl").open("a") as file:
        for n in range(80):
            document = {"_id": f"new{n}", "title": "a a k", "text": f"a b {n} a a"}
            file.write(json.dumps(document) + "\n")
    with (folder / "queries.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "later", "text": "a a b"}) + "\n")
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("later\tnew0\t1\n")
    return folder


def on(folder, finished, **changes):
    return tiny(folder, start_from=str(finished), start_from_steps=0.5, **changes)


@pytest.mark.parametrize("name", TRAINED)
def test_without_steps_every_system_keeps_its_parameters(
    corpus, finished, tmp_path, name
):
    workdir, trained = finished
    nothing = {f"{phase}.steps": 0 for phase in PHASES}
    config = on(corpus, workdir, systems=(name,), **nothing)
    system, _ = train(config, tmp_path / "run", name)
    before = trained[system.run].params
    assert set(system.params) == set(before)
    for array, value in before.items():
        np.testing.assert_array_equal(system.params[array], value)


@pytest.mark.parametrize("name", ["ehi-pq", "jpq", "poeem", "repconc", "jtr"])
def test_every_system_trains_on_in_its_last_phase_only(grown, finished, tmp_path, name):
    workdir, trained = finished
    config = on(grown, workdir, systems=(name,))
    system, experiment = train(config, tmp_path / "run", name)
    assert len(system.documents) == 400
    before = trained[system.run].params
    assert any((system.params[n] != before[n]).any() for n in before)
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
    steps = [(row["phase"], row["step"]) for row in rows if row["run"] == system.run]
    last = get_system(name).phases[-1]
    assert steps == [(last, 2), (last, 3)]
    assert system.seconds > 0


def test_phases_that_train_on_are_shorter_and_fit_or_copy_nothing(corpus):
    config = tiny(corpus)
    assert phases_of(config, SYSTEMS["repconc"]) == ("repconc", "repconc_jpq")
    config.start_from = "somewhere"
    for system in SYSTEMS.values():
        assert phases_of(config, system) == system.phases[-1:]
    config.joint.steps, config.jtr.steps = 400, 0
    assert phase_of(config, "joint", 320).steps == 40
    assert phase_of(config, "jtr", 320).steps == 0
    assert phase_of(config, "dense", 320).steps == 1  # of 6
    assert {phase_of(config, phase, 320).start for phase in PHASES} == {"", "reassign"}
    config.corpus_of_steps = 160
    assert phase_of(config, "joint", 320).steps == 80


def test_a_run_that_trains_on_and_is_stopped_ends_with_the_same_bits(
    grown, finished, tmp_path, monkeypatch
):
    config = on(grown, finished[0], systems=("ehi-pq",))
    for phase in PHASES:
        config[phase].checkpoint_every = 1
    whole, _ = train(config, tmp_path / "whole", "ehi-pq")
    make = loop.make_batch

    def cutting(*args, step, **options):
        if step == 2 and options["seed"] == 0 and args[1].losses["distill"]:
            raise KeyboardInterrupt
        return make(*args, step=step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_batch", cutting)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "cut", "ehi-pq")
    system, _ = train(config, tmp_path / "cut", "ehi-pq")
    for name, value in whole.params.items():
        np.testing.assert_array_equal(system.params[name], value)


def test_a_trained_tower_is_that_of_the_finished_run(corpus, tmp_path):
    changes = {"tower.trainable": "all", "systems": ("dense",)}
    changes |= ENCODED | {"dense.rates.tower": 1e-2}
    before, _ = train(tiny(corpus, **changes), tmp_path / "first", "dense")
    config = on(corpus, tmp_path / "first", **changes | {"dense.steps": 0})
    system, experiment = train(config, tmp_path / "second", "dense")
    np.testing.assert_allclose(system.documents, before.documents, atol=1e-6)
    job = Job(
        experiment.config, get_system("dense"), "dense", system.graphdef,
        system.params, experiment.inputs, None, tmp_path / "second",
    )  # fmt: skip
    phase = phase_of(experiment.config, "dense", 320)
    cached = _tables(job, phase, system.graphdef, system.params)["cached_documents"]
    # Rows that a step does not read are outputs of the tower that trains on.
    assert np.abs(cached - experiment.inputs.document_features).max() > 1e-3


def test_records_and_files_say_that_a_run_trained_on(corpus, grown, finished, tmp_path):
    config = on(grown, finished[0], systems=("ehi-pq",), budgets=("visit-50-8x",))
    main.run(config, tmp_path / "run")
    (record,) = read_records(tmp_path / "run" / "results.jsonl")
    assert record.variant == CONTINUED and record.cell.stem.startswith("ehi-pq.cont")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["start_from"] == str(finished[0])
    assert written["start_from_steps"] == 0.5 and written["variant"] == CONTINUED
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["start_from"]
    main.run(config, tmp_path / "run")  # reuses everything
    # The seeds of a row share a hash, wherever their first runs lie.
    other = tiny(corpus, seed=1, systems=("ehi-pq",))
    open_experiment(other, tmp_path / "other")
    hashes = {record.config_hash}
    _, experiment = train(config, tmp_path / "run", "ehi-pq")
    seed1 = experiment.config.copy_and_resolve_references()
    seed1.seed, seed1.start_from = 1, str(tmp_path / "other")
    hashes.add(_config_hash(seed1, experiment.inputs))
    assert len(hashes) == 1
    seed1.start_from = ""
    assert _config_hash(seed1, experiment.inputs) not in hashes


def test_a_run_from_the_start_is_described_as_ever(corpus, tmp_path):
    experiment = open_experiment(tiny(corpus), tmp_path)
    for name in ("config.json", "inputs.json"):
        assert "start_from" not in (tmp_path / name).read_text()
    first = _config_hash(experiment.config, experiment.inputs)
    experiment.config.start_from_steps = 0.3
    assert _config_hash(experiment.config, experiment.inputs) == first


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tree.branching": 4}, "tree.branching is 4, but .* was trained with 8"),
        ({"leaves.num_codewords": 256}, "num_codewords is 256, but .* with 16"),
        ({"tree.spill": 2}, "tree.spill is 2, but .* was trained with 1"),
        ({"head.hidden": 16}, "head.hidden is 16, but .* was trained with 8"),
        ({"tower.query_tower": True, "tower.trainable": "all"} | ENCODED, "'all', but"),
        ({"budgets": ("visit-50-4x",)}, "no trained ehi-pq-4x, but dense, .*ehi-pq-8x"),
        ({"start_from_steps": 0.0}, "start_from_steps is 0.0; must be above 0"),
        ({"start_from": "nowhere"}, "start_from=nowhere holds no finished run"),
    ],
)  # fmt: skip
def test_another_run_does_not_fit(corpus, finished, tmp_path, changes, said):
    config = on(corpus, finished[0], systems=("ehi-pq",), budgets=("visit-50-8x",))
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        open_experiment(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_both_trained_on_and_used_as_it_is(corpus, finished, tmp_path):
    config = on(corpus, finished[0], systems=("ehi-pq",))
    with pytest.raises(ValueError, match="give one of them"):
        open_experiment(config, tmp_path / "run", source=finished[0])
    with pytest.raises(ValueError, match="nothing is trained here"):
        open_run(config, "ehi-pq", finished[0])


def test_a_start_that_has_changed_is_noticed(corpus, finished, tmp_path):
    first = shutil.copytree(finished[0], tmp_path / "first")
    config = on(corpus, first, systems=("dense",))
    open_experiment(config, tmp_path / "run")
    theirs = json.loads((first / "config.json").read_text())
    theirs["systems"] = ["dense"]  # adds or removes records only
    (first / "config.json").write_text(json.dumps(theirs))
    open_experiment(config, tmp_path / "run")
    theirs["seed"] = 7
    (first / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match="was made of another start_from"):
        open_experiment(config, tmp_path / "run")
    with pytest.raises(ValueError, match="holds another experiment.*start_from"):
        open_experiment(tiny(corpus, systems=("dense",)), tmp_path / "run")


def test_a_larger_corpus_keeps_the_tree_of_the_finished_run(grown, finished, tmp_path):
    config = on(grown, finished[0], systems=("ehi-pq",))
    config.tree.branching = config.leaves.num_codewords = 0
    found = open_experiment(config, tmp_path / "run").config
    assert (found.tree.branching, found.leaves.num_codewords) == (8, 16)
    open_experiment(config, tmp_path / "run")  # it may be resumed
    assert Budget.parse("visit-50-8x").applies_to(SYSTEMS["ehi-pq"])
