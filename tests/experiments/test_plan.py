"""The planning table, from constants that can be checked by hand."""

import json
import sys

import pytest

from experiments import benchmark

FILES = {
    "train": {
        "steps": {
            "tower": {"examples_per_second": 400},
            "whole": {"examples_per_second": 200},
        },
        "devices": 2, "hardware": "a laptop",
    },
    "encode": {
        "texts": 300, "tokens": 1000, "median_seconds": {"ours": 0.5}, "cpus": 2,
    },
    "build": {
        "documents": 10**7, "documents_per_second": 1e5, "index_mb": 1024.0,
        "parameters_mb": 24.0,
    },
    "search": {
        "mixture": {
            "documents": 10**6,
            "systems": [
                {"system": "ehi pq", "probes": 32, "latency_ms": {"p50": 9.0}},
                {"system": "ehi pq", "probes": 8, "latency_ms": {"p50": 2.0}},
                {"system": "faiss pq", "probes": 4, "latency_ms": {"p50": 1.0}},
            ],
        }
    },
    "step-search": {
        "documents": 10**6, "devices": 1, "seconds": 0.25, "predicted_seconds": 0.2,
    },
}  # fmt: skip


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """plan(names, *arguments) -> rows by their name, and all lines."""

    def plan(names, *arguments):
        paths = []
        for name in names:
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps(FILES[name]))
        command = ["benchmark", "plan", "--constants", *map(str, paths), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        benchmark.main()
        lines = capsys.readouterr().out.splitlines()
        cells = [[c.strip() for c in li.split("|")[1:-1]] for li in lines if "|" in li]
        return {row[0]: row[1:] for row in cells}, lines

    return plan


def test_every_cell_by_its_formula(plan):
    rows, lines = plan(FILES)
    assert rows["documents"] == ["1M", "10M", "100M", "1B"]
    # 100 examples/s on each of the two measured devices; one device trains.
    assert rows["training"][0] == "2.78 h (extrapolated)"
    assert rows["encoding"][0] == "17.8 h (extrapolated)"  # 128e6 / 2000 seconds
    assert rows["building"][:2] == ["10 s (extrapolated)", "1.67 min (measured)"]
    # 1000 MB of codes tenfold, 24 MB of leaves times the root of ten.
    assert rows["memory of the index"][1] == "1 GiB (measured)"
    assert rows["memory of the index"][2] == "9.84 GiB (extrapolated)"
    assert rows["search latency"][:2] == ["2 ms (measured)", "20 ms (extrapolated)"]
    assert rows["search in a training step"][:2] == [
        "250 ms (measured)", "2.5 s (extrapolated)",
    ]  # fmt: skip
    assert "- train: a laptop" in lines


def test_devices_and_texts_are_assumptions(plan):
    rows, lines = plan(
        FILES, "--train-devices=4", "--encode-devices=8", "--tokens-per-document=256",
        "--examples-per-document=3",
    )  # fmt: skip
    assert rows["training"][0] == "2.08 h (extrapolated)"
    assert rows["encoding"][0] == "4.44 h (extrapolated)"
    assert rows["search in a training step"][0] == "62.5 ms (extrapolated)"
    assert any("256 tokens a document, 3 training examples" in line for line in lines)


def test_what_no_file_measured_says_so(plan):
    rows, lines = plan(["build"])
    assert rows["training"] == ["not measured"] * 4
    assert lines[-1] == "- not measured: train, encode, search, step-search"


def test_growth_is_used_where_it_was_measured(plan, monkeypatch):
    growth = {
        "sizes": [{"documents": 10**5, "single_ms": 1.0},
                  {"documents": 10**6, "single_ms": 4.0}],
        "exponents": {"single_ms": 0.5},
    }  # fmt: skip
    monkeypatch.setitem(FILES, "growth", {"growth": growth})
    rows, _ = plan(["growth"])
    assert rows["search latency"][::2] == ["4 ms (measured)", "40 ms (extrapolated)"]


@pytest.mark.parametrize("content", ['{"a": 1}', "no JSON", '{"median_seconds": {}}'])
def test_files_of_no_benchmark_are_refused(plan, tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(
        ValueError, match="other.json is not (a JSON|of a known benchmark)"
    ):
        plan(["build"], str(path))


def test_two_files_of_one_benchmark_are_refused(plan, tmp_path):
    path = tmp_path / "again.json"
    path.write_text(json.dumps(FILES["build"]))
    with pytest.raises(ValueError, match="again.json is the second file of 'build'"):
        plan(["build"], str(path))
