"""An index folder carries its tower: a copy of it alone answers texts."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from text_cases import FIXTURES, TEXTS, copy_of, make_index

from ehi.index import (
    IndexCorruptError,
    Shard,
    build_folder,
    build_index,
    open_index,
    save_index,
)
from ehi.index.sharded import split_index
from ehi.index.text.checkpoint import weights_sha256
from ehi.index.text.encoder import load_text_encoder


@pytest.fixture
def tower(tmp_path):
    return copy_of("minilm_tiny", tmp_path / "given")


@pytest.fixture
def index(tower, tmp_path):
    """An index that carries its tower, in a folder of its own."""
    made = make_index(tower, tower_sha256=weights_sha256(tower), head=None)
    save_index(made, tmp_path / "index", tower=True)
    return open_index(tmp_path / "index")


def moved(tmp_path, name="index"):
    """A copy of the index alone, elsewhere; nothing else is left."""
    there = tmp_path / "elsewhere" / name
    shutil.copytree(tmp_path / name, there)
    for other in tmp_path.iterdir():
        if other.name != "elsewhere":
            shutil.rmtree(other)
    return there


def test_a_copy_of_the_folder_alone_answers_the_same(index, tmp_path):
    expected = index.search_text(TEXTS, k=5, threads=2)
    path = moved(tmp_path)
    copied = open_index(path, verify=True)
    found = copied.search_text(TEXTS, k=5, threads=2)
    assert (found.ids == expected.ids).all() and (found.scores == expected.scores).all()
    copied.verify()


def test_updates_keep_the_tower(index, tmp_path):
    expected = index.text_encoder(TEXTS)
    carried = index.folder.tower
    index.add(np.eye(32)[:2], [20, 21])
    index.delete([3])
    index.compact()
    save_index(index, index.folder.path)  # in its own place
    for one in (index, open_index(index.folder.path, verify=True)):
        assert one.folder.tower == carried
        assert np.array_equal(load_text_encoder(one)(TEXTS), expected)
    assert len(list(index.folder.path.glob("*tower*"))) == 1


def test_a_tower_of_the_cache_is_shared(tower, tmp_path, monkeypatch):
    monkeypatch.setenv("EHI_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "models" / "owner--tiny"
    shutil.copytree(tower, cached)
    save_index(make_index("owner/tiny"), tmp_path / "index", tower=True)
    (file,) = (tmp_path / "index").glob("tower-*/model.safetensors")
    assert file.samefile(cached / "model.safetensors")
    shutil.rmtree(cached)  # as the README of the cache allows
    open_index(tmp_path / "index", verify=True).search_text("a", k=1)


def test_copies_share_the_files_of_the_tower(index, tmp_path):
    save_index(index, tmp_path / "copy")
    copied = open_index(tmp_path / "copy", verify=True)
    both = [one.folder.tower / "model.safetensors" for one in (index, copied)]
    assert both[0].samefile(both[1])
    # What belongs to somebody else may change, so it is copied.
    assert os.stat(both[0]).st_nlink == 2
    assert index.index_bytes < both[0].stat().st_size


def test_only_what_texts_need_is_carried(tower, tmp_path):
    (tower / "onnx").mkdir()
    (tower / "onnx" / "model.json").write_text("{}")
    (tower / "pytorch_model.bin").write_bytes(b"pickle")
    (tower / "a name (2).json").write_text("{}")
    (tower / "LICENSE").write_text("free")
    save_index(make_index(tower), tmp_path / "index", tower=True)
    carried = open_index(tmp_path / "index").folder.tower
    names = {
        path.relative_to(carried).as_posix()
        for path in carried.rglob("*")
        if path.is_file()
    }
    assert {"config.json", "1_Pooling/config.json", "LICENSE"} < names
    assert not names & {"onnx/model.json", "pytorch_model.bin", "a name (2).json"}


def test_a_tower_may_be_named_or_left_out(index, tower, tmp_path):
    old = make_index("../gone", tower_sha256=weights_sha256(tower))
    with pytest.raises(FileNotFoundError):
        save_index(old, tmp_path / "one", tower=True)
    save_index(old, tmp_path / "one", tower=tower)
    assert open_index(tmp_path / "one").folder.tower is not None
    with pytest.raises(ValueError, match="has weights"):
        save_index(old, tmp_path / "one", tower=FIXTURES / "bert_tiny")
    save_index(index, tmp_path / "bare", tower=False)
    assert open_index(tmp_path / "bare").folder.tower is None
    folders = split_index(tmp_path / "index", tmp_path / "parts", shards=2)
    assert open_index(folders[0]).folder.tower is None


def test_an_index_in_its_place_takes_another_tower(index, tmp_path):
    other = make_index(FIXTURES / "bert_tiny")
    save_index(other, tmp_path / "index", tower=True)
    found = open_index(tmp_path / "index", verify=True)
    assert np.array_equal(found.text_encoder(TEXTS), other.text_encoder(TEXTS))
    assert len(list((tmp_path / "index").glob("tower-*"))) == 1


def test_shards_are_built_with_a_tower(tower, tmp_path):
    encoder = {"tower": str(tower), "query_length": 12}
    build_folder(
        tmp_path / "index", [Shard(np.eye(32), range(32))], tree=None, encoder=encoder,
        tower=tower,
    )  # fmt: skip
    path = moved(tmp_path)
    assert open_index(path, verify=True).search_text("a b", k=1).ids.shape == (1, 1)


def test_what_a_killed_writer_left_is_removed(index):
    path = index.folder.path
    left = [path / "tower-00000000", path / ".tower-00000000.0a1b2c3d"]
    for folder in left:
        folder.mkdir()
    (path / "tower-mine").mkdir()
    index.delete([0])
    assert not any(folder.exists() for folder in left)
    assert (path / "tower-mine").is_dir() and index.folder.tower.is_dir()


def test_a_full_disk_leaves_the_old_tower(index, monkeypatch):
    path, before = index.folder.path, sorted(index.folder.path.rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        save_index(make_index(FIXTURES / "bert_tiny"), path, tower=True)
    assert sorted(path.rglob("*")) == before
    open_index(path, verify=True).search_text("a", k=1)


@pytest.mark.parametrize("file", ["model.safetensors", "1_Pooling/config.json"])
def test_altered_files_of_the_tower_are_found(index, file):
    altered = index.folder.tower / file
    whole = altered.read_bytes()
    altered.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(IndexCorruptError, match=file):
        index.verify()
    altered.write_bytes(whole[:-1])
    with pytest.raises(IndexCorruptError, match=file):
        open_index(index.folder.path)
    altered.unlink()
    with pytest.raises(IndexCorruptError, match=f"{file} is missing"):
        open_index(index.folder.path)


@pytest.mark.parametrize(
    "entry",
    [
        5, {}, {"folder": "../x", "files": {}}, {"folder": "tower-00000000"},
        {"folder": "tower-00000000", "files": {"../../a": {"bytes": 1, "sha256": ""}}},
        {"folder": "tower-00000000", "files": {"a/../b": {"bytes": 1, "sha256": ""}}},
        {"folder": "tower-00000000", "files": {"a": {"bytes": "1", "sha256": ""}}},
    ],
)  # fmt: skip
def test_manifests_that_lead_elsewhere_are_refused(index, entry):
    path = index.folder.path / "manifest.json"
    manifest = json.loads(path.read_bytes()) | {"tower": entry}
    path.write_text(json.dumps(manifest))
    with pytest.raises(IndexCorruptError, match="no usable entry for its tower"):
        open_index(index.folder.path)


def test_a_linked_tower_is_refused(index, tmp_path):
    inside = index.folder.tower
    shutil.move(inside, tmp_path / "outside")
    inside.symlink_to(tmp_path / "outside")
    with pytest.raises(IndexCorruptError, match="is a link"):
        open_index(index.folder.path)


def test_the_old_layout_becomes_one_that_travels(tower, tmp_path):
    """Beside the index, as version 0.2 wrote it."""
    home = Path(shutil.copytree(tower, tmp_path / "index-tower-0a1b2c3d"))
    named = make_index(f"../{home.name}", tower_sha256=weights_sha256(home))
    save_index(named, tmp_path / "index")
    old = open_index(tmp_path / "index")
    expected = old.text_encoder(TEXTS)
    assert old.folder.manifest["version"] == 3
    save_index(old, tmp_path / "new", tower=True)
    assert np.array_equal(
        open_index(moved(tmp_path, "new")).text_encoder(TEXTS), expected
    )


def test_an_index_of_vectors_has_no_tower_to_carry(tmp_path):
    index = build_index(np.eye(4), range(4), tree=None)
    with pytest.raises(ValueError, match="does not name its text encoder"):
        save_index(index, tmp_path / "index", tower=True)
    assert not (tmp_path / "index").exists()
