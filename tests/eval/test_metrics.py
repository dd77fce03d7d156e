import gzip
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehi.eval.metrics import (
    evaluate,
    means,
    read_run,
    run_from_hits,
    strictly_decreasing,
    write_run,
)


def test_measures_match_values_computed_by_hand():
    docs = {f"d{rank}": float(20 - rank) for rank in range(1, 13)}
    values = evaluate({"q": docs}, {"q": {"d2": 2, "d12": 1, "missing": 1}})
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert means(values) == pytest.approx(
        {
            "ndcg@10": 2 / math.log2(3) / ideal,
            "rr@10": 1 / 2,
            "recall@10": 1 / 3,
            "recall@100": 2 / 3,
            "recall@1000": 2 / 3,
        }
    )


def test_rank_11_is_outside_rr_at_10():
    docs = {f"d{rank}": float(20 - rank) for rank in range(1, 13)}
    assert means(evaluate({"q": docs}, {"q": {"d11": 1}}))["rr@10"] == 0


def test_query_without_hits_counts_as_zero_and_one_without_relevant_is_left_out():
    run = {"found": {"a": 1.0}, "no relevant": {"a": 1.0}, "not in split": {"a": 1.0}}
    qrels = {"lost": {"a": 1}, "found": {"a": 1}, "no relevant": {"a": 0}}
    values = evaluate(run, qrels)
    assert values["query_id"].tolist() == ["found", "lost"]
    assert values["ndcg@10"].tolist() == [1, 0]
    assert means(values)["rr@10"] == 0.5


def test_no_relevant_document_at_all_is_an_error():
    with pytest.raises(ValueError, match="no query has a relevant document"):
        evaluate({"q": {"a": 1.0}}, {"q": {"a": 0}})


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40))
def test_scores_strictly_decrease_and_move_by_units_in_the_last_place(scores):
    scores = np.sort(np.float32(scores))[::-1]
    nudged = strictly_decreasing(scores)
    assert (np.diff(nudged) < 0).all()
    # Never upwards, and by no more than one unit for each score before.
    units = len(scores) * np.spacing(np.float32(1))
    assert ((scores - nudged >= 0) & (scores - nudged <= units)).all()


def test_scores_without_ties_are_kept():
    scores = np.float32([3, 2, 1])
    np.testing.assert_array_equal(strictly_decreasing(scores), scores)


@pytest.mark.parametrize("relevant, rank", [("a", 1), ("c", 2), ("b", 3)])
def test_trec_eval_keeps_the_order_of_tied_hits(tmp_path, relevant, rank):
    # By itself trec_eval would order the ties c, b, a.
    ids = np.array([["a", "c", "b"]], dtype=object)
    run = run_from_hits(["q"], ids, np.full((1, 3), 0.1, np.float32))
    write_run(tmp_path / "x.run", run)
    for source in (run, read_run(tmp_path / "x.run")):
        values = evaluate(source, {"q": {relevant: 1}})
        assert values["rr@10"][0] == pytest.approx(1 / rank)
        assert values["ndcg@10"][0] == pytest.approx(1 / math.log2(rank + 1))


def test_padding_is_dropped_and_integer_ids_become_names():
    ids = np.array([[7, 3, -1], [-1, -1, -1]])
    scores = np.array([[0.5, 0.25, -np.inf], [-np.inf] * 3])
    run = run_from_hits(["q", "empty"], ids, scores)
    assert run == {"q": {"7": 0.5, "3": 0.25}, "empty": {}}


def test_number_of_query_ids_must_fit():
    with pytest.raises(ValueError, match="1 query ids for 2 rows"):
        run_from_hits(["q"], np.zeros((2, 1), int), np.zeros((2, 1)))


@pytest.mark.parametrize("name", ["x.run", "x.run.gz"])
def test_run_file_round_trip(tmp_path, name):
    run = {"q 1": {"100% of\tit": 0.1, "naïve": -0.25}, "q2": {"a": 1e-9}}
    run = {
        q: {d: float(np.float32(s)) for d, s in docs.items()} for q, docs in run.items()
    }
    write_run(tmp_path / name, run)
    found = read_run(tmp_path / name)
    assert list(found["q 1"]) == list(run["q 1"])
    for query_id, docs in run.items():
        assert {d: np.float32(s) for d, s in found[query_id].items()} == docs


def test_run_file_is_trec_format_and_reproducible(tmp_path):
    write_run(tmp_path / "a.run", {"q": {"d": 0.5, "e": 0.25}})
    lines = (tmp_path / "a.run").read_text().splitlines()
    assert lines == ["q Q0 d 1 0.5 ehi", "q Q0 e 2 0.25 ehi"]
    for name in ("a.run.gz", "b.run.gz"):
        write_run(tmp_path / name, {"q": {"d": 0.5}})
    assert (tmp_path / "a.run.gz").read_bytes() == (tmp_path / "b.run.gz").read_bytes()
    assert (
        gzip.decompress((tmp_path / "a.run.gz").read_bytes()) == b"q Q0 d 1 0.5 ehi\n"
    )


@pytest.mark.parametrize("line", ["q Q0 d 1 0.5", "q Q0 d 1 high ehi"])
def test_bad_run_line_is_named(tmp_path, line):
    (tmp_path / "x.run").write_text(f"q Q0 d 1 0.5 ehi\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_run(tmp_path / "x.run")
