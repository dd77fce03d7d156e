import json

import pytest

from ehi.train.logs import MetricLog


def steps_of(path):
    return [
        (row["run"], row["step"])
        for row in map(json.loads, path.read_text().split("\n")[:-1])
    ]


def test_rewind_forgets_what_will_be_redone_and_half_written_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path)
    for step in (5, 10, 15):
        log.write("a", "joint", step, {"loss": 1.0, "seconds": 2.0})
    log.write("b", "joint", 15, {"loss": 1.0, "seconds": 3.0})
    with path.open("a") as file:
        file.write('{"run": "a", "phase": "jo')
    log.rewind("a", "joint", 10)
    assert steps_of(path) == [("a", 5), ("a", 10), ("b", 15)]
    assert log.seconds("a", "joint") == 4.0
    assert log.seconds("b", "joint") == 3.0
    assert log.seconds("a", "dense") == 0.0


def test_times_are_read_past_a_half_written_line(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.write("ehi", "joint", 2, {"seconds": 1.5, "examples_per_second": 10.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"run": "ehi", "ph')
    assert log.seconds("ehi", "joint") == 1.5
    assert log.examples_per_second("ehi", "joint") == 10.0


def test_nothing_logged_took_no_time(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.rewind("a", "joint", 0)
    assert log.seconds("a", "joint") == 0.0


def test_tensorboard_without_the_extra_names_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"\[tensorboard\]"):
        MetricLog(tmp_path / "metrics.jsonl", tmp_path / "events")
