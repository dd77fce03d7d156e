"""T6: half of a small corpus is trained on, the rest is added or replaces documents."""

from types import SimpleNamespace

import numpy as np
import pytest
from topics import tiny

from ehi.data.datasets import open_dataset
from ehi.eval.records import aligned, read_records, read_run_values
from experiments import reproduce, tables
from experiments.paper.ageing import ageing_table
from experiments.run import ageing

BUDGET = "visit-50-8x"


@pytest.fixture(scope="module")
def aged(corpus, tmp_path_factory):
    """A workdir with T6 of one seed, and its records."""
    folder = tmp_path_factory.mktemp("aged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EHI_CACHE", str(folder / "cache"))
        found = list(ageing.age(tiny(corpus), folder / "run", budget=BUDGET))
    return folder / "run", [record for _, record in found]


def test_halves_are_disjoint_and_divide_no_group():
    dataset = SimpleNamespace(doc_ids=list("abcdefgh"), groups=None)
    kept, later = ageing.halves(dataset)
    assert len(kept) == len(later) == 4
    assert sorted([*kept, *later]) == list(range(8))
    dataset.groups = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    kept, later = ageing.halves(dataset)
    assert not {dataset.groups[i] for i in kept} & {dataset.groups[i] for i in later}
    assert 0 < len(kept) <= 4


def test_stages_replace_as_many_documents_as_they_take():
    kept, later = np.arange(50), np.arange(50, 100)
    added, *replaced = ageing.stages(kept, later)
    assert added.asked.tolist() == added.added.tolist() == later.tolist()
    assert len(added.gone) == 0
    for stage, percent in zip(replaced, ageing.REPLACED, strict=True):
        assert stage.name == f"replaced-{percent}"
        assert len(stage.gone) == len(stage.added) == percent / 2
        assert set(stage.gone) <= set(kept) and set(stage.added) <= set(later)
        expected = (set(kept) - set(stage.gone)) | set(stage.added)
        assert set(stage.asked) == expected and len(stage.asked) == 50


def test_half_a_data_set_keeps_the_train_queries_that_it_answers(corpus):
    dataset = open_dataset(corpus)
    kept, later = ageing.halves(dataset)
    half = ageing.only(dataset, kept)
    assert half.doc_ids == [dataset.doc_ids[row] for row in kept]
    assert half.documents[3] == dataset.documents[int(kept[3])]
    known = {doc for docs in half.qrels["train"].values() for doc in docs}
    assert known <= set(half.doc_ids) and half.qrels["test"] == dataset.qrels["test"]
    asked = ageing.answered_by(dataset, "train", kept)
    assert asked == half.qrels["train"]
    others = ageing.answered_by(dataset, "train", later)
    assert len(asked) + len(others) == 32 and not set(asked) & set(others)


def test_every_stage_is_measured_for_both_systems_and_both_trainings(corpus, aged):
    _, records = aged
    assert {(r.system, r.variant) for r in records} == {
        (system, variant)
        for system in ageing.SYSTEMS
        for variant in (ageing.HALF, ageing.WHOLE)
    }
    dataset = open_dataset(corpus)
    for stage in ageing.stages(*ageing.halves(dataset)):
        asked = ageing.answered_by(dataset, "test", stage.asked)
        found = [r for r in records if r.split == f"test-{stage.name}"]
        assert len(found) == 4 * bool(asked)
        for record in found:
            assert record.unlabelled_queries == len(asked)
            assert record.budget_queries == "train" and record.docs_visited < 0.75
            # 8 leaves, and every document that is there now.
            size = 320 if stage.name == "added" else 160
            assert record.leaf_load_max >= size / 8


def test_what_was_measured_is_reused(corpus, aged, monkeypatch):
    folder, records = aged
    monkeypatch.setattr(ageing, "measure", None)
    monkeypatch.setattr("experiments.run.train.run_phase", None)
    again = [r for _, r in ageing.age(tiny(corpus), folder, budget=BUDGET)]
    assert [r.cell for r in again] == [r.cell for r in records]


def test_the_table_has_a_column_for_each_stage(aged, monkeypatch):
    folder, records = aged
    monkeypatch.setattr("experiments.paper.ageing.BUDGET", BUDGET)
    values = {}
    for part in ("half", "whole"):
        values |= read_run_values(
            folder / part / "trec", read_records(folder / part / "results.jsonl")
        )
    table = ageing_table("topics", "test", records, aligned(values))
    assert table.header == ("system", "trained on", *ageing.STAGES)
    assert [row[:2] for row in table.rows] == [
        ("kmeans-tree-opq", "half"),
        ("ehi-pq", "half"),
        ("kmeans-tree-opq", "all documents"),
        ("ehi-pq", "all documents"),
    ]
    assert 0 <= table.rows[1][2].value <= 1
    assert ageing_table("topics", "dev", records, {}) is None


def test_t6_is_reproduced_alone_and_shown_among_the_tables(
    aged, corpus, tmp_path, monkeypatch, capsys
):
    folder, records = aged
    monkeypatch.setattr(reproduce, "config_for", lambda *_: tiny(corpus))

    def measured(config, workdir, systems):
        assert systems == ("ehi-pq",) and workdir.name == "ageing"
        return [(folder / "half", records[0])]

    monkeypatch.setattr(ageing, "age", measured)
    arguments = [f"--dataset={corpus}", "--seeds=1", f"--workdir={tmp_path / 'runs'}"]
    arguments += [f"--results={tmp_path}", "--systems", "ehi-pq"]
    assert reproduce.main(["--table", "T6", "T1", *arguments]) == 1
    assert "T6 has a data set of its own halves" in capsys.readouterr().err
    assert reproduce.main(["--table=T6", *arguments]) == 0
    line = capsys.readouterr().out
    assert line.startswith("topics seed 0 kmeans-tree-opq half test-added: nDCG@10 0.")
    assert (tmp_path / "topics.jsonl").exists()
    assert reproduce.main(["--table=T6", *arguments[:-1], "opq"]) == 1
    assert "T6 has no cell of --systems=['opq']" in capsys.readouterr().err


def test_tables_write_t6_if_its_records_are_there(tmp_path, make_record, monkeypatch):
    from ehi.eval.records import write_records

    cell = {"budget": ageing.BUDGET, "variant": ageing.HALF}
    records = [
        make_record(system=system, split="test-added", seed=seed, **cell)
        for system in ageing.SYSTEMS
        for seed in range(2)
    ]
    write_records(tmp_path / "pydocs.jsonl", [make_record(), *records])
    assert tables.main([f"--results={tmp_path}", f"--out={tmp_path}"]) == 0
    written = (tmp_path / "pydocs" / "T6.md").read_text()
    assert "| ehi-pq | half | 0.500 ± 0.000 (0.800) | not run |" in written
