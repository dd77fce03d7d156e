"""The benchmark of the search inside a step, on a tiny table."""

import json
import sys
from types import SimpleNamespace

import pytest

from experiments import benchmark
from experiments.benchmarks.step_search import predict

SMALL = ("--documents=300", "--bytes=4", "--dim=16", "--batch=3", "--top-k=10",
         "--chunk=64", "--repeats=2")  # fmt: skip


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", "step-search", *arguments])
    benchmark.main()


def test_what_is_measured_stands_beside_what_is_predicted(monkeypatch, capsys):
    run(monkeypatch, *SMALL)
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert len(found["all_seconds"]) == 2 and min(found["all_seconds"]) > 0
    assert found["stated_bytes"] == {
        "table": 1200, "chunk": 64 * 4 * (16 + 3 + 4), "result": 16 * 3 * 10,
    }  # fmt: skip
    # Queries, codebooks and the table.
    arguments = 4 * 3 * 16 + 4 * 4 * 256 * 4 + 1200
    assert found["memory_bytes"]["arguments"] == pytest.approx(arguments, rel=0.05)
    parts = found["predicted_parts"]
    assert found["predicted_seconds"] == pytest.approx(sum(parts.values()))
    assert "| milliseconds |" in captured.err


def test_prediction_by_hand():
    args = SimpleNamespace(batch=32, documents=1000, dim=768)
    found = predict(args, 2, flops_rate=1e6, gather_rate=1e3)
    assert found["predicted_parts"] == {
        "products": 2 * 32 * 1000 * 768 / 2e6,
        "gathers": 4 * 1000 * 768 / 2e3,
    }


def test_bytes_that_do_not_divide_the_width_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="--dim=18 is no multiple of --bytes=4"):
        run(monkeypatch, *SMALL, "--dim=18")
