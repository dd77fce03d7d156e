"""Wrong shards, names and ids are refused, and no file stays behind."""

import os
from dataclasses import replace

import numpy as np
import pytest
from stream_cases import (
    CUTS,
    IDS,
    KINDS,
    NUM,
    TREE,
    WIDTH,
    X,
    make_blocks_small,
    make_shards,
)

from ehi.index.stream import Shard, build_folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    make_blocks_small(monkeypatch)


NAN = X[121:400].copy()
NAN[200, 1] = np.nan
LARGE = X[121:400].copy()
LARGE[200, 1] = 65520
BAD = {
    "shard 3 holds NaN or infinity in row 200": {"embeddings": NAN},
    "shard 3 holds a value too large for float16 in row 200": {"embeddings": LARGE},
    "shard 3 holds float32 of width 3, the first shard float32 of width 4": {
        "embeddings": X[121:400, :3]
    },
    "shard 3 holds float64 of width 4": {"embeddings": X[121:400].astype(float)},
    "shard 3 has 278 embeddings for 279 ids": {"embeddings": X[122:400]},
    "shard 3 has 200 embeddings for 279 ids": {"embeddings": lambda: [X[:200]]},
    "shard 3 has too many embeddings for 279 ids": {"embeddings": lambda: [X]},
    r"shard 3 must hold blocks .* got the shape \(4,\)": {
        "embeddings": lambda: iter(X)
    },
    r"doc_ids repeat: 'dök/7' is in row 7 of shard 0 and in row 5 of shard 3": {
        "ids": [*IDS[121:126], IDS[7], *IDS[127:400]]
    },
    "the ids of shard 3 are integers, those before it strings": {
        "ids": range(121, 400)
    },
    "shard 3: ids must be all strings or all integers .* got 0.5 among": {
        "ids": [0.5] * 279
    },
}


@pytest.mark.parametrize("score", ["cosine", "corrected"])
def test_a_score_that_needs_unit_vectors_names_the_row_and_shard(tmp_path, score):
    longer = X[121:400].copy()
    longer[200] *= 1.01
    words = f"shard 3 holds a vector of norm 1.01, where score '{score}' .* in row 200"
    with pytest.raises(ValueError, match=words):
        shards = make_shards(embeddings=longer)
        build_folder(tmp_path / "new", shards, **KINDS["cosine"] | {"score": score})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("words", BAD)
def test_bad_shards_are_refused_and_leave_nothing(tmp_path, words):
    shards = make_shards(**BAD[words])
    with pytest.raises(ValueError, match=words):
        build_folder(tmp_path / "new", shards, threads=2, **KINDS["half"])
    assert not os.listdir(tmp_path)


def test_missing_and_unreadable_files_are_named(tmp_path):
    path = tmp_path / "x.npy"
    with pytest.raises(FileNotFoundError, match="shard 3 is missing: .*x.npy does not"):
        build_folder(tmp_path / "new", make_shards(embeddings=path), **KINDS["raw"])
    np.save(path, X[121:400])
    whole = path.read_bytes()
    for content in (whole[:-8], b"", b"embeddings"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="shard 3 cannot be read: .*x.npy"):
            build_folder(tmp_path / "new", make_shards(embeddings=path), tree=TREE)
    assert os.listdir(tmp_path) == ["x.npy"]


BAD_NAMES = {
    "two shards have the name 'a'": ["a", "b", "c", "a", "d"],
    "numbers of shards count from 0, and shard 3 is missing": [0, 1, 2, 5, 4],
    "shard 0 is missing: got 5 shards from -1 to 3": [0, 1, 2, 3, -1],
    "must be all strings or all numbers, or all None": ["a", 1, "c", "d", None],
}


@pytest.mark.parametrize("words", BAD_NAMES)
def test_missing_and_repeated_names_are_refused(tmp_path, words):
    shards = [
        replace(shard, name=name)
        for shard, name in zip(make_shards(), BAD_NAMES[words], strict=True)
    ]
    with pytest.raises(ValueError, match=words):
        build_folder(tmp_path / "new", shards, tree=TREE)


BAD_ARGUMENTS = {
    "an empty corpus: no documents in 0 shards": {"shards": []},
    "an empty corpus: no documents in 1 shards": {"shards": [Shard(X[:0], [])]},
    "shard 0 must hold floats of shape": {
        "shards": [Shard(np.ones((9, 2), int), IDS[:9])]
    },
    "too large for 8 documents": {"shards": [Shard(X[:8], IDS[:8])]},
    "beam 1 is smaller than the 2 leaves of each document": {"beam": 1, "spill": 2},
    "threads must be at least 1": {"threads": 0},
    "leaf_dtype must be one of": {"leaf_dtype": "int8"},
    "rotation needs codebooks": {"rotation": np.eye(WIDTH)},
}


@pytest.mark.parametrize("words", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(tmp_path, words):
    arguments = {"shards": make_shards(), "tree": TREE} | BAD_ARGUMENTS[words]
    with pytest.raises(ValueError, match=words):
        build_folder(tmp_path / "new", **arguments)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("again", ["other values", "other order", "fewer", "more"])
def test_a_shard_that_changes_between_the_readings_is_named(tmp_path, again):
    part = X[121:400]
    second = {
        "other values": part + 1,
        "other order": part[::-1],
        "fewer": part[:-1],
        "more": np.concatenate([part, part]),
    }[again]
    # Only the first shard is read a third time, to find its width.
    readings = iter([part, second])
    shards = make_shards(embeddings=lambda: [next(readings)])
    with pytest.raises(ValueError, match="shard 3 changed while the index was built"):
        build_folder(tmp_path / "new", shards, threads=2, **KINDS["pq"])
    assert not os.listdir(tmp_path)


def test_ids_that_change_between_the_readings_are_refused(tmp_path):
    class Changing(list):
        readings = 0

        def __getitem__(self, part):
            self.readings += part.start == 0
            return [
                f"{self.readings}/{value}" for value in list.__getitem__(self, part)
            ]

    with pytest.raises(ValueError, match="the ids of a shard changed while the index"):
        build_folder(
            tmp_path / "new", make_shards(ids=Changing(IDS[121:400])), tree=TREE
        )
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("strings", [True, False])
def test_repeated_ids_are_found_wherever_they_stand(tmp_path, strings):
    rng = np.random.default_rng(0)
    for _ in range(10):
        ids = rng.permutation(10 * NUM)[:NUM] * 10**9
        first, second = np.sort(rng.permutation(NUM)[:2])
        ids[second] = ids[first]
        if strings:
            ids = [str(value) for value in ids]
        places = []
        for row in (first, second):
            shard = np.searchsorted(CUTS, row, side="right") - 1
            places.append(f"row {row - CUTS[shard]} of shard {shard}")
        with pytest.raises(ValueError, match=" and in ".join(places)):
            build_folder(tmp_path / "new", make_shards(all_ids=ids), tree=TREE)


def test_equal_hashes_of_different_strings_are_no_repetition(tmp_path, monkeypatch):
    hashes = "ehi.index.stream.sorting._hash"
    monkeypatch.setattr(hashes, lambda ids: np.full(len(ids), 7, np.uint64))
    build_folder(tmp_path / "new", make_shards(), tree=TREE)
    with pytest.raises(ValueError, match="repeat: 'dök/3' is in row 3 of shard 0"):
        build_folder(tmp_path / "new", make_shards(ids=IDS[3:282]), tree=TREE)
