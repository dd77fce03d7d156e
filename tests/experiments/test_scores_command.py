"""The score of quantised documents: from a config to the index, compared on dev."""

import json

import pytest
from topics import tiny

from ehi.index import open_index
from ehi.index.search.codes import SCORES
from experiments import main
from experiments.run import scores
from experiments.run.checks import check_config
from experiments.systems import SYSTEMS, score_of

QUANTISED = ("opq", "kmeans-tree-opq")


def test_every_system_has_a_score_that_a_config_overrides(corpus):
    changed = tiny(corpus, **{"leaves.score": "l2"})
    for system in SYSTEMS.values():
        own, other = (score_of(config, system) for config in (tiny(corpus), changed))
        assert (own, other) == ((system.score, "l2") if system.pq else ("ip", "ip"))
        assert own in SCORES


def test_scores_that_cannot_be_are_refused(corpus):
    with pytest.raises(ValueError, match="leaves.score is 'dot'; allowed: '', 'ip'"):
        check_config(tiny(corpus, **{"leaves.score": "dot"}))
    corrected = {"leaves.score": "corrected"}
    check_config(tiny(corpus, systems=("opq", "ehi-pq", "ehi"), **corrected))
    with pytest.raises(ValueError, match="lambda_rank of its phase jpq ranks by codes"):
        as_index = {"jpq.score": ""}  # train by the score of the index
        check_config(tiny(corpus, systems=("opq", "jpq"), **corrected, **as_index))
    check_config(tiny(corpus, systems=("opq", "jpq"), **corrected))
    with pytest.raises(ValueError, match="dense has no PQ leaves of ours"):
        scores.compare(tiny(corpus, systems=("dense",)), corpus / "none")


def test_scores_are_compared_and_reach_the_index(corpus, tmp_path, capsys):
    config = tiny(corpus, systems=QUANTISED, budgets=("flat-8x", "visit-50-8x"))
    config.leaves.score = "l2"
    found = scores.compare(config, tmp_path / "work")
    assert config.split == "test"  # the caller's config is not changed
    assert set(found["opq"]) == {(score, "flat-8x") for score in SCORES}
    budgets = ("flat-8x", "visit-50-8x")
    expected = {(score, budget) for score in SCORES for budget in budgets}
    assert set(found["kmeans-tree-opq"]) <= expected
    assert all(
        0 <= value <= 1 for values in found.values() for value in values.values()
    )
    lines = (tmp_path / "work/scores.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert len(written) == sum(map(len, found.values()))
    assert {t["options"] for t in written if t["kept"]} == {"l2"}
    shown = capsys.readouterr().out
    assert "| kmeans-tree-opq | flat-8x |" in shown and "| l2 (its own) |" in shown
    config.split = "dev"
    main.run(config, tmp_path / "work")  # the same experiment: nothing is trained again
    for folder in ("index", "indexes/opq-8x"):
        index = open_index(tmp_path / "work" / folder)
        assert index.score == "l2" and index.bytes_per_doc == index.code_bytes_per_doc
    config.leaves.score = "corrected"
    main.run(config, tmp_path / "again", checkpoint=tmp_path / "work")
    index = open_index(tmp_path / "again" / "index")
    assert index.score == "corrected"
    assert index.bytes_per_doc == index.code_bytes_per_doc + 1
