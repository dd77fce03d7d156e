"""Rows are written block by block, and a killed run goes on at the next block."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ehi.encode import stream
from ehi.encode.stream import stream_rows

ROWS = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 5)


class Maker:
    """Makes rows, notes which, and fails when it is told."""

    def __init__(self, fails_at=None, error=KeyboardInterrupt):
        self.made, self.fails_at, self.error = [], fails_at, error

    def __call__(self, start, stop):
        if start == self.fails_at:
            raise self.error
        self.made.append((start, stop))
        return ROWS[start:stop]


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_the_file_holds_all_rows_and_is_made_once(tmp_path, dtype):
    path, make = tmp_path / "new" / "rows.npy", Maker()
    rows = stream_rows(path, 23, make, dtype=dtype)
    assert isinstance(rows, np.memmap) and rows.dtype == np.dtype(dtype or "float32")
    np.testing.assert_array_equal(rows, ROWS.astype(rows.dtype))
    assert make.made == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)]
    np.testing.assert_array_equal(stream_rows(path, 23, make, dtype=dtype), rows)
    assert len(make.made) == 5 and os.listdir(path.parent) == ["rows.npy"]


@pytest.mark.parametrize("fails_at", [0, 5, 20])
@pytest.mark.parametrize("torn", [0, 7])
def test_a_killed_run_goes_on_at_the_next_block(tmp_path, fails_at, torn):
    path = tmp_path / "rows.npy"
    with pytest.raises(KeyboardInterrupt):
        stream_rows(path, 23, Maker(fails_at))
    assert not path.exists()
    with (tmp_path / ".rows.npy.part").open("ab") as file:
        file.write(b"x" * torn)  # a block that was being written
    make = Maker()
    np.testing.assert_array_equal(stream_rows(path, 23, make), ROWS)
    assert make.made[0][0] == fails_at


def test_a_part_of_other_rows_is_not_used(tmp_path):
    path = tmp_path / "rows.npy"
    with pytest.raises(KeyboardInterrupt):
        stream_rows(path, 23, Maker(10))
    make = Maker()
    assert stream_rows(path, 22, make).shape == (22, 4)
    assert make.made[0] == (0, 5)


def test_a_full_disk_is_one_sentence_and_keeps_what_is_written(tmp_path, monkeypatch):
    path = tmp_path / "rows.npy"
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="is full while 23 rows are written") as caught:
        stream_rows(path, 23, Maker(10, full))
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    usage = stream.shutil.disk_usage
    with monkeypatch.context() as patch:  # known before the second block is made
        patch.setattr(stream.shutil, "disk_usage", lambda p: usage(p)._replace(free=9))
        make = Maker()
        with pytest.raises(OSError, match="is full"):
            stream_rows(tmp_path / "other.npy", 23, make)
        assert make.made == [(0, 5)]
    make = Maker()
    stream_rows(path, 23, make)
    assert make.made[0] == (10, 15)


def test_of_two_runs_one_does_the_work(tmp_path):
    makers = Maker(), Maker()
    with ThreadPoolExecutor(2) as pool:
        for rows in pool.map(lambda m: stream_rows(tmp_path / "r.npy", 23, m), makers):
            np.testing.assert_array_equal(rows, ROWS)
    assert sorted(len(make.made) for make in makers) == [0, 5]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "rows.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"rows.npy is damaged: delete it"):
        stream_rows(tmp_path / "rows.npy", 23, Maker())
