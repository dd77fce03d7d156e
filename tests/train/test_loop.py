import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ehi.encode.embed import embed
from ehi.index import build_index
from ehi.model.export import index_arrays
from ehi.train import checkpoint
from ehi.train.logs import MetricLog
from ehi.train.loop import _Batches, run_phase
from ehi.train.negatives import mine_from_leaves
from ehi.train.phase import Phase

PHASE = Phase(
    steps=12, batch_size=12, pool=20,
    losses={"semantic": 1.0, "distill": 1.0, "route_distill": 1.0, "codebook": 1.0},
    rates={"head": 1e-3, "router": 1e-2, "query_router": 1e-2, "quantiser": 1e-2},
    sources={"labelled": 0.75, "documents": 0.25}, source_weights={},
    refresh=5, mined_per_query=1, mined_kept=4, mined_beam=2,
    revive_every=4, log_every=3, checkpoint_every=4, warmup=0, weight_decay=0.0,
)  # fmt: skip


def train(tiny, tiny_model, folder, phase=PHASE, **changes):
    data, tables = tiny
    graphdef, params = tiny_model()

    def mine(params, rows):
        documents = embed(graphdef, params, "documents", tables["features_documents"])
        queries = embed(graphdef, params, "queries", tables["features_queries"])
        index = build_index(documents, np.arange(60), **index_arrays(graphdef, params))
        return mine_from_leaves(
            index, queries[rows], data, per_query=4, beam=2, rows=rows
        )

    return run_phase(
        graphdef, params, data, tables, dataclasses.replace(phase, **changes),
        run="tiny", name="joint", seed=0, directory=folder / "checkpoints",
        log=MetricLog(folder / "metrics.jsonl"), mine=mine,
    )["params"]  # fmt: skip


class Cut(Exception):
    pass


def test_the_share_of_refreshing_is_logged(tiny, tiny_model, tmp_path):
    train(tiny, tiny_model, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    shares = {row["step"]: row["refresh_share"] for row in map(json.loads, lines)}
    # Mined before steps 1, 6 and 11; logged every 3 steps and with a checkpoint.
    mined = [step for step, share in shares.items() if share > 0]
    assert mined == [3, 6, 12]
    assert all(0 <= share < 1 for share in shares.values())


@pytest.mark.parametrize("cut_at", [3, 7, 11])
def test_resumed_equals_uninterrupted(tiny, tiny_model, tmp_path, monkeypatch, cut_at):
    whole = train(tiny, tiny_model, tmp_path / "whole")
    from ehi.train import loop

    make_batch, calls = loop.make_batch, []

    def cutting(*args, step, **options):
        calls.append(step)
        if step == cut_at and len(calls) == cut_at + 1:
            raise Cut
        return make_batch(*args, step=step, **options)

    monkeypatch.setattr(loop, "make_batch", cutting)
    with pytest.raises(Cut):
        train(tiny, tiny_model, tmp_path / "cut")
    resumed = train(tiny, tiny_model, tmp_path / "cut")
    assert calls[cut_at + 1] == cut_at // 4 * 4  # from the last checkpoint
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert np.array_equal(whole[name], resumed[name]), name
    lines = [
        [
            (row["step"], row["loss"])
            for row in map(json.loads, (tmp_path / folder / "metrics.jsonl").open())
        ]
        for folder in ("whole", "cut")
    ]
    assert lines[0] == lines[1]


def test_a_complete_phase_is_not_trained_again(tiny, tiny_model, tmp_path, monkeypatch):
    first = train(tiny, tiny_model, tmp_path)
    from ehi.train import loop

    monkeypatch.setattr(loop, "make_batch", None)  # calling it would fail
    again = train(tiny, tiny_model, tmp_path)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_non_finite_values_stop_the_run_and_name_the_step(tiny, tiny_model, tmp_path):
    data, tables = tiny
    poisoned = tables | {"teacher_documents": tables["teacher_documents"] * np.nan}
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        train((data, poisoned), tiny_model, tmp_path)
    assert not (tmp_path / "checkpoints").exists() or not any(
        path.name == "12" for path in (tmp_path / "checkpoints").iterdir()
    )


def test_a_checkpoint_of_another_model_is_refused(tiny, tiny_model, tmp_path):
    train(tiny, tiny_model, tmp_path)

    def wider(**options):
        return tiny_model(head_hidden=9, **options)

    with pytest.raises(ValueError, match=r"does not fit .*head/w_in is .* there, "):
        train(tiny, wider, tmp_path)


def test_a_damaged_or_missing_checkpoint_is_named(tmp_path):
    state = {"a": jnp.ones((4, 3))}
    with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path}/none"):
        checkpoint.restore(tmp_path / "none", state)
    checkpoint.save(tmp_path / "some", 3, state)
    for path in (tmp_path / "some" / "3").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="some is damaged .remove it"):
        checkpoint.restore(tmp_path / "some", state)


