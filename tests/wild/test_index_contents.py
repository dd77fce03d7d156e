"""Documents, ids and vectors as they come from the wild.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import ml_dtypes
import numpy as np
import pytest
from saved_index import (
    CODES,
    EXPECTED,
    NODES,
    NUM,
    QUERIES,
    TREE,
    WIDTH,
    X,
    found,
    saved,
)
from wild_cases import failed, passed

from ehi.index import (
    IndexCorruptError,
    Shard,
    build_folder,
    build_index,
    open_index,
    save_index,
)
from ehi.index.search.routing import route

# Documents to show.


@pytest.mark.parametrize(
    "values",
    [
        ["text", "with\nbreak", "\u2028"],  # U+2028 ends a line for str.splitlines
        [1, 2.5, None],
        [[1, 2], {}, ""],
        [{"title": "\ud800"}, {"a": {"b": 1}}, True],  # half a surrogate pair
        ({"n": n} for n in range(3)),
    ],
    ids=["strings", "numbers", "nested", "surrogates", "generator"],
)
def test_any_json_value_can_be_shown_passed(tmp_path, values):
    """`save_index` takes JSON values."""
    index = build_index(X[:3], range(3), tree=None)
    given = list(values)
    save_index(index, tmp_path / "index", documents=iter(given))
    opened = open_index(tmp_path / "index", verify=True)
    assert [opened.document(row) for row in range(3)] == given


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", np.float32(1), float("nan"), X[0]])
def test_what_is_not_json_is_refused_failed(tmp_path, value):
    """RFC 8259 forbids NaN, and other readers refuse it."""
    index = build_index(X[:2], range(2), tree=None)
    with pytest.raises(ValueError, match="documents to show must be JSON"):
        save_index(index, tmp_path / "index", documents=["fine", value])
    assert not (tmp_path / "index").exists()


def test_a_config_reads_the_same_before_and_after_saving_failed(tmp_path):
    """JSON has strings for numbers as keys, and lists for tuples."""
    config = {"sizes": (1, 2), "by": {3: "x"}}
    index = build_index(X, range(NUM), tree=TREE, config=config, encoder=config)
    save_index(index, tmp_path / "index")
    index.add(X[:1] + 1, [100], encoder=config)  # the same encoder
    read = {"sizes": [1, 2], "by": {"3": "x"}}
    assert index.config == open_index(tmp_path / "index").config == read


# Ids and rows.


def test_ids_of_any_text_come_back_passed(tmp_path):
    """An id is any Unicode text; composed and decomposed letters are two
    texts (Unicode, UAX 15), as a dict has it."""
    names = ["", "\0", "a\nb", "a\tb", " ", "\u00e9", "e\u0301", "🙂", "x" * 10_000]
    index = build_index(X[: len(names)], np.array(names, object), tree=None)
    save_index(index, tmp_path / "index")
    opened = open_index(tmp_path / "index", verify=True)
    assert opened.external_ids(np.arange(len(names))).tolist() == names
    assert opened.delete(["e\u0301"]) == 1
    assert opened.search(X[5:6], 1).ids.tolist() == [["\u00e9"]]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        failed(
            ["a", "\ud800"], "an id is not valid Unicode: .*surrogates", id="surrogate"
        ),
        # h5py gives bytes, and pandas floats after a join.
        passed([b"a", b"b"], "all strings or all integers .* got b'a'", id="bytes"),
        passed([1, None], "got None among 2", id="none"),
        passed([1.0, 2.0], "got 1.0 among 2", id="floats"),
        passed([True, False], "got True among 2", id="bools"),
        passed(["1", 1], "got '1' among 2", id="mixed"),
        passed([0, 2**63], "got 9223372036854775808", id="large"),
        passed(
            np.array([0, 2**64 - 1], np.uint64), "got 18446744073709551615", id="uint64"
        ),
        passed(
            np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"),
            "among 2",
            id="days",
        ),
        passed("ab", "several in a row", id="text"),
        passed(np.array([[1], [2]]), "several in a row", id="column"),
    ],
)
def test_other_ids_are_refused(ids, words):
    """No id is converted: 1.0 and '1' might be two documents."""
    with pytest.raises(ValueError, match=words):
        build_index(X[:2], ids, tree=None)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("strings", [False, True])
def test_rows_that_do_not_exist_failed(segments, strings):
    """They are an IndexError, as for NumPy's `take`."""
    names = [f"d{i}" for i in range(9)] if strings else range(9)
    index = build_index(X[: 12 // segments - 3], names[: 12 // segments - 3], tree=None)
    while index.num_documents < 9:
        start = index.num_documents
        index.add(X[start : start + 4], names[start : start + 4])
    assert index.contents.num_rows == 9
    none = None if strings else -1
    assert index.external_ids([8, -1]).tolist() == [names[8], none]
    for rows in ([9], [0, -2], np.array([[10**12]]), [-(10**12)]):
        with pytest.raises(IndexError, match="is outside the 9 rows of this index"):
            index.external_ids(rows)
    with pytest.raises(ValueError, match="rows must be integers, got float64"):
        index.external_ids([0.5])
    assert index.external_ids([]).tolist() == []
    # Results that do not exist are padding, however the documents came.
    hits = index.search(QUERIES, 11)
    assert (hits.rows[:, 9:] == -1).all()
    assert (hits.rows[:, :9] >= 0).all()
    for k in (0, -1, 2**20 + 1, 1.5):
        with pytest.raises(ValueError, match="k must be"):
            index.search(QUERIES, k)


# Vectors.


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(">f4"),  # a file of another machine
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.longdouble),
        np.asfortranarray,
        lambda x: x[::-1][::-1],
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: memoryview(np.ascontiguousarray(x)),
    ],
)
def test_floats_of_any_layout_passed(convert):
    """NumPy's own products do not depend on byte order and strides."""
    codebooks = convert(NODES[0])
    assert codebooks is not None
    tree = {"kind": "per_node", "nodes": [np.asarray(convert(NODES[0]))[None]]}
    index = build_index(convert(X), range(NUM), tree=tree | {"scale": 1.0})
    assert found(index) == EXPECTED
    assert index.search(convert(QUERIES), 5, beam=4).ids.tolist() == EXPECTED


