"""Shards are functions of their documents: skipped, retried, refused, indexed."""

import errno
import shutil
from dataclasses import replace

import numpy as np
import pytest
from shard_cases import (
    NUM,
    SHARDS,
    Documents,
    bytes_of,
    lengths,
    make_encoder,
    make_job,
    read,
)

from ehi.encode import shards
from ehi.encode.shards import (
    attempt_shard,
    encode_shard,
    encode_shards,
    index_shards,
    unfinished_shards,
)
from ehi.index import build_index, open_index, save_index
from ehi.index.folder import writer_lock
from ehi.index.stream import build_folder
from ehi.model.export import index_arrays


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
    living = tmp_path / ".shard-00003-of-00004.abc"
    living.mkdir()
    with writer_lock(living):
        assert unfinished_shards(job) == [1, 2, 3]
    assert [path.name for path in tmp_path.glob(".*")] == [living.name]
    assert unfinished_shards(job) == [1, 2, 3] and not living.exists()
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
    assert "embeddings hold NaN or infinity" in failed[0]
