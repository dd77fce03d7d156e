"""Published methods: what each phase of a system starts from, and leaves behind."""

import numpy as np
import pytest
from topics import PHASES, tiny

from ehi.index import open_index
from ehi.model.params import merge_model
from experiments import encode, main
from experiments.run import train
from experiments.run.experiment import open_experiment
from experiments.run.train import saved_leaves, train_system
from experiments.systems import Budget, config_of, freezes_later, get_system


@pytest.fixture
def trained(corpus, tmp_path):
    """trained(name, compression, **changes) -> Trained, and the run's experiment."""

    def of(name, compression=None, **changes):
        config = tiny(corpus, systems=(name,), **changes)
        for phase in PHASES:
            config[phase].log_every = 6
        experiment = open_experiment(config, tmp_path)
        arguments = (experiment.config, name, compression, experiment.inputs, tmp_path)
        return train_system(*arguments, experiment.log, {}), experiment

    return of


def test_jtr_trains_the_queries_and_moves_documents_to_where_they_look(
    trained, tmp_path
):
    system, experiment = trained("jtr")
    names = ("w_in", "b_in", "w_out")
    ours, theirs = (
        np.concatenate([np.ravel(system.params[f"{head}/{name}"]) for name in names])
        for head in ("head", "query_head")
    )
    assert np.abs(ours - theirs).max() > 1e-5  # both start as the head of dense
    params = train_system(
        experiment.config, "dense", None, experiment.inputs, tmp_path, experiment.log,
        {},
    ).params  # fmt: skip
    for name in names:  # documents stay
        np.testing.assert_array_equal(
            system.params[f"head/{name}"], params[f"head/{name}"]
        )
    documents = len(experiment.inputs.dataset.documents)
    resolved = config_of(experiment.config, "jtr")
    assert system.leaves.shape == (documents, 2) == (documents, resolved.tree.spill)
    again = saved_leaves(tmp_path, "jtr", experiment.inputs)
    np.testing.assert_array_equal(again, system.leaves)


def test_the_index_of_jtr_holds_documents_where_they_were_moved(corpus, tmp_path):
    config = tiny(corpus, systems=("jtr",))
    main.run(config, tmp_path)
    index = open_index(tmp_path / "index")
    experiment = open_experiment(config, tmp_path)
    leaves = saved_leaves(tmp_path, "jtr", experiment.inputs)
    (segment,) = index.segments
    for leaf in range(index.num_leaves):
        rows = segment.leaf_rows[slice(*segment.leaf_offsets[leaf : leaf + 2])]
        there = np.flatnonzero((leaves == leaf).any(axis=1))
        assert sorted(rows.tolist()) == there.tolist()


def test_leaves_of_another_corpus_are_not_used(trained, tmp_path, monkeypatch):
    _, experiment = trained("jtr")
    with pytest.raises(ValueError, match="jtr in .* has moved documents .*steps=0"):
        encode.run(experiment.config, tmp_path, tmp_path / "shards", shards=2)
    assert not (tmp_path / "shards").exists()
    kept = tmp_path / "checkpoints" / "jtr" / "leaves.npz"
    with np.load(kept) as file:
        np.savez(kept, leaves=file["leaves"], corpus_sha256=np.str_("other"))
    warned = []
    monkeypatch.setattr(train.LOG, "warning", lambda text, run: warned.append(run))
    assert saved_leaves(tmp_path, "jtr", experiment.inputs) is None
    assert saved_leaves(tmp_path, "ehi", experiment.inputs) is None
    assert warned == ["jtr"]


def test_repconc_trains_one_head_then_freezes_documents_for_jpq(trained, monkeypatch):
    seen, run_phase = {}, train.run_phase

    def watched(graphdef, params, *args, name, **options):
        state = run_phase(graphdef, params, *args, name=name, **options)
        seen[name] = graphdef, params, state["params"], args[1]
        return state

    monkeypatch.setattr(train, "run_phase", watched)
    system, experiment = trained("repconc", 8)
    before, after = seen["repconc"], seen["repconc_jpq"]
    graphdef, _, first, _ = before
    assert not any(name.startswith("query_head/") for name in first)
    assert "quantiser/assign_codebooks" not in first
    assert merge_model(graphdef, first).query_head is None
    graphdef, start, last, tables = after
    for name in ("w_in", "b_in", "w_out", "projection"):
        np.testing.assert_array_equal(
            start[f"query_head/{name}"], first[f"head/{name}"]
        )
        np.testing.assert_array_equal(last[f"head/{name}"], first[f"head/{name}"])
    for name in (start, last):  # the codes are those of the first phase, to the end
        np.testing.assert_array_equal(
            name["quantiser/assign_codebooks"], first["quantiser/codebooks"]
        )
    assert not np.array_equal(last["quantiser/codebooks"], first["quantiser/codebooks"])
    model = merge_model(graphdef, system.params)
    codes = model.quantiser.encode(model.rotate(system.documents)[0])
    np.testing.assert_array_equal(np.asarray(codes), tables["codes"])


@pytest.mark.parametrize("name", ["repconc", "jtr", "poeem"])
def test_only_phases_before_a_freeze_share_what_queries_have(corpus, name):
    config, system = tiny(corpus), get_system(name)
    found = [freezes_later(config, system, phase) for phase in system.phases]
    assert found == ([True, False] if name == "repconc" else [False, False])
    assert Budget.parse("flat-8x").applies_to(system) == (name == "repconc")
