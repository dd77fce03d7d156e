"""Shards of every kind: the index that `build_index` makes of them, or one sentence.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`.
"""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wild_cases import failed, passed

from ehi.index import Shard, build_folder, build_index, open_index, save_index
from ehi.index.sharded import ShardedIndex, split_index

X = np.random.default_rng(0).standard_normal((6, 4), np.float32)
NAMES = list("abcdef")


def built(path, *shards, **arguments):
    build_folder(path, shards, tree=None, **arguments)
    return open_index(path, verify=True)


def ids_of(index):
    return index.external_ids(np.arange(index.num_documents)).tolist()


@pytest.mark.parametrize(
    "ids",
    [
        range(6), tuple(range(6)), np.arange(6, dtype=np.uint8),
        np.arange(6, dtype=">i4"), np.arange(12, dtype=np.int16)[::2],
        np.array([0, 1, 2, 3, 4, 2**63 - 1], np.uint64), np.array(range(6), object),
        [np.int8(i) for i in range(6)], NAMES, np.array(NAMES), np.array(NAMES, object),
        np.array(NAMES)[::-1], [np.str_(name) for name in NAMES],
        ["é", "e\u0301", "", "\x00", " ", "\n"],
    ],
    ids=lambda ids: f"{type(ids).__name__} {getattr(ids, 'dtype', '')}",
)  # fmt: skip
def test_ids_of_every_kind_passed(ids, tmp_path):
    """Ids differ if their bytes differ, as in `build_index` and BEIR."""
    index = built(tmp_path / "new", Shard(X, ids))
    assert ids_of(index) == list(ids)
    assert ids_of(build_index(X, ids, tree=None)) == list(ids)
    assert (index.search(X, 1).ids[:, 0] == list(ids)).sum() >= 4


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        failed(set(range(6)), "ids must be an array, a sequence .* got set", id="set"),
        failed(iter(range(6)), "ids must be .* got range_iterator", id="iterator"),
        failed(dict.fromkeys(NAMES), "ids must be .* got dict", id="dict"),
        failed(dict.fromkeys(NAMES).keys(), "ids must be .* got dict_keys", id="keys"),
        failed(None, "ids must be .* got NoneType", id="none"),
        passed([b"a"] * 6, "ids must be all strings or all integers"),
        passed([*range(5), "5"], "ids must be all strings or all integers"),
        passed(np.arange(6.0), "ids must be all strings or all integers"),
        passed(np.arange(6) > 2, "ids must be all strings or all integers"),
        passed([-1, *range(5)], "from 0 to 2.63 - 1, got -1"),
        passed(np.array([2**63, *range(5)], np.uint64), "got 9223372036854775808"),
        failed(["\ud800", *NAMES[1:]], "is not valid Unicode", id="surrogate"),
        passed(NAMES[:5], "has 6 embeddings for 5 ids"),
    ],
)
def test_ids_that_are_none_are_refused(ids, words, tmp_path):
    with pytest.raises(ValueError, match=f"shard 0.*{words}"):
        built(tmp_path / "new", Shard(X, ids))
    assert not os.listdir(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_repeated_ids_are_found_in_any_shards_passed(tmp_path_factory, data):
    values = st.one_of(
        st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=9),
        st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2),
    )
    ids = data.draw(values)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    x = np.ones((len(ids), 2), np.float32)
    edges = [0, *cuts, len(ids)]
    shards = [Shard(x[a:b], ids[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    path = tmp_path_factory.mktemp("ids") / "new"
    if len(set(ids)) == len(ids):
        assert ids_of(built(path, *shards)) == ids
    else:
        with pytest.raises(ValueError, match="doc_ids repeat"):
            built(path, *shards)


@pytest.mark.parametrize(
    "names",
    [
        passed([0, 1]), failed([np.int64(0), np.int64(1)]), failed([np.uint8(0), 1]),
        passed(["a", "b"]), passed([np.str_("a"), "b"]), passed(["", "\x00"], id="NUL"),
        passed(["10", "9"]),
    ],
)  # fmt: skip
def test_names_of_every_kind_give_the_order(names, tmp_path):
    """Strings come in the order of Python's `sorted`."""
    parts = [Shard(X[:3], range(3), name=names[0]), Shard(X[3:], [7, 8, 9], names[1])]
    for number, shards in enumerate((parts, parts[::-1])):
        index = built(tmp_path / str(number), *shards)
        assert ids_of(index) == [0, 1, 2, 7, 8, 9]


@pytest.mark.parametrize("names", [[0.0, 1.0], [Path("a"), Path("b")], [b"a", b"b"]])
def test_names_of_other_kinds_are_refused_passed(names, tmp_path):
    shards = [Shard(X[:3], range(3), names[0]), Shard(X[3:], [7, 8, 9], names[1])]
    with pytest.raises(
        ValueError, match="names of shards must be all strings or all n"
    ):
        built(tmp_path / "new", *shards)


@pytest.mark.parametrize(
    "dtype",
    [
        *map(passed, ["<f2", ">f4", "f8", "longdouble"]),
        failed(ml_dtypes.bfloat16, id="bfloat16"),
    ],
)
def test_floats_of_every_kind(dtype, tmp_path):
    x = X.astype(dtype)
    expected = build_index(x, range(6), tree=None).segments[0].vectors
    given = [x, np.asfortranarray(x), lambda: [x[:2], x[2:2], x[2:]]]
    for number, embeddings in enumerate(given):
        index = built(tmp_path / str(number), Shard(embeddings, range(6)))
        np.testing.assert_array_equal(index.segments[0].vectors, expected)


@pytest.mark.parametrize(
    ("embeddings", "words"),
    [
        passed(
            (x for x in X),
            "embeddings must be an array.* got generator",
            id="generator",
        ),
        failed(None, "embeddings must be an array.* got NoneType", id="none"),
        failed(b"x.npy", "embeddings must be an array.* got bytes", id="bytes"),
        failed(
            lambda: None, "must return an iterable of blocks, got NoneType", id="call"
        ),
        passed(
            lambda: X,
            r"must hold blocks \(any number, D\).* got the shape \(4,\)",
            id="rows",
        ),
        passed(lambda: [], r"must hold floats of shape .* of shape \(0,\)", id="empty"),
        passed(X.astype(int), "must hold floats of shape .* got int64", id="int"),
        passed(X > 0, "must hold floats of shape .* got bool", id="bool"),
        passed(
            X[:, :0], r"must hold floats of shape .* of shape \(6, 0\)", id="narrow"
        ),
        passed(
            X[:, :, None],
            r"must hold floats of shape .* of shape \(6, 4, 1\)",
            id="cube",
        ),
    ],
)
def test_embeddings_that_are_none_are_refused(embeddings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        built(tmp_path / "new", Shard(embeddings, range(6)))
    assert not os.listdir(tmp_path)


def test_what_is_no_shard_is_refused_failed(tmp_path):
    with pytest.raises(ValueError, match="shards must be Shards, got ndarray"):
        built(tmp_path / "new", X)


def test_files_in_any_order_of_memory_and_of_strings_passed(tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(X))
    np.save(tmp_path / "ids.npy", np.array(NAMES))
    index = built(tmp_path / "new", Shard(tmp_path / "x.npy", tmp_path / "ids.npy"))
    assert ids_of(index) == NAMES
    np.testing.assert_array_equal(index.segments[0].vectors, X)


def test_files_that_need_pickle_are_refused_passed(tmp_path):
    np.save(tmp_path / "ids.npy", np.array(NAMES, object), allow_pickle=True)
    with pytest.raises(ValueError, match="shard 0 cannot be read: .*ids.npy"):
        built(tmp_path / "new", Shard(X, tmp_path / "ids.npy"))


def test_documents_from_a_generator_passed(tmp_path):
    shard = Shard(X, range(6), documents=({"n": number} for number in range(6)))
    assert built(tmp_path / "new", shard).document(5) == {"n": 5}


def test_a_shard_that_changes_the_current_folder_failed(tmp_path, monkeypatch):
    """Paths are those of the call."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    np.save("ids.npy", np.array(NAMES))

    def blocks():
        os.chdir(tmp_path / "elsewhere")
        return [X]

    build_folder("new", [Shard(blocks, "ids.npy")], tree=None)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "ids.npy", "new"]
    assert not os.listdir(tmp_path / "elsewhere")
    assert ids_of(open_index(tmp_path / "new")) == NAMES


def test_parts_of_an_index_after_a_change_of_folder_failed(tmp_path, monkeypatch):
    """The folders returned are those that were written."""
    monkeypatch.chdir(tmp_path)
    save_index(build_index(X, NAMES, tree=None), "whole")
    folders = split_index("whole", "parts", 2)
    monkeypatch.chdir("/")
    assert [ids_of(open_index(folder)) for folder in folders] == [
        NAMES[:3],
        NAMES[3:],
    ]


def test_a_router_finds_its_shards_after_a_change_of_folder_failed(
    tmp_path, monkeypatch
):
    """An actor that is started again opens its folder again."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    monkeypatch.chdir(tmp_path)
    save_index(build_index(X, NAMES, tree=None), "whole")
    split_index("whole", "parts", 2)
    folders = sorted(Path("parts").iterdir())
    with ShardedIndex.start(folders) as index:
        monkeypatch.chdir("/")
        assert set(index.search(X, 6).ids[0]) == set(NAMES)
