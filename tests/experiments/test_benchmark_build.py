import json
import os
import sys

import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import build

SMALL = (
    "--n=3000", "--dim=16", "--branching=8", "--subspaces=4", "--shards=3", "--beam=2",
)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) -> what was printed."""

    def run(*arguments):
        command = ["benchmark", "build", *SMALL, f"--folder={tmp_path}", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        benchmark.main()
        assert not os.listdir(tmp_path)
        return json.loads(capsys.readouterr().out)

    return run


def test_build_is_measured_and_removed(run):
    result = run("--spill=2", "--threads=1")
    assert (result["documents"], result["leaves"], result["code_bytes"]) == (
        3000,
        64,
        4,
    )
    assert 2 * 3000 / 64 <= result["leaf_load_max"] < 3000
    parts = result["route_seconds"] + result["encode_and_write_seconds"]
    assert 0 < result["making_seconds"] < parts <= result["seconds"]
    assert 0.5 < result["beam_is_exact"] <= 1
    assert run("--beam=0")["beam_is_exact"] == 1


def test_shards_make_the_same_documents_again():
    tree = build.make_tree(3, 8, np.random.default_rng(0))
    shard = build.Synthetic(tree, 0).shard(2, 9000)
    first, second = (np.concatenate(list(shard())) for _ in range(2))
    assert first.shape == (9000, 8) and (first == second).all()
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    other = build.Synthetic(tree, 0).shard(1, 9000)
    assert (next(iter(other())) != first[:8192]).any()
