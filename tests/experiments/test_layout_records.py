"""One corpus in every layout gives equal records."""

import dataclasses

import pytest
from layouts import MAKE, NEEDS
from topics import tiny

from ehi.eval.records import read_records
from experiments import main

MEASURED = ("second", "latency", "qps")  # fields that time decides


def records_of(dataset, workdir):
    """The fields of each record of a short run, without times and hash of the path."""
    config = tiny(dataset, systems=("dense",), budgets=("flat",))
    main.run(config, workdir)
    return [
        {
            name: value
            for name, value in dataclasses.asdict(record).items()
            if not any(word in name for word in MEASURED) and name != "config_hash"
        }
        for record in read_records(workdir / "results.jsonl")
    ]


def test_one_corpus_in_every_layout_gives_equal_records(corpus, tmp_path):
    for name in NEEDS.values():
        pytest.importorskip(name)
    (expected,) = records_of(corpus, tmp_path / "beir")
    index_bytes = expected.pop("index_bytes")
    for layout, make in MAKE.items():
        folder = make(corpus, tmp_path / layout / "topics")
        (found,) = records_of(folder, tmp_path / f"run-{layout}")
        # The index names the folder that its documents came from.
        assert abs(found.pop("index_bytes") - index_bytes) < 200
        differ = {n: (found[n], expected[n]) for n in found if found[n] != expected[n]}
        assert differ == {}, layout
