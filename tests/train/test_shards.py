"""Shards are functions of their documents: skipped, resumed, retried, indexed."""

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from tiny import WIDTH, make_model

from ehi.index import build_index, open_index, save_index
from ehi.index.stream import build_folder
from ehi.model.encoder import TextEncoder
from ehi.train import shards
from ehi.train.document_encoder import DocumentEncoder
from ehi.train.export import index_arrays
from ehi.train.shards import (
    ShardJob,
    attempt_shard,
    encode_shard,
    encode_shards,
    index_shards,
    unfinished_shards,
)

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
NUM, SHARDS = 23, 4
DEADLY = (7, 21)


class Documents:
    """Letters of 1 to 9 words; slices of them are read as needed."""

    def __init__(self, num=NUM):
        rng = np.random.default_rng(0)
        self.texts = [
            " ".join(rng.choice(list("abcdefgh"), rng.integers(1, 10)))
            for _ in range(num)
        ]
        self.texts[7], self.texts[21] = "h g f e d c b a z z", "a b c d e f g h z z"

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, rows):
        return [SimpleNamespace(content=text) for text in self.texts[rows]]


@pytest.fixture(autouse=True)
def rows_as_they_were(monkeypatch):
    """`slow_job` changes them for processes that it is imported into."""
    monkeypatch.setattr(shards, "ROWS", shards.ROWS)


def make_encoder(*, frozen=True):
    """A tiny model that nothing was fitted to, and its encoder."""
    tokenizer = HERE.parent / "fixtures" / "minilm_tiny" / "tokenizer.json"
    tower = None
    if frozen:
        tower = TextEncoder(
            vocab_size=64, width=WIDTH, num_layers=1, num_heads=2, mlp_width=32,
            max_positions=16, type_vocab_size=2, rngs=nnx.Rngs(1),
        )  # fmt: skip
    graphdef, params = make_model(None, None, tower=not frozen, fitted=False)
    length = 16 if frozen else 12
    return (graphdef, params), DocumentEncoder(
        graphdef, params, tower=tower, tokenizer_file=tokenizer, length=length,
        num_documents=NUM, spill=2,
    )  # fmt: skip


def make_job(folder, encode=None, **changes):
    """A job of NUM documents in SHARDS shards; the real encoder where none is given."""
    documents = Documents()
    if encode is None:
        _, encode = make_encoder()
    fields = {
        "folder": Path(folder),
        "num_shards": SHARDS,
        "documents": documents,
        "ids": [f"d{n}" for n in range(NUM)],
        "encode": encode,
        "identity": {"parameters": "abc", "corpus": "def"},
    }
    return ShardJob(**fields | changes)


def slow_job(folder, seconds):
    """The real job, whose blocks of 4 documents take a while."""
    shards.ROWS = 4
    job = make_job(folder)

    def encode(texts):
        time.sleep(seconds)
        return job.encode(texts)

    return replace(job, encode=encode)


def lengths(texts):
    """Stand-in for an encoder."""
    sizes = np.array([[len(text)] for text in texts])
    return {
        "embeddings": np.tile(sizes, 3).astype(np.float16),
        "leaves": (sizes % 2).astype(np.uint32),
    }


