"""Indexes of libraries in a run: options chosen on queries not evaluated."""

import json

import numpy as np
import pytest
from topics import tiny

from ehi.eval.baselines.options import OPTIONS, TRIALS
from ehi.eval.records import read_records
from experiments import main
from experiments.run import library
from experiments.systems import SYSTEMS

pytestmark = pytest.mark.faiss


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("library")
    config = tiny(
        corpus,
        systems=("dense-zero-shot", "faiss-ivf", "faiss-hnsw", "linear-router", "lsh"),
        budgets=("flat", "visit-50", "flat-32x"),
        library_parent="dense-zero-shot",
    )
    main.run(config, folder)
    return folder


def test_the_best_trial_is_kept(finished):
    lines = (finished / "trials.jsonl").read_text().splitlines()
    trials = [json.loads(line) for line in lines]
    records = {r.system: r for r in read_records(finished / "results.jsonl")}
    for name in ("faiss-ivf", "faiss-hnsw", "linear-router", "lsh"):
        mine = [t for t in trials if t["system"] == name]
        assert len(mine) == TRIALS and len({t["options"] for t in mine}) == TRIALS
        (kept,) = [t for t in mine if t["kept"]]
        assert kept["ndcg@10"] == max(t["ndcg@10"] for t in mine)
        assert records[name].options == kept["options"]
        assert {t["queries"] for t in mine} <= {"dev", "train"}
    assert records["dense-zero-shot"].options is None


def test_budgets_of_libraries_are_met_on_other_queries(finished):
    records = {r.system: r for r in read_records(finished / "results.jsonl")}
    for name in ("faiss-ivf", "linear-router"):
        assert records[name].budget_queries == "train"
        assert 0.25 < records[name].docs_visited < 0.75, name


def test_a_router_learns_from_no_query_that_chooses():
    class Inputs:
        class dataset:
            query_ids = [f"q{i}" for i in range(6)]
            qrels = {"train": {f"q{i}": {"d": 1} for i in (0, 1, 2)}, "dev": {"q3": {}}}

        class training:
            pairs = {
                "labelled": (np.array([0, 1, 2]), None),
                "pseudo": (np.array([6, 7]), None),
            }

    assert library.choice_queries(Inputs, "test")[1].tolist() == [3]
    assert library.choice_queries(Inputs, "dev")[0] == "train"
    assert library.router_queries(Inputs, "test").tolist() == [6, 7]


def test_every_library_index_is_a_system():
    found = {name for name, system in SYSTEMS.items() if system.library}
    assert found == set(OPTIONS)
