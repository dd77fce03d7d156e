"""T6: half of a small corpus is trained on, the rest is added or replaces documents."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from topics import tiny

from ehi.data.datasets import open_dataset
from ehi.eval.records import aligned, read_records, read_run_values
from experiments import reproduce, tables
from experiments.paper.ageing import ageing_table
from experiments.run import ageing
from experiments.run.prepare import inputs_of

BUDGET = "visit-50-8x"


def run_of(corpus, folder, variants=ageing.VARIANTS):
    """The records of the first variants, and (variant, system) -> parameters."""
    records, params, train = [], {}, ageing._train

    def kept(run, name):
        system = train(run, name)
        params[run.config.variant, name] = system.trained.params
        return system

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ageing, "_train", kept)
        for _, record in ageing.age(tiny(corpus), folder, budget=BUDGET):
            records.append(record)
            last = (ageing.SYSTEMS[-1], variants[-1])
            if variants != ageing.VARIANTS and (record.system, record.variant) == last:
                break
    return records, params


@pytest.fixture(scope="module")
def aged(corpus, tmp_path_factory):
    """A workdir with T6 of one seed, its records and its parameters."""
    folder = tmp_path_factory.mktemp("aged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EHI_CACHE", str(folder / "cache"))
        return folder / "run", *run_of(corpus, folder / "run")


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
    whole, added, old, *replaced = ageing.stages(kept, later)
    assert whole.asked.tolist() == list(range(100)) and whole.added is later
    assert added.asked.tolist() == added.added.tolist() == later.tolist()
    assert old.asked.tolist() == kept.tolist() and old.added is later
    assert len(added.gone) == len(old.gone) == 0
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
    assert known <= set(half.doc_ids) and half.corpus_sha256 != dataset.corpus_sha256
    assert 0 < len(half.qrels["test"]) < len(dataset.qrels["test"])
    asked = ageing.answered_by(dataset, "train", kept)
    assert asked == half.qrels["train"]
    others = ageing.answered_by(dataset, "train", later)
    assert len(asked) + len(others) == 32 and not set(asked) & set(others)


def test_every_stage_is_measured_for_both_systems_and_both_trainings(corpus, aged):
    _, records, _ = aged
    assert {(r.system, r.variant) for r in records} == {
        (system, variant) for system in ageing.SYSTEMS for variant in ageing.VARIANTS
    }
    dataset = open_dataset(corpus)
    for stage in ageing.stages(*ageing.halves(dataset)):
        asked = ageing.answered_by(dataset, "test", stage.asked)
        found = [r for r in records if r.split == f"test-{stage.name}"]
        assert len(found) == 12 * bool(asked)
        for record in found:
            assert record.unlabelled_queries == len(asked)
            assert record.budget_queries == "train" and record.docs_visited < 0.75
            # 8 leaves, and every document that is there now.
            size = 320 if stage.name in ("all", "added", "old") else 160
            assert record.leaf_load_max >= size / 8


def test_the_search_of_the_half_is_set_before_documents_come(aged):
    _, records, _ = aged
    for system in ageing.SYSTEMS:
        settings = {
            variant: {
                r.min_prob
                for r in records
                if (r.system, r.variant) == (system, variant)
            }
            for variant in ageing.VARIANTS
        }
        assert len(settings[ageing.HALF]) == 1
        for variant in (*ageing.RESET, ageing.WHOLE):  # set again for every index
            assert len(settings[variant]) > 1


def with_other_texts(corpus, folder):
    """The corpus with other texts where a half may not look.

    They are the documents that come later, the test queries, and the train queries
    whose answers come later; the judgements of these are left out.
    """
    dataset = open_dataset(corpus)
    later = {dataset.doc_ids[row] for row in ageing.halves(dataset)[1]}
    train = dataset.qrels["train"]
    unanswered = {query for query in train if set(train[query]) <= later}
    assert unanswered
    hidden = later | set(dataset.qrels["test"]) | unanswered
    other = shutil.copytree(corpus, folder)
    for name in ("corpus.jsonl", "queries.jsonl"):
        lines = [json.loads(line) for line in (corpus / name).open()]
        for line in lines:
            if line["_id"] in hidden:
                line |= {"text": "z y x w v z"} | (
                    {"title": "z"} if "title" in line else {}
                )
        (other / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    head, *rows = (corpus / "qrels" / "train.tsv").read_text().splitlines()
    rows = [row for row in rows if row.split("\t")[0] not in unanswered]
    (other / "qrels" / "train.tsv").write_text("\n".join([head, *rows]) + "\n")
    return other


def test_what_is_added_later_has_no_part_in_training_or_in_the_budget(
    corpus, aged, tmp_path
):
    other = with_other_texts(corpus, tmp_path / "topics")
    records, params = run_of(other, tmp_path / "run", (ageing.HALF,))
    _, of_whole, ours = aged
    for name in ageing.SYSTEMS:
        mine, theirs = params[ageing.HALF, name], ours[ageing.HALF, name]
        assert mine.keys() == theirs.keys()
        for array, value in mine.items():
            # Texts that are encoded in one batch change the last bits of each other.
            np.testing.assert_allclose(value, theirs[array], atol=1e-4)
    setting = {record.cell: record.min_prob for record in of_whole}
    records = [record for record in records if record.variant == ageing.HALF]
    assert {record.system for record in records} == set(ageing.SYSTEMS)
    for record in records:
        assert record.min_prob == pytest.approx(setting[record.cell], rel=1e-2)


def test_the_training_tables_of_a_half_are_made_of_its_documents(corpus):
    config, dataset = tiny(corpus), open_dataset(corpus)
    kept, later = ageing.halves(dataset)
    half = inputs_of(config, ageing.only(dataset, kept))
    texts = {dataset.documents[int(row)].content for row in later}
    assert not texts & {document.content for document in half.dataset.documents}
    training = half.training
    per_document = config.pseudo.per_document
    assert training.num_documents == len(kept) == len(half.document_tokens)
    assert len(training.pairs["pseudo"][0]) <= per_document * len(kept)
    assert len(training.pairs["synthetic"][0]) == config.pseudo.synthetic * len(kept)
    # A labelled query is one of train, and has an answer in the half.
    asked = {half.dataset.query_ids[row] for row in training.pairs["labelled"][0]}
    assert asked == set(ageing.answered_by(dataset, "train", kept))


def test_queries_of_a_stage_have_their_answers_there(corpus):
    dataset = open_dataset(corpus)
    kept, later = ageing.halves(dataset)
    here = {dataset.doc_ids[row] for row in later}
    asked = ageing.answered_by(dataset, "test", later)
    for query, judged in dataset.qrels["test"].items():
        relevant = {doc for doc, grade in judged.items() if grade > 0}
        assert (query in asked) == (relevant <= here)
    assert asked and not set(asked) & set(ageing.answered_by(dataset, "test", kept))


def test_repairs_train_on_from_the_half_for_a_tenth_of_the_steps(aged):
    folder = aged[0]
    configs = {
        variant: json.loads((folder / (variant or "whole") / "config.json").read_text())
        for variant in ageing.TRAININGS
    }
    for variant in ageing.REPAIRS:
        assert configs[variant]["start_from"] == str(folder / ageing.HALF)
        assert configs[variant]["start_from_steps"] == 0.1
        rows = map(json.loads, (folder / variant / "metrics.jsonl").open())
        # A tenth of 6 steps, at least 1.
        assert {row["run"]: row["step"] for row in rows} == {"dense": 1, "ehi-pq-8x": 1}
    assert "start_from" not in configs[ageing.HALF]
    assert "start_from" not in configs[ageing.WHOLE]


def test_what_was_measured_is_reused(corpus, aged, monkeypatch):
    folder, records, _ = aged
    monkeypatch.setattr(ageing, "measure", None)
    monkeypatch.setattr("experiments.run.train.run_phase", None)
    again = [r for _, r in ageing.age(tiny(corpus), folder, budget=BUDGET)]
    assert [r.cell for r in again] == [r.cell for r in records]


def test_the_table_has_a_column_for_each_stage(aged, monkeypatch):
    folder, records, _ = aged
    monkeypatch.setattr("experiments.paper.ageing.BUDGET", BUDGET)
    values = {}
    for part in map(str, ageing.TRAININGS):
        part = part or "whole"
        values |= read_run_values(
            folder / part / "trec", read_records(folder / part / "results.jsonl")
        )
    table = ageing_table("topics", "test", records, aligned(values))
    assert table.header == ("system", "trained on", "visited %", *ageing.STAGES)
    labels = [row[:2] for row in table.rows]
    assert labels[:4] == [
        ("kmeans-tree-opq", "half"),
        ("ehi-pq", "half"),
        ("kmeans-tree-opq", "half, reset, cosine"),
        ("ehi-pq", "half, reset, cosine"),
    ]
    row_of = dict(zip(labels, table.rows, strict=True))
    half, anew, lost = (
        row_of["ehi-pq", kind] for kind in ("half", "all, anew", "half minus anew")
    )
    column = table.header.index("replaced-50")
    assert lost[column].value == pytest.approx(half[column].value - anew[column].value)
    assert 0 <= half[column].value <= 1 and 0 < half[2].value < 100
    assert ageing_table("topics", "dev", records, {}) is None


def test_a_joint_index_that_loses_more_is_marked(make_record):
    """Each of 40 queries: the separate index loses .1 by ageing, the joint one .3."""
    records, values = [], {}
    for system, lost in (("kmeans-tree-opq", 0.1), ("ehi-pq", 0.3)):
        for variant in (ageing.HALF, ageing.WHOLE):
            record = make_record(
                system=system, variant=variant, split="test-added",
                budget=ageing.BUDGET, ndcg_at_10=0.6 - lost * bool(variant),
            )  # fmt: skip
            records.append(record)
            values[record.cell] = np.full(40, record.ndcg_at_10)
    table = ageing_table("pydocs", "test", records, values)
    row_of = {row[:2]: row for row in table.rows}
    column = table.header.index("added")
    lost = row_of["ehi-pq", "half minus anew"][column]
    assert (lost.value, lost.sign) == (pytest.approx(-0.3), "‡")
    assert row_of["kmeans-tree-opq", "half minus anew"][column].sign == ""
    assert row_of["ehi-pq", "all, anew"][column].sign == ""
    assert row_of["ehi-pq", "half, repaired"][column] == "not run"


def test_t6_is_reproduced_alone_and_shown_among_the_tables(
    aged, corpus, tmp_path, monkeypatch, capsys
):
    folder, records, _ = aged
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
    assert line.startswith("topics seed 0 kmeans-tree-opq half test-all: nDCG@10 0.")
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
    assert (
        "| ehi-pq | half | 9.9 | not run | 0.500 ± 0.000 (0.800) | not run" in written
    )
