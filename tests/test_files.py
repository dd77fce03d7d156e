"""Files and folders appear whole or not at all; the cache folder; sums."""

import doctest
import os
import stat

import numpy as np
import pytest

from ehi import files
from ehi.files import atomic_write, atomic_write_npz, cache_folder, new_file, new_folder


def test_examples():
    found = doctest.testmod(files)
    assert found.attempted and not found.failed


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    atomic_write(tmp_path / "x", b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(tmp_path / "x", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_arrays_and_folders_above_are_made(tmp_path):
    atomic_write_npz(tmp_path / "a/b.npz", {"x": np.arange(3)})
    with np.load(tmp_path / "a/b.npz") as file:
        assert file["x"].tolist() == [0, 1, 2]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.npz"]


def test_the_file_behind_a_link_is_replaced(tmp_path):
    atomic_write(tmp_path / "store/file", b"old")
    (tmp_path / "link").symlink_to("store/file")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "store/file").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o002, 0o664, 0o775), (0o077, 0o600, 0o700)]
)
def test_the_umask_decides(tmp_path, umask, file, folder):
    old = os.umask(umask)
    try:
        atomic_write(tmp_path / "file", b"")
        with new_folder(tmp_path / "folder") as made:
            (made / "inside").touch()
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes == {"file": file, "folder": folder, "inside": file}


def test_a_folder_that_fails_is_not_there(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "new") as made:
        (made / "inside").touch()
        raise KeyError
    with pytest.raises(KeyError), new_file(tmp_path / "file") as beside:
        beside.touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", ["refuse", "keep", "replace"])
def test_a_folder_that_another_process_made_first(tmp_path, exists):
    def make():
        with new_folder(tmp_path / "folder", exists) as made:
            (made / "ours").touch()
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder/theirs").touch()

    if exists == "refuse":
        with pytest.raises(OSError, match="not empty"):
            make()
    else:
        make()
    left = [path.name for path in (tmp_path / "folder").iterdir()]
    assert left == ["ours" if exists == "replace" else "theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_folder_may_do_is_one_of_three(tmp_path):
    refused = pytest.raises(ValueError, match="'keep' or 'replace', got 'no'")
    with refused, new_folder(tmp_path / "x", "no"):
        pass


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EHI_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache/ehi"
    monkeypatch.setenv("EHI_CACHE", "")  # set to nothing: as if it were not set
    assert cache_folder() == tmp_path / ".cache/ehi"
    monkeypatch.setenv("EHI_CACHE", "~/here")
    assert cache_folder() == tmp_path / "here"
    assert cache_folder(tmp_path / "other") == tmp_path / "other"
    (tmp_path / "here").touch()
    with pytest.raises(NotADirectoryError, match="here is a file: set .* EHI_CACHE"):
        cache_folder()
