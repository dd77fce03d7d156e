import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from index_cases import QUERIES, assert_same_index, make_index

from ehi.index import build_index, open_index, save_index


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("kind", ["per_node", "per_level"])
@pytest.mark.parametrize("leaf", ["pq", "raw"])
@pytest.mark.parametrize("strings", [True, False])
def test_round_trip_is_identical(tmp_path, monkeypatch, leaf, kind, strings, mmap):
    monkeypatch.setattr("ehi.index.folder._READ_BYTES", 0)  # small files are mapped too
    index = make_index(leaf=leaf, kind=kind, strings=strings)
    save_index(index, tmp_path / "deep" / "index")
    opened = open_index(tmp_path / "deep" / "index", mmap=mmap, verify=True)
    assert_same_index(index, opened)
    files = list((tmp_path / "deep" / "index").iterdir())
    assert opened.index_bytes == sum(file.stat().st_size for file in files)
    assert {file.suffix for file in files} == {".npy", ".json"}
    leaves = opened.segments[0].vectors if leaf == "raw" else opened.segments[0].codes
    assert isinstance(leaves.base, np.memmap) == mmap
    flat = build_index(QUERIES, range(5), tree=None)
    save_index(flat, tmp_path / "flat")
    assert (open_index(tmp_path / "flat").search(QUERIES, 1).rows[:, 0] >= 0).all()


def test_vectors_start_at_a_cache_line_wherever_they_come_from(tmp_path):
    index = make_index(leaf="raw")
    save_index(index, tmp_path / "index")
    read = [open_index(tmp_path / "index", mmap=mmap) for mmap in (True, False)]
    merged = make_index(leaf="raw")
    merged.compact()
    for made in (index, *read, merged):
        assert made.segments[0].vectors.ctypes.data % 64 == 0


def test_documents_are_stored_and_kept(tmp_path):
    documents = [{"id": f"d{i}", "title": f"zwölf\n{i}"} for i in range(30)]
    save_index(make_index(), tmp_path / "index", documents=iter(documents))
    opened = open_index(tmp_path / "index", verify=True)
    assert [opened.document(row) for row in range(30)] == documents
    save_index(opened, tmp_path / "index")  # over the folder it is mapped from
    assert opened.document(3) == documents[3]  # a snapshot of the old files
    assert open_index(tmp_path / "index").document(29) == documents[29]
    with pytest.raises(IndexError, match="row 30 is outside the 30"):
        opened.document(30)
    with pytest.raises(ValueError, match="29 documents to show for an index of 30"):
        save_index(make_index(), tmp_path / "other", documents=documents[:29])
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="saved without documents"):
        make_index().document(0)


def test_saving_over_an_index_replaces_it_and_leaves_no_old_files(tmp_path):
    save_index(make_index(0), tmp_path / "index")
    names = len(list((tmp_path / "index").iterdir()))
    for seed in (1, 2):
        save_index(make_index(seed), tmp_path / "index")
        assert_same_index(open_index(tmp_path / "index", verify=True), make_index(seed))
        assert len(list((tmp_path / "index").iterdir())) == names
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]


def test_saving_over_anything_else_is_refused(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "notes", tmp_path / "file"):
        with pytest.raises(FileExistsError, match="is not an index"):
            save_index(make_index(), path)
    assert (tmp_path / "notes" / "text").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="empty is the current folder"):
        save_index(make_index(), ".")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save_index(make_index(), "link")
    assert_same_index(open_index(tmp_path / "empty"), make_index())


def fail_at(monkeypatch, name, number):
    """Makes the `number`-th call of a function fail as on a full disk."""
    module, function = name.rsplit(".", 1)
    original = getattr(sys.modules.get(module) or os, function)
    calls = iter(range(1000))

    def failing(*args):
        if next(calls) == number:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(name, failing)


@pytest.mark.parametrize("number", [0, 5, 15])
@pytest.mark.parametrize("name", ["os.replace", "ehi.index.commit.write_array"])
def test_a_failed_save_leaves_the_old_index(tmp_path, monkeypatch, name, number):
    if name == "os.replace" and number:
        number = 1  # a new folder: manifest, then folder
    with monkeypatch.context() as patch:
        fail_at(patch, name, number)
        with pytest.raises(OSError, match="No space left"):
            save_index(make_index(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []  # nothing half-made stays
    save_index(make_index(0), tmp_path / "index")
    with monkeypatch.context() as patch:
        fail_at(patch, name, 0 if name == "os.replace" else number)
        with pytest.raises(OSError, match="No space left"):
            save_index(make_index(1), tmp_path / "index")
    assert_same_index(open_index(tmp_path / "index", verify=True), make_index(0))
    save_index(make_index(2), tmp_path / "index")
    assert_same_index(open_index(tmp_path / "index", verify=True), make_index(2))


KILLED = """
import os, sys
sys.path[:0] = [sys.argv[2]]
import index_cases, ehi.index.commit as commit
from ehi.index import save_index
left, write = int(sys.argv[3]), commit.write_array
def write_array(path, array):
    global left
    left -= 1
    if left < 0:
        path.write_bytes(b"half")
        os.kill(os.getpid(), 9)
    return write(path, array)
commit.write_array = write_array
save_index(index_cases.make_index(1), sys.argv[1])
"""


@pytest.mark.parametrize("writes", [0, 9, 20])
def test_a_killed_save_leaves_the_old_index(tmp_path, writes):
    save_index(make_index(0), tmp_path / "index")
    here = str(Path(__file__).parent)
    arguments = [str(tmp_path / "index"), here, str(writes)]
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    expected = 0 if run.returncode else 1
    assert run.returncode in (0, -9)
    assert_same_index(open_index(tmp_path / "index", verify=True), make_index(expected))
    save_index(make_index(2), tmp_path / "index")
    assert_same_index(open_index(tmp_path / "index", verify=True), make_index(2))