def test_bfloat16_is_the_float32_it_stands_for_failed():
    """JAX computes with it, and every bfloat16 is a float32."""
    half = X.astype(ml_dtypes.bfloat16)
    index = build_index(half, range(NUM), tree=TREE)
    same = build_index(half.astype(np.float32), range(NUM), tree=TREE)
    one, other = (i.search(half[:5], 5, beam=4) for i in (index, same))
    assert (one.ids == other.ids).all()
    assert (one.scores == other.scores).all()


LONG = X.copy()
LONG[5] *= np.float32(2e19)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, CODES], ids=["raw", "codes"])
def test_vectors_whose_products_overflow_are_refused_failed(tmp_path, options):
    """Products of two such rows exceed float32, 3.4e38. Scores would be inf - inf, and
    results would be lost."""
    words = "a vector of norm 2e.19, beyond 1.1e.12, where float32 products overflow"
    with pytest.raises(ValueError, match=f"embeddings hold {words}, in 1 rows, .* 5"):
        build_index(LONG, range(NUM), tree=TREE, **options)
    index = saved(tmp_path / "index", **options)
    for write in (index.add, index.update):
        with pytest.raises(ValueError, match=words):
            write(LONG, range(NUM))
    with pytest.raises(ValueError, match=f"shard 0 holds {words}, in row 5"):
        shards = [Shard(LONG, range(NUM))]
        build_folder(tmp_path / "streamed", shards, tree=TREE, **options)
    with pytest.raises(ValueError, match="NaN or infinity"):
        build_index(X.astype(np.float64) * 1e300, range(NUM), tree=TREE, **options)
    with pytest.raises(ValueError, match="beyond 7.74e.25"):
        index.search(QUERIES * np.float32(1e30), 5)
    assert found(index) == found(build_index(X, range(NUM), tree=TREE, **options))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, CODES], ids=["raw", "codes"])