def bytes_of(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def read(job, number, name):
    return np.load(job.path(number) / f"{name}.npy")


@pytest.mark.parametrize("num_shards", [1, 4, 23])
def test_shards_divide_the_documents(tmp_path, num_shards):
    job = make_job(tmp_path, lengths, num_shards=num_shards)
    rows = [row for number in range(num_shards) for row in job.rows(number)]
    assert rows == list(range(NUM))
    assert encode_shards(job, unfinished_shards(job)) == {}
    found = [read(job, n, "embeddings")[:, 0] for n in range(num_shards)]
    expected = [len(text) for text in job.documents.texts]
    assert np.concatenate(found).tolist() == expected


@pytest.mark.parametrize("frozen", [True, False])
def test_leaves_and_codes_are_those_of_the_index(tmp_path, monkeypatch, frozen):
    monkeypatch.setattr(shards, "ROWS", 3)
    (graphdef, params), encode = make_encoder(frozen=frozen)
    job = make_job(tmp_path / "shards", encode)
    assert encode_shards(job, unfinished_shards(job)) == {}
    for number in range(SHARDS):
        num = len(job.rows(number))
        assert read(job, number, "embeddings").dtype == np.float16
        assert read(job, number, "leaves").shape == (num, 2)
        assert read(job, number, "codes").shape == (num, 2, 2)  # two codes a byte
    parts = index_shards(job, lambda rows: [{"row": row} for row in rows])
    arrays = index_arrays(graphdef, params) | {"spill": 2}
    build_folder(tmp_path / "one", parts, **arrays)
    build_folder(tmp_path / "two", reversed(parts), **arrays)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    index = open_index(tmp_path / "one", verify=True)
    assert index.external_ids(np.arange(NUM)).tolist() == job.ids
    assert index.document(NUM - 1) == {"row": NUM - 1}
    segment = index.segments[0]
    of_copy = np.repeat(np.arange(index.num_leaves), np.diff(segment.leaf_offsets))
    all_leaves, all_codes = (
        np.concatenate([read(job, n, name) for n in range(SHARDS)])
        for name in ("leaves", "codes")
    )
    for row, leaf, code in zip(segment.leaf_rows, of_copy, segment.codes, strict=True):
        (which,) = np.flatnonzero(all_leaves[row] == leaf)
        assert (all_codes[row, which] == code).all()
    # Built in memory of the same embeddings, it is the same index.
    embeddings = np.concatenate([read(job, n, "embeddings") for n in range(SHARDS)])
    whole = build_index(embeddings.astype(np.float32), job.ids, **arrays)
    save_index(whole, tmp_path / "whole", [{"row": row} for row in range(NUM)])
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "whole")


def test_finished_shards_are_skipped(tmp_path):
    job = make_job(tmp_path, lengths)
    encode_shards(job, [0, 2])
    assert unfinished_shards(job) == [1, 3]
    before = bytes_of(tmp_path)
    encode_shard(replace(job, encode=None), 2)  # would fail, were it called
    assert bytes_of(tmp_path) == before
    (job.path(2) / "leaves.npy").unlink()  # not whole: made again
    (tmp_path / ".shard-00001-of-00004.xyz").mkdir()  # left by a killed worker
    assert unfinished_shards(job) == [1, 2, 3]
    encode_shards(job, [1, 2, 3])
    whole = make_job(tmp_path / "whole", lengths)
    encode_shards(whole, range(SHARDS))
    there = bytes_of(tmp_path)
    assert {f"whole/{name}": there[name] for name in bytes_of(whole.folder)} == {
        name: data for name, data in there.items() if name.startswith("whole")
    }


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"identity": {"parameters": "xyz", "corpus": "def"}}, "parameters"),
        ({"identity": {"parameters": "abc"}}, "corpus"),
        ({"num_shards": 5}, "num_shards"),
    ],
)
def test_shards_of_another_job_are_refused(tmp_path, changes, what):
    encode_shards(make_job(tmp_path, lengths), [1])
    before = bytes_of(tmp_path)
    other = make_job(tmp_path, lengths, **changes)
    for use in (unfinished_shards, index_shards):
        with pytest.raises(ValueError, match=rf"\(other {what}\): choose"):
            use(other)
    assert bytes_of(tmp_path) == before


