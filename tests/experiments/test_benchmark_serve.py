"""The load test of the service: what counts as wrong, and all of it on a tiny index."""

import json
import sys

import numpy as np
import pytest
from topics import FIXTURES

from ehi.index import build_index, save_index
from experiments import benchmark
from experiments.benchmarks import serve


@pytest.mark.parametrize(
    ("ids", "scores", "expected"),
    [
        (["a", "b"], [0.5, 0.4], "right"),
        (["a", "b"], [0.5000001, 0.4], "right"),
        (["b", "a"], [0.5, 0.4], "swapped"),
        (["a", "c"], [0.5, 0.4], "swapped"),
        (["a", "b"], [0.5, 0.41], "wrong"),
        (["a"], [0.5], "wrong"),
        ([], [], "wrong"),
    ],
)
def test_what_is_wrong(ids, scores, expected):
    pairs = zip(ids, scores, strict=True)
    result = {"hits": [{"id": id, "score": score} for id, score in pairs]}
    assert serve.verdict(result, ([["a", "b"]], [[0.5, 0.4]]), 0) == expected


@pytest.mark.slow
def test_all_of_it(corpus, tmp_path, monkeypatch, capsys):
    pytest.importorskip("starlette", reason="needs the extra: pip install '.[serve]'")
    x = np.random.default_rng(0).standard_normal((90, 32)).astype(np.float32)
    index = build_index(
        x, range(90), tree={"kind": "per_node", "nodes": [x[None, :5]], "scale": 1.0},
        encoder={"tower": str(FIXTURES / "bert_tiny"), "query_length": 12},
    )  # fmt: skip
    save_index(index, tmp_path / "index")
    command = [
        "serve", f"--index={tmp_path / 'index'}", f"--dataset={corpus}", "--words=6",
        "--requests=40", "--seconds=2", "--clients=4", "--list=8", "--rounds=2",
        f"--json={tmp_path / 'serve.json'}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["benchmark", *command])
    benchmark.main()
    found = json.loads((tmp_path / "serve.json").read_text())
    for row in (*found["phases"].values(), found["compaction"]):
        assert row["requests"] > 0 and (row["wrong"], row["lost"]) == (0, 0)
        assert 0 < row["milliseconds"]["p50"] <= row["milliseconds"]["p99"]
    assert found["compaction"]["generations_written"] == 6
    assert found["compaction"]["generations_seen"] > 1
    assert "| vector together |" in capsys.readouterr().err
