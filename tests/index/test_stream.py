"""An index folder from shards is the one that `build_index` makes in memory."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from stream_cases import (
    CUTS,
    IDS,
    KINDS,
    NUM,
    X,
    bytes_of,
    make_blocks_small,
    make_shards,
    saved,
)

from ehi.index import IndexLockedError, open_index
from ehi.index.folder import writer_lock
from ehi.index.stream import build_folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    make_blocks_small(monkeypatch)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_the_one_of_a_build_in_memory(tmp_path, kind, threads):
    build_folder(tmp_path / "new", make_shards(), threads=threads, **KINDS[kind])
    assert bytes_of(tmp_path / "new") == saved(tmp_path / "old", **KINDS[kind])
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]
    open_index(tmp_path / "new", verify=True)


@pytest.mark.parametrize("kind", KINDS)
def test_progress_counts_both_readings_of_every_document(tmp_path, kind):
    done = []
    build_folder(tmp_path / "new", make_shards(), progress=done.append, **KINDS[kind])
    assert sum(done) == 2 * NUM and len(done) > 2 * len(make_shards())


def test_embeddings_come_from_files_functions_and_other_types(tmp_path):
    np.save(tmp_path / "x.npy", X[121:400])
    np.save(tmp_path / "ids.npy", np.arange(121, 400))
    np.save(tmp_path / "words.npy", np.array(IDS[121:400]))

    def blocks():
        yield X[121:122]
        yield X[122:380]
        yield X[380:400]

    numbers = np.arange(NUM)
    expected = saved(tmp_path / "old", ids=numbers, **KINDS["pq"])
    for name, changes in {
        "file": {
            "embeddings": tmp_path / "x.npy",
            "ids": str(tmp_path / "ids.npy"),
        },
        "function": {"embeddings": blocks, "ids": range(121, 400)},
    }.items():
        shards = make_shards(all_ids=numbers, **changes)
        build_folder(tmp_path / name, shards, **KINDS["pq"])
        assert bytes_of(tmp_path / name) == expected

    half = X.astype(np.float16)
    shards = make_shards(half, ids=tmp_path / "words.npy")
    build_folder(tmp_path / "half", shards, **KINDS["raw"])
    expected = saved(tmp_path / "old half", x=half, **KINDS["raw"])
    assert bytes_of(tmp_path / "half") == expected


def test_named_shards_make_the_same_bytes_in_any_order(tmp_path):
    for names in (["b", "a", "e", "c", "d"], [1, 0, 4, 2, 3]):
        shards = [
            replace(shard, name=name)
            for shard, name in zip(make_shards(), names, strict=True)
        ]
        folders = []
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
            folders.append(tmp_path / f"{names[0]} {order[0]}")
            build_folder(folders[-1], [shards[i] for i in order], **KINDS["pq"])
        assert bytes_of(folders[0]) == bytes_of(folders[1])
    index = open_index(folders[0])
    assert index.external_ids(np.arange(2)).tolist() == IDS[:2]


def test_documents_to_show_are_stored(tmp_path):
    shown = [{"title": f"T{i}"} for i in range(NUM)]
    shards = [
        replace(shard, documents=shown[start:stop])
        for shard, (start, stop) in zip(
            make_shards(), itertools.pairwise(CUTS), strict=True
        )
    ]
    shards[4] = replace(shards[4], documents=lambda: iter(shown[400:]))
    build_folder(tmp_path / "new", shards, **KINDS["raw"])
    assert bytes_of(tmp_path / "new") == saved(tmp_path / "old", shown, **KINDS["raw"])
    short = [*shards[:4], replace(shards[4], documents=lambda: iter(shown[401:]))]
    no_json = [*shards[:4], replace(shards[4], documents=[{1}] * 100)]
    for bad, words in (
        (short, "shard 4 has 99 documents to show for 100 ids"),
        (no_json, "shard 4: documents to show must be JSON"),
        ([*shards[:4], make_shards()[4]], "first shard has some documents .* shard 4"),
    ):
        with pytest.raises(ValueError, match=words):
            build_folder(tmp_path / "bad", bad, **KINDS["raw"])
        assert sorted(os.listdir(tmp_path)) == ["new", "old"]


def test_an_index_is_replaced_and_other_folders_are_not(tmp_path):
    saved(tmp_path / "index", x=X[:100], ids=IDS[:100], **KINDS["raw"])
    old = open_index(tmp_path / "index")
    build_folder(tmp_path / "index", make_shards(), **KINDS["pq"])
    assert open_index(tmp_path / "index", verify=True).num_documents == NUM
    assert old.search(X[:1], 1).ids[0, 0] is not None  # mapped files stay
    before = bytes_of(tmp_path)
    with writer_lock(tmp_path / "index"), pytest.raises(IndexLockedError):
        build_folder(tmp_path / "index", make_shards(), **KINDS["pq"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="is not an index that can be replaced"):
        build_folder(tmp_path / "mine", make_shards(), **KINDS["pq"])
    assert bytes_of(tmp_path) == before | {"mine/thesis.txt": b""}


def test_a_beam_over_everything_is_exact_and_a_narrow_one_is_near(tmp_path):
    expected = saved(tmp_path / "old", **KINDS["pq"])
    build_folder(tmp_path / "wide", make_shards(), beam=3, **KINDS["pq"])
    assert bytes_of(tmp_path / "wide") == expected
    build_folder(tmp_path / "narrow", make_shards(), beam=2, **KINDS["pq"])
    assert open_index(tmp_path / "narrow", verify=True).leaf_sizes.sum() == 2 * NUM
