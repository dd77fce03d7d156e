"""The benchmark of questions in words, on a tiny tower."""

import json
import sys

import pytest
from topics import FIXTURES

from experiments import benchmark
from experiments.benchmarks import text


def test_what_is_asked_timed_and_written(corpus, tmp_path, monkeypatch, capsys):
    path = tmp_path / "text.json"
    command = [
        "text", f"--model={FIXTURES / 'minilm_tiny'}", f"--dataset={corpus}",
        "--words=6", "--queries=5", "--documents=50", "--leaves=4", "--beam=2",
        f"--json={path}",
    ]  # fmt: skip
    find, peer = text.importlib.util.find_spec, text.PEER.replace("-", "_")
    monkeypatch.setattr(
        text.importlib.util,
        "find_spec",
        lambda name: None if name == peer else find(name),
    )
    monkeypatch.setattr(sys, "argv", ["benchmark", *command])
    benchmark.main()
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found == json.loads(path.read_text())
    assert (found["queries"], found["dataset"], found["ratio"]) == (5, "topics", None)
    assert list(found["milliseconds"]) == ["search_text", "embedding"]
    for row in found["milliseconds"].values():
        assert 0 < row["p50"] <= row["p95"] <= row["p99"]
    assert "| search_text |" in captured.err


def test_questions_are_as_long_as_asked(corpus):
    questions = text.questions_of(str(corpus), 6, 7)
    assert len(questions) == 7 and {len(text.split()) for text in questions} == {6}
    assert len(text.questions_of(str(corpus), 6, 10**6)) == 48
    with pytest.raises(ValueError, match=r"no query of .*topics has --words=99"):
        text.questions_of(str(corpus), 99, 7)