def test_the_largest_vectors_are_ranked_alike_alone_and_in_a_batch_failed(options):
    """The order of results does not depend on a factor."""
    scale = {name: value * np.float32(2.0**38) for name, value in options.items()}
    index = build_index(X * np.float32(2.0**38), range(NUM), tree=TREE, **scale)
    queries = QUERIES * np.float32(2.0**84)
    batch = index.search(queries, 5, beam=4)
    assert np.isfinite(batch.scores).all()
    alone = [index.search(queries[i : i + 1], 5, beam=4).ids[0] for i in range(7)]
    assert (np.array(alone) == batch.ids).all()
    assert (batch.ids == found(build_index(X, range(NUM), tree=TREE, **options))).all()


def _two_levels(factor=1.0, scale=1.0, **layer):
    rng = np.random.default_rng(3)
    nodes = [
        factor * rng.standard_normal((b, 4, WIDTH)).astype(np.float32) for b in (1, 4)
    ]
    return {"kind": "per_node", "nodes": nodes, "scale": scale, **layer}


def _residual(w_in, w_out):
    rng = np.random.default_rng(4)
    arrays = rng.standard_normal((2, WIDTH, WIDTH)).astype(np.float32)
    arrays *= np.float32([w_in, w_out])[:, None, None]
    return {"w_in": arrays[0], "w_out": arrays[1]}


def _per_level(u, w):
    rng = np.random.default_rng(6)
    wide = (WIDTH, WIDTH + 4)
    return {
        "kind": "per_level",
        "u": [u * rng.standard_normal((e, e)).astype(np.float32) for e in wide],
        "w": [w * rng.standard_normal((e, 4)).astype(np.float32) for e in wide],
    }


LONGEST = 7e25  # a query's norm that is allowed


@pytest.mark.parametrize(
    "tree",
    [
        failed(_two_levels(scale=1e15), id="scale"),
        failed(_two_levels(scale=-3e38), id="largest scale"),
        failed(_two_levels(factor=1e10, scale=1e3), id="nodes"),
        failed(_two_levels(**_residual(1e5, 1e7)), id="layer"),
        failed(_two_levels(scale=0.0, **_residual(1e11, 1e11)), id="times zero"),
        failed(_per_level(1e5, 1e7), id="per level"),
    ],
)
def test_trees_whose_scores_overflow_are_refused(tree):
    """inf - inf would lose the leaves of a query, and fail a batch."""
    words = "tree gives scores of up to .* to a query of norm 7.74e.25, .* float32"
    with pytest.raises(ValueError, match=f"^{words}"):
        build_index(X, range(NUM), tree=tree)
    with pytest.raises(ValueError, match=f"^query_{words}"):
        build_index(X, range(NUM), tree=_two_levels(), query_tree=tree)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "tree",
    [
        passed(_two_levels(scale=1e10), id="scale"),
        passed(_two_levels(scale=20.0, **_residual(1, 1)), id="layer"),
        passed(_per_level(1, 1), id="per level"),
    ],
)
def test_large_trees_rank_alike_alone_and_in_a_batch(tree):
    """A search of three queries is three searches of one."""
    index = build_index(X, range(NUM), tree=tree)
    queries = QUERIES[:3].copy()
    queries[1] *= np.float32(LONGEST / 2)
    for beam in (1, 2, 4, 16):
        batch = index.search(queries, 2, beam=beam).ids
        for i in range(3):
            alone = index.search(queries[i : i + 1], 2, beam=beam).ids[0]
            assert (alone == batch[i]).all()