CHILD = """
import functools, pathlib, sys
sys.path[:0] = sys.argv[2:]
import numpy as np, test_loop, tiny
folder = pathlib.Path(sys.argv[1])
data = tiny.make_tiny()
make = functools.partial(tiny.make_model, data[1], folder / "starts")
params = test_loop.train(data, make, folder, steps=60)
np.savez(folder / "end.npz", **{n.replace("/", "|"): v for n, v in params.items()})
"""


def _child(folder: Path):
    folder.mkdir(exist_ok=True)
    here = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, str(folder), str(here), str(here.parent)]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def _kill_and_compare(tmp_path, kills: int, seed: int):
    """A run that is killed at random moments ends with the bits of one that is not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    started = time.monotonic()
    assert _child(whole).wait(timeout=300) == 0
    length = time.monotonic() - started
    rng = np.random.default_rng(seed)
    killed = 0
    while killed < kills:
        resumes, started = cut.exists(), time.monotonic()
        child = _child(cut)
        try:
            child.wait(timeout=length * rng.uniform(0.3, 0.98))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            killed += 1
        else:  # it ended before the kill: start again, as the first run also compiled
            length = length if resumes else time.monotonic() - started
            shutil.rmtree(cut)
    assert _child(cut).wait(timeout=300) == 0
    with np.load(whole / "end.npz") as one, np.load(cut / "end.npz") as two:
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_killed_runs_end_with_the_same_bits(tmp_path):
    _kill_and_compare(tmp_path, kills=2, seed=0)


@pytest.mark.slow
def test_many_kills_end_with_the_same_bits(tmp_path):
    _kill_and_compare(tmp_path, kills=15, seed=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": {"semantics": 1.0}}, "unknown loss 'semantics'"),
        ({"losses": {"semantic": -1.0}}, "must be >= 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"pool": 3}, "cannot hold the positives"),
        ({"sources": {"labels": 1.0}}, "unknown source 'labels'"),
        ({"refresh": 0}, "needs refresh"),
        ({"rates": {"tree": 1.0}}, "unknown group 'tree'"),
    ],
)
def test_bad_phases_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PHASE, **change)


def test_an_unknown_field_of_a_phase_is_refused():
    with pytest.raises(ValueError, match="unknown field 'step'"):
        Phase.from_mapping({"step": 3})


@pytest.mark.parametrize("tower", [False, True])
def test_rows_that_travel_with_the_batch_give_the_same_bits(
    tiny, tiny_model, tmp_path, tower
):
    data, tables = tiny
    options = {"tower": True} if tower else {}
    lengths, changes = (0, 0), {"refresh": 0, "mined_per_query": 0}
    changes["losses"] = PHASE.losses | {"anchor": 0.5, "query_anchor": 0.5}
    if tower:
        lengths, changes["encoded"] = (6, 8), 4
        tables = tables | {
            f"cached_{side}": tables[f"features_{side}"]
            for side in ("queries", "documents")
        }
    graphdef, params = tiny_model(**options)

    def run(name, on_device, on_host):
        return run_phase(
            graphdef, params, data, on_device, dataclasses.replace(PHASE, **changes),
            run="tiny", name="joint", seed=0, directory=tmp_path / name,
            lengths=lengths, log=MetricLog(tmp_path / f"{name}.jsonl"),
            host_tables=on_host,
        )["params"]  # fmt: skip

    device = run("device", tables, None)
    for name, table in tables.items():
        np.save(tmp_path / f"{name}.npy", table)
    files = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in tables}
    host = run("host", {}, files)
    for name, value in device.items():
        np.testing.assert_array_equal(np.asarray(host[name]), np.asarray(value), name)


def test_a_batch_is_made_ahead_but_not_over_a_mining():
    made, threads = [], set()

    def make(step, mined):
        made.append((step, mined))
        threads.add(threading.get_ident())
        return step

    with _Batches(make, ahead=True) as batches:
        assert batches.get(0, "a", follows=True) == 0
        assert batches.get(1, "a", follows=False) == 1  # step 2 mines
        assert made == [(0, "a"), (1, "a")]
        assert batches.get(2, "b", follows=True) == 2
    assert (2, "b") in made and (2, "a") not in made and len(threads) == 2
