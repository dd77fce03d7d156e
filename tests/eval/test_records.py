import json

import numpy as np
import pytest

from ehi.eval.metrics import evaluate
from ehi.eval.records import (
    Cell,
    Record,
    aligned,
    read_records,
    read_run_values,
    read_values,
    write_records,
    write_values,
)


def test_round_trip_rounds_floats_to_six_digits(tmp_path, make_record):
    write_records(tmp_path / "r.jsonl", [make_record(ndcg_at_10=0.123456789)])
    (found,) = read_records(tmp_path / "r.jsonl")
    assert found == make_record(ndcg_at_10=0.123457)
    assert json.loads((tmp_path / "r.jsonl").read_text())["ndcg@10"] == 0.123457


def test_same_cell_is_replaced_in_place_and_others_are_kept(tmp_path, make_record):
    path = tmp_path / "r.jsonl"
    write_records(path, [make_record(budget="visit-5"), make_record()])
    write_records(path, [make_record(budget="visit-5", beam=3), make_record(seed=1)])
    found = [(r.budget, r.seed, r.beam) for r in read_records(path)]
    assert found == [("visit-5", 0, 3), ("visit-10", 0, 6), ("visit-10", 1, 6)]


@pytest.mark.parametrize("field", Cell._fields)
def test_every_part_of_the_cell_distinguishes(tmp_path, make_record, field):
    other = make_record(**{field: 1 if field == "seed" else "other"})
    write_records(tmp_path / "r.jsonl", [make_record(), other])
    assert len(read_records(tmp_path / "r.jsonl")) == 2
    assert other.cell.stem != make_record().cell.stem


def test_stem_names_the_cell_without_an_empty_variant(make_record):
    assert make_record().cell.stem == "ehi.pydocs.test.0.visit-10"
    stem = make_record(variant="finetune").cell.stem
    assert stem == "ehi.finetune.pydocs.test.0.visit-10"


def corrupt(record, change):
    data = record.to_json()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data.pop("beam"), "missing field 'beam'"),
        (lambda data: data.update(bean=3), "unknown field 'bean'"),
        (lambda data: data.update(seed="0"), "seed: expected int, found '0'"),
        (lambda data: data.update(threads=True), "threads: expected int, found True"),
        (lambda data: data.update({"ndcg@10": None}), "ndcg@10: expected float"),
        (lambda data: data.update(qps_batch=float("nan")), "qps_batch: .*finite"),
    ],
)
def test_bad_field_is_named_with_its_line(tmp_path, make_record, change, message):
    lines = [json.dumps(make_record().to_json()), corrupt(make_record(seed=1), change)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"r.jsonl, line 2: {message}"):
        read_records(tmp_path / "r.jsonl")


@pytest.mark.parametrize("line", [b'{"system": ', b"\xff", b"[]", b""])
def test_a_line_that_is_no_json_object_is_named(tmp_path, line):
    (tmp_path / "r.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match="line 1"):
        read_records(tmp_path / "r.jsonl")


def test_repeated_cell_is_refused_with_both_lines(tmp_path, make_record):
    line = json.dumps(make_record().to_json())
    (tmp_path / "r.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match="line 2: same cell as line 1"):
        read_records(tmp_path / "r.jsonl")


def test_a_damaged_file_is_not_overwritten(tmp_path, make_record):
    (tmp_path / "r.jsonl").write_text('{"half": ')
    with pytest.raises(ValueError, match="line 1"):
        write_records(tmp_path / "r.jsonl", [make_record()])
    assert (tmp_path / "r.jsonl").read_text() == '{"half": '


def test_what_a_library_does_not_count_may_be_none(make_record):
    record = make_record(docs_visited=None, beam=None, leaf_load_max=None)
    assert Record.from_json(record.to_json()) == record


def test_run_values_are_those_of_evaluate(tmp_path, make_record):
    per_query = evaluate({"b": {"x": 1.0}}, {"a": {"x": 1}, "b": {"x": 1}})
    np.save(tmp_path / f"{make_record().cell.stem}.npy", per_query)
    found = read_run_values(tmp_path, [make_record(), make_record(seed=1)])
    assert list(found) == [make_record().cell]
    query_ids, ndcg = found[make_record().cell]
    assert query_ids.tolist() == ["a", "b"] and ndcg.tolist() == [0, 1]


def test_store_keeps_old_cells_and_replaces_equal_ones(tmp_path, make_record):
    path, ids = tmp_path / "pydocs.per_query.npz", np.array(["a", "b"])
    ours, theirs = make_record().cell, make_record(variant="paper", seed=2).cell
    write_values(path, {ours: (ids, np.array([0.1, 0.2]))})
    write_values(path, {theirs: (ids, np.zeros(2)), ours: (ids, np.ones(2))})
    found = aligned(read_values(path))
    assert set(found) == {ours, theirs}
    assert found[ours].tolist() == [1, 1] and found[theirs].tolist() == [0, 0]


def test_no_store_is_an_empty_one(tmp_path):
    assert read_values(tmp_path / "none.npz") == {}


def test_other_queries_are_refused_and_nothing_is_lost(tmp_path, make_record):
    path = tmp_path / "pydocs.per_query.npz"
    write_values(path, {make_record().cell: (np.array(["a"]), np.ones(1))})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="other queries"):
        write_values(path, {make_record(seed=1).cell: (np.array(["b"]), np.ones(1))})
    assert path.read_bytes() == before
    # Another split has its own queries.
    write_values(path, {make_record(split="dev").cell: (np.array(["b"]), np.ones(1))})
    assert len(read_values(path)) == 2
