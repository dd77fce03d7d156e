"""A writer killed at any instant leaves an index that holds all it acknowledged."""

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import index_reference as reference
import numpy as np
import pytest
from killed_writer import vector_of

from ehi.eval import provenance
from ehi.index import build_index, open_index, save_index

WIDTH = 8


def apply(state, line):
    """The documents after an operation: id -> version of its embedding."""
    state = dict(state)
    if line["begin"] == "delete":
        for name in line["ids"]:
            del state[name]
    else:
        state |= dict(zip(line["ids"], line["versions"], strict=True))
    return state


def run_and_kill(path, seed, delay):
    """What the writer said until it was killed `delay` seconds after it was ready."""
    here = Path(__file__).parent
    command = [sys.executable, str(here / "killed_writer.py"), str(path), str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1])}
    with subprocess.Popen(
        [*command, str(WIDTH)], stdout=subprocess.PIPE, env=environment
    ) as writer:
        first = writer.stdout.readline()
        assert b"ready" in first, first
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        said = writer.stdout.read().splitlines()
    return [json.loads(line) for line in said]


def found(index):
    """id -> whether its own embedding finds it, of all documents that can be found."""
    rows = np.arange(index.contents.num_rows)
    if index.contents.deleted is not None:
        rows = rows[~index.contents.deleted]
    return {int(name) for name in index.contents.external_ids(rows)}


def check_state(index, state):
    assert found(index) == set(state)
    names = sorted(state)
    vectors = np.stack([vector_of(state[name], WIDTH) for name in names])
    hits = index.search(vectors, len(names), beam=index.num_leaves)
    for name, query, ids, scores in zip(
        names, vectors, hits.ids, hits.scores, strict=True
    ):
        score = scores[ids.tolist().index(name)]
        np.testing.assert_allclose(score, query @ query, rtol=1e-5)


def kill_many(tmp_path, times, seed=0):
    """Kills a writer `times` times, each going on where the last one was stopped."""
    rng = random.Random(seed)
    state = {i: i for i in range(60)}
    vectors = np.stack([vector_of(i, WIDTH) for i in range(60)])
    tree = reference.make_tree("per_node", 1, 5, WIDTH, np.random.default_rng(1))
    save_index(build_index(vectors, range(60), tree=tree), tmp_path / "index")
    during, operations = {}, 0
    for turn in range(times):
        said = run_and_kill(tmp_path / "index", turn, rng.uniform(0, 0.12))
        states = [state]
        for line in said:
            if "begin" in line:
                states = [state, apply(state, line)]
            else:
                operations += 1
                state = states[-1]
                states = [state]
        if len(states) == 2:
            step = said[-1]["begin"]
            during[step] = during.get(step, 0) + 1
        index = open_index(tmp_path / "index", verify=True)
        # What was begun and not acknowledged may be there, whole, or not at all.
        names = found(index)
        versions = [s for s in states if set(s) == names]
        assert versions, (names, [set(s) for s in states])
        for candidate in versions:
            try:
                check_state(index, candidate)
                state = candidate
                break
            except AssertionError:
                if candidate is versions[-1]:
                    raise
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]
    index.compact()
    save_index(index, tmp_path / "index")
    kept = [p for p in (tmp_path / "index").rglob("*") if p.is_file()]
    again = open_index(tmp_path / "index", verify=True)
    assert again.index_bytes == sum(file.stat().st_size for file in kept)
    check_state(again, state)
    return {"kills": times, "operations": operations, "killed during": during}


def test_a_killed_writer_loses_nothing_it_acknowledged(tmp_path):
    summary = kill_many(tmp_path, times=20)
    assert sum(summary["killed during"].values()) > 5, summary


@pytest.mark.slow
def test_a_writer_killed_many_times_loses_nothing(tmp_path):
    """Prints a record of each seed with `python -m pytest -m slow -s -n 0`."""
    made_by = {
        "command": "python -m pytest -m slow -s -n 0 tests/index/test_killed.py",
        "git_commit": provenance.git_commit(Path(__file__).parent),
        "hardware": provenance.hardware(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        counts = kill_many(tmp_path / str(seed), times=100, seed=seed)
        print(json.dumps({"seed": seed} | counts | made_by))