@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize(
    ("rows", "beam"),
    [
        *(failed(slice(1, 2), beam, id=f"alone-{beam}") for beam in (1, 2, 4, 16)),
        *(failed(slice(3), beam, id=f"batch-{beam}") for beam in (4, 16)),
        *(passed(slice(3), beam, id=f"batch-{beam}") for beam in (1, 2)),
    ],
)
def test_scores_that_are_no_numbers_are_refused(rows, beam):
    """A folder may hold such a tree: one query is told as a batch is."""
    queries = QUERIES[:3].copy()
    queries[1] *= np.float32(LONGEST)
    tree = _two_levels(scale=1e15)
    with pytest.raises(IndexCorruptError, match="scores that are not numbers"):
        route(queries[rows], tree, beam)
    holed = {**tree, "nodes": [tree["nodes"][0] * np.float32(np.nan)]}
    with pytest.raises(IndexCorruptError, match="scores that are not numbers"):
        route(queries[rows], holed, min(beam, 4), normalise=False)


SMALL = X.copy()
SMALL[7] *= np.float32(1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"rerank_vectors": True},
        {"leaf_dtype": "float16"},
        CODES | {"rerank_vectors": True},
    ],
    ids=["rerank", "leaves", "codes"],
)
def test_vectors_too_small_for_float16_are_refused_failed(tmp_path, options):
    """The smallest float16 that keeps its digits is 2^-14 (IEEE 754), and below it all
    scores become 0. Vectors of zeros are right as they are."""
    words = "only values too small for float16, the largest .*e-09, where 6.1e-05"
    with pytest.raises(
        ValueError, match=f"{words} is needed, in 1 rows, first in row 7"
    ):
        build_index(SMALL, range(NUM), tree=TREE, **options)
    index = saved(tmp_path / "index", **options)
    with pytest.raises(ValueError, match=words):
        index.add(SMALL[7:8], [100])
    with pytest.raises(ValueError, match=words):
        shards = [Shard(SMALL, range(NUM))]
        build_folder(tmp_path / "streamed", shards, tree=TREE, **options)
    assert index.num_documents == NUM
    index.add(np.zeros((1, WIDTH)), [100])
    build_index(SMALL, range(NUM), tree=TREE)  # float32 holds them


@pytest.mark.parametrize("leaves", [{}, {"leaf_dtype": "float16"}, CODES])
@pytest.mark.parametrize("how", ["built", "streamed", "added", "compacted", "saved"])
def test_equal_documents_are_stored_alike_and_by_row_passed(tmp_path, leaves, how):
    """With equal bytes, only rows can order equal documents, so each leaf has
    them by row, whichever way they came. Faiss keeps the order of `add` as well."""
    x = X[np.arange(48) // 4 % 12]  # 12 documents, four times each
    x = np.concatenate([x, X[np.arange(48) % 12]])
    path = tmp_path / "index"
    if how == "streamed":
        shards = [Shard(x[:50], range(50)), Shard(x[50:], range(50, 96))]
        build_folder(path, shards, tree=TREE, **leaves)
        index = open_index(path)
    else:
        index = build_index(x[:50], range(50), tree=TREE, **leaves)
        if how == "built":
            index = build_index(x, range(96), tree=TREE, **leaves)
        else:
            index.add(x[50:70], range(50, 70))
            index.add(x[70:], range(70, 96))
        if how == "compacted":
            index.compact()
        if how == "saved":
            save_index(index, path)
            index = open_index(path)
    stored = {}
    for segment in index.segments:
        values = segment.vectors if segment.codes is None else segment.codes
        for leaf in range(4):
            start, stop = segment.leaf_offsets[leaf : leaf + 2]
            rows = segment.rows(start, stop)
            assert (np.diff(rows) > 0).all()
            for row, value in zip(rows.tolist(), values[start:stop], strict=True):
                stored[row] = leaf, value.tobytes()
    for row in range(96):
        twins = [other for other in range(96) if (x[other] == x[row]).all()]
        assert {stored[twin] for twin in twins} == {stored[row]}