def test_missing_duplicate_and_altered_shards_are_not_indexed(tmp_path):
    job = make_job(tmp_path, lengths)
    encode_shards(job, [0, 1, 3])
    with pytest.raises(ValueError, match="shard-00002-of-00004 is missing"):
        index_shards(job)
    encode_shards(job, [2])
    assert [shard.name for shard in index_shards(job)] == [0, 1, 2, 3]
    shutil.copytree(job.path(2), tmp_path / "shard-copy")
    with pytest.raises(ValueError, match="shard-copy is the shard of .*00002-of-00004"):
        index_shards(job)
    shutil.rmtree(tmp_path / "shard-copy")
    file = job.path(3) / "embeddings.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="embeddings.npy was altered: remove"):
        index_shards(job)
    (job.path(1) / "shard.json").write_text("{")
    with pytest.raises(ValueError, match="00001-of-00004 is not a shard"):
        unfinished_shards(job)


def test_a_failing_shard_is_retried_then_reported(tmp_path, caplog):
    calls = []
    broken = Documents().texts[7]

    def encode(texts):
        calls.append(len(texts))
        if broken in texts:
            raise RuntimeError("no such word")
        return lengths(texts)

    job = make_job(tmp_path, encode)
    bad = next(n for n in range(SHARDS) if 7 in job.rows(n))
    with caplog.at_level("WARNING", logger="ehi"):
        failed = encode_shards(job, unfinished_shards(job), retries=2)
    assert failed == {bad: "RuntimeError: no such word"}
    assert len(calls) == SHARDS + 2
    assert unfinished_shards(job) == [bad]
    said, _, *names = job.failure(bad).read_text().splitlines()
    assert said == failed[bad]
    assert names == [job.ids[row] for row in job.rows(bad)] and "d7" in names
    assert attempt_shard(replace(job, encode=lengths), bad) is None
    assert not job.failure(bad).exists() and unfinished_shards(job) == []


def test_one_that_fails_once_is_not_reported(tmp_path):
    fails = iter([True])

    def encode(texts):
        if next(fails, False):
            raise OSError("a network drive went away")
        return lengths(texts)

    assert encode_shards(make_job(tmp_path, encode), range(SHARDS), retries=1) == {}


def test_a_full_disk_ends_the_job_and_keeps_what_is_done(tmp_path, monkeypatch):
    job = make_job(tmp_path, lengths)
    write = shards.write_array

    def full(path, array):
        if path.parent.name.startswith(".shard-00002"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, array)

    monkeypatch.setattr(shards, "write_array", full)
    with pytest.raises(OSError, match="finished shards are kept"):
        encode_shards(job, range(SHARDS))
    assert unfinished_shards(job) == [2, 3]
    assert not list(tmp_path.glob(".shard*"))


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shards=24: allowed are 1 to 23"):
        make_job(tmp_path, lengths, num_shards=24)
    with pytest.raises(ValueError, match="shards=0"):
        make_job(tmp_path, lengths, num_shards=0)


def test_embeddings_that_are_not_finite_fail_their_shard(tmp_path):
    _, encode = make_encoder()
    encode.params[0]["head/projection"] = encode.params[0]["head/projection"] * np.nan
    job = make_job(tmp_path, encode)
    failed = encode_shards(job, [0], retries=0)
    assert "embeddings as float16" in failed[0]


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
    """The engine, on one cluster for all tests, whose workers can import this file."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ehi.index.ray_cluster import start_ray
    from ehi.train.shards_ray import encode_shards_by_ray

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
    from ehi.train.shards_ray import encode_shards_by_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'ehi\[ray\]'"):
        encode_shards_by_ray(None, [0])


def deadly_job(folder):
    """One document kills the process that encodes it, another one raises."""
    kills, raises = (Documents().texts[row] for row in DEADLY)

    def encode(texts):
        if kills in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        if raises in texts:
            raise RuntimeError("no such word")
        return lengths(texts)

    return make_job(folder, encode)


def say_pid_and_load(folder, seconds):
    """`slow_job` in a worker that can be killed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pid").write_text(str(os.getpid()))
    return slow_job(folder, seconds)


if __name__ == "__main__":
    everything = slow_job(Path(sys.argv[1]), float(sys.argv[2]))
    encode_shards(everything, unfinished_shards(everything))
