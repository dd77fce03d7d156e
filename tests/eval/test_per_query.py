import numpy as np
import pytest

from ehi.eval.metrics import evaluate
from ehi.eval.records import aligned, read_run_values, read_values, write_values


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
