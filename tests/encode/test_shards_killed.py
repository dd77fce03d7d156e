"""Shards lose nothing where processes are killed: a loop, and workers of Ray."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from shard_cases import (
    DEADLY,
    SHARDS,
    TESTS,
    bytes_of,
    deadly_job,
    say_pid_and_load,
    slow_job,
)

from ehi.encode import shards
from ehi.encode.shards import encode_shards, unfinished_shards

PATHS = os.pathsep.join(map(str, (TESTS.parent, TESTS)))


@pytest.fixture(autouse=True)
def rows_as_they_were(monkeypatch):
    """`slow_job` changes them for processes that it is imported into."""
    monkeypatch.setattr(shards, "ROWS", shards.ROWS)


def start(folder, seconds):
    """A process that encodes all shards, slowly."""
    command = [sys.executable, __file__, str(folder), str(seconds)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": PATHS})


def test_a_killed_loop_is_resumed_to_the_same_files(tmp_path):
    slow = slow_job(tmp_path / "whole", 0)
    assert encode_shards(slow, range(SHARDS)) == {}
    job = slow_job(tmp_path / "killed", 0)
    with start(job.folder, 0.4) as process:
        while len(list(job.folder.glob("shard-*"))) < 2:
            time.sleep(0.02)
            assert process.poll() is None
        time.sleep(0.2)  # into the third
        process.send_signal(signal.SIGKILL)
    there = unfinished_shards(job)
    assert 0 < len(there) < SHARDS
    kept = {path: path.stat().st_mtime_ns for path in job.folder.rglob("*.npy")}
    assert encode_shards(job, there) == {}
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def encode_shards_by_ray():
    """The engine, on one cluster for all tests, whose workers can import the jobs."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ehi.encode.shards_ray import encode_shards_by_ray
    from ehi.index.sharded import start_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        ray, _ = start_ray(num_cpus=3)
        try:
            yield encode_shards_by_ray
        finally:
            ray.shutdown()


def test_ray_loses_nothing_when_an_actor_is_killed(tmp_path, encode_shards_by_ray):
    local = slow_job(tmp_path / "local", 0)
    assert encode_shards(local, range(SHARDS)) == {}
    job = slow_job(tmp_path / "ray", 0)
    killed = []

    def kill():
        while not list(job.folder.glob("shard-*")):
            time.sleep(0.05)
        pid = int((job.folder / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    load = functools.partial(say_pid_and_load, job.folder, 0.4)
    assert encode_shards_by_ray(load, unfinished_shards(job), workers=1) == {}
    thread.join(timeout=1)
    pid = int((job.folder / "pid").read_text())
    assert killed and killed != [pid]  # another one went on
    (job.folder / "pid").unlink()
    unfinished_shards(job)
    assert bytes_of(job.folder) == bytes_of(local.folder)


def test_ray_reports_a_shard_that_fails_or_kills_its_workers(
    tmp_path, encode_shards_by_ray
):
    load = functools.partial(deadly_job, tmp_path)
    job = load()
    failed = encode_shards_by_ray(load, unfinished_shards(job), 1, workers=2)
    dies, fails = (
        next(n for n in range(SHARDS) if row in job.rows(n)) for row in DEADLY
    )
    assert failed == {
        dies: "its workers died, time and again",
        fails: "RuntimeError: no such word",
    }
    assert unfinished_shards(job) == sorted(failed)
    assert "d7\n" in job.failure(dies).read_text()
    assert not list(tmp_path.glob(".shard*"))


def test_without_ray_one_sentence(tmp_path, monkeypatch):
    from ehi.encode.shards_ray import encode_shards_by_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'ehi\[ray\]'"):
        encode_shards_by_ray(None, [0])


if __name__ == "__main__":
    everything = slow_job(Path(sys.argv[1]), float(sys.argv[2]))
    encode_shards(everything, unfinished_shards(everything))
