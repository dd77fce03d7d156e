"""Queries, filters and corpora of every kind: the right answer, or one sentence.

Expected values are those of a sort of all scores, of NumPy's own conversions, or of the
same search with plain arguments. A case that failed before its test was written has
`failed` at the end of its id or of its test's name, others have `passed`.
"""

import fractions

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wild_cases import failed, passed

from ehi.index import build_index, open_index, save_index
from ehi.index.search.search import route_queries
from ehi.index.sharded import answer, merge_answers, split_index

WIDTH, NUM, LEAVES = 384, 600, 6
RNG = np.random.default_rng(4)
TREE = {
    "kind": "per_node",
    "nodes": [RNG.standard_normal((1, LEAVES, WIDTH), np.float32)],
    "scale": 1.0,
}
WORDS = RNG.standard_normal((WIDTH // 8, 256, 8), np.float32) / 4
QUERIES = RNG.standard_normal((40, WIDTH), np.float32)
KINDS = {
    "raw": {},
    "half": {"leaf_dtype": "float16"},
    "spilled": {"spill": 2},
    "pq": {"codebooks": WORDS},
    "pq16": {"codebooks": WORDS[:, :16], "spill": 2},
    "residual": {"codebooks": WORDS, "leaf_centroids": TREE["nodes"][0][0] / 20},
    "rerank": {"codebooks": WORDS[:, :16], "rerank_vectors": True},
}


def with_copies(num, seed=0):
    """Unit embeddings (num, D), each about four times; which they are a copy of."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((num // 4, WIDTH), np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    which = rng.integers(0, len(base), num)
    return base[which], which


def assert_copies_in_row_order(rows, which, found=None):
    """Each query finds the first copies of a document, smaller rows first."""
    there = np.arange(len(which)) if found is None else found
    for ranking in rows:
        ranking = ranking[ranking >= 0]
        for document in set(which[ranking].tolist()):
            mine = ranking[which[ranking] == document]
            first = there[which[there] == document][: len(mine)]
            assert mine.tolist() == first.tolist()


def in_shards(parts, k, rerank=0, **settings):
    sizes = [part.contents.num_rows for part in parts]
    leaves, _ = route_queries(parts[0].parameters, QUERIES, settings["beam"])
    answers = [
        answer(part, QUERIES, leaves, k, rerank=rerank, **settings) for part in parts
    ]
    return merge_answers(answers, np.cumsum(sizes) - sizes, k)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_documents_come_in_row_order_failed(kind, tmp_path):
    """Alone, in batches, by threads and by shards."""
    x, which = with_copies(NUM)
    index = build_index(x, range(NUM), tree=TREE, **KINDS[kind])
    save_index(index, tmp_path / "index")
    folders = split_index(tmp_path / "index", tmp_path, 3)
    parts = [open_index(folder) for folder in folders]
    for k, beam in ((1, 1), (10, 3), (150, 4), (NUM, LEAVES)):
        options = {"beam": beam} | ({"rerank": NUM} if kind == "rerank" else {})
        batch = index.search(QUERIES, k, **options)
        threads = index.search(QUERIES, k, threads=3, **options)
        ones = [index.search(query[None], k, **options) for query in QUERIES]
        rows = [
            batch.rows,
            threads.rows,
            np.concatenate([one.rows for one in ones]),
            in_shards(parts, k, **options)["rows"],
        ]
        scores = np.concatenate([one.scores for one in ones])
        for found in rows:
            assert_copies_in_row_order(found, which)
        # Others may swap only where their scores are that close.
        np.testing.assert_allclose(batch.scores, scores, atol=2e-6, rtol=1e-5)


def test_copies_whose_scores_nearly_cancel_failed():
    """Scores are far smaller than the rounding errors of their terms."""
    x, which = with_copies(NUM, seed=2)
    x = np.concatenate([x, np.full((NUM, 1), 30, np.float32)], axis=1)
    x = np.pad(x, ((0, 0), (0, WIDTH % 8 + 7)))[:, : WIDTH + 8]
    queries = np.pad(QUERIES, ((0, 0), (0, 8)))
    best = np.sort(queries @ x.T, axis=1)[:, -5]
    queries[:, WIDTH] = -best / 30  # the fifth best score becomes about zero
    index = build_index(x, range(NUM), tree=None)
    for k in (1, 5, 100):
        batch = index.search(queries, k)
        ones = [index.search(query[None], k).rows for query in queries]
        assert_copies_in_row_order(batch.rows, which)
        assert_copies_in_row_order(np.concatenate(ones), which)


def test_a_shard_without_any_document_that_may_be_found_passed(tmp_path):
    index = build_index(with_copies(NUM)[0], range(NUM), tree=TREE)
    save_index(index, tmp_path / "index")
    folders = split_index(tmp_path / "index", tmp_path, 3)
    parts = [open_index(folder) for folder in folders]
    for allow in (range(200), [], [599]):
        found = in_shards(parts, 7, beam=LEAVES, allow=allow)
        hits = index.search(QUERIES, 7, beam=LEAVES, allow=allow)
        assert (found["rows"] == hits.rows).all()
        assert (found["visited"] == hits.visited).all()


def test_equal_documents_of_all_segments_come_in_row_order_failed():
    """Copies are added later, and some of them are deleted."""
    x, which = with_copies(NUM, seed=1)
    index = build_index(x[:200], range(200), tree=TREE)
    index.add(x[200:350], range(200, 350))
    index.add(x[350:], range(350, NUM))
    gone = RNG.choice(NUM, 90, replace=False)
    index.delete(gone.tolist())
    denied = RNG.choice(NUM, 50, replace=False)
    found = np.setdiff1d(np.arange(NUM), np.concatenate([gone, denied]))
    for k in (3, 40, 400):
        options = {"beam": LEAVES, "deny": denied}
        batch = index.search(QUERIES, k, **options)
        ones = [index.search(query[None], k, **options).rows for query in QUERIES]
        assert_copies_in_row_order(batch.rows, which, found)
        assert_copies_in_row_order(np.concatenate(ones), which, found)


@pytest.mark.parametrize("leaf_dtype", ["float32", "float16"])
@pytest.mark.parametrize("num", [1, 33, 5000])
def test_a_corpus_of_one_document_over_and_over_failed(num, leaf_dtype):
    """An empty text may stand in a corpus many thousand times."""
    x = np.tile(QUERIES[:1], (num, 1))
    index = build_index(x, range(num), tree=None, leaf_dtype=leaf_dtype)
    for queries in (QUERIES, QUERIES[:1], -QUERIES[:1]):
        hits = index.search(queries, min(num, 12))
        assert (hits.rows == np.arange(min(num, 12))).all()
        assert np.ptp(hits.scores, axis=1).max() == 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 70), st.sampled_from([3, 8, 33]),
    st.integers(0, 2**32 - 1), st.booleans(),
)  # fmt: skip
def test_any_corpus_with_copies_is_ranked_by_score_and_then_row_failed(
    num, k, width, seed, shared
):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((max(1, num // 3), width), np.float32)
    which = rng.integers(0, len(base), num)
    index = build_index(base[which], range(num), tree=None)
    queries = rng.standard_normal((1, width), np.float32)
    hits = index.search(np.tile(queries, (8 if shared else 1, 1)), k)
    exact = (base.astype(np.float64) @ queries[0].astype(np.float64))[which]
    order = np.lexsort((np.arange(num), -exact))[:k]
    found = hits.rows[-1][: len(order)]
    np.testing.assert_allclose(exact[found], exact[order], atol=1e-5)
    assert_copies_in_row_order(hits.rows, which)


X = RNG.standard_normal((50, 8), np.float32)
SMALL = build_index(X, [f"d{i}" for i in range(50)], tree=None)
NUMBERED = build_index(X, range(50), tree=None)
FEW = X[:6] + RNG.standard_normal((6, 8), np.float32)


def shaped(array, how):
    """The same values in another memory layout."""
    if how == "backwards":
        return array[::-1, ::-1].copy()[::-1, ::-1]
    if how == "gaps":
        wide = np.zeros((2 * len(array), 3 * array.shape[1]), array.dtype)
        wide[::2, ::3] = array
        return wide[::2, ::3]
    if how == "broadcast":
        return np.broadcast_to(array[:1], array.shape)
    if how == "unaligned":
        raw = np.zeros(array.nbytes + 1, np.uint8)[1:]
        raw[:] = np.ascontiguousarray(array).view(np.uint8).ravel()
        return raw.view(array.dtype).reshape(array.shape)
    return {"fortran": np.asfortranarray, "list": np.ndarray.tolist}[how](array)


@pytest.mark.parametrize("how", ["backwards", "gaps", "broadcast", "unaligned"])
@pytest.mark.parametrize(
    "dtype",
    [
        *map(passed, ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8", "longdouble"]),
        failed(ml_dtypes.bfloat16, id="bfloat16"),
    ],
)
def test_floats_of_every_kind_and_layout(dtype, how):
    """They are what NumPy casts them to."""
    queries = shaped(FEW.astype(dtype), how)
    plain = np.ascontiguousarray(np.asarray(queries), np.float32)
    queries.flags.writeable = False
    for part in (slice(None), slice(0, 1)):
        hits, expected = SMALL.search(queries[part], 4), SMALL.search(plain[part], 4)
        assert (hits.ids == expected.ids).all()
        assert (hits.scores == expected.scores).all()


def test_fortran_order_and_nested_lists_passed():
    expected = SMALL.search(FEW, 4).ids
    assert (SMALL.search(shaped(FEW, "fortran"), 4).ids == expected).all()
    assert (SMALL.search(shaped(FEW, "list"), 4).ids == expected).all()


@pytest.mark.parametrize(
    "queries",
    [
        FEW.astype(np.int32), FEW.astype(complex), FEW.astype(object), FEW > 0,
        FEW.astype("U8"), np.zeros((2, 8), "M8[D]"), np.zeros((2, 8), [("a", "f4")]),
    ],
    ids=lambda queries: str(queries.dtype),
)  # fmt: skip
def test_queries_that_are_no_floats_are_refused_passed(queries):
    with pytest.raises(ValueError, match="queries must be floats, got dtype"):
        SMALL.search(queries)


@pytest.mark.parametrize("shape", [(8,), (), (2, 0), (2, 7), (2, 1, 8), (8, 2)])
def test_queries_of_another_shape_are_refused_passed(shape):
    with pytest.raises(ValueError, match=r"shape \(N, 8\), the width of the index"):
        SMALL.search(np.zeros(shape))


def test_zero_and_tiny_queries_rank_alike_alone_and_together_passed():
    """All scores of a zero query are 0, so its results are the first rows."""
    zero = np.zeros((6, 8), np.float32)
    zero[::2] = -0.0
    assert (NUMBERED.search(zero, 7).ids == np.arange(7)).all()
    assert (NUMBERED.search(zero[:1], 7).ids == np.arange(7)).all()
    tiny = FEW * np.float32(2.0**-100)  # a power of two changes no order
    for part in (slice(None), slice(0, 1)):
        expected = NUMBERED.search(FEW[part], 7).ids
        assert (NUMBERED.search(tiny[part], 7).ids == expected).all()


def test_products_that_overflow_are_refused_and_others_rank_alike_failed():
    """inf - inf would lose a result, and another one in a batch."""
    x = np.where(np.arange(50)[:, None] == 3, 1e30, X)
    with pytest.raises(ValueError, match="float32 products overflow.*first in row 3"):
        build_index(x, range(50), tree=None)
    with pytest.raises(ValueError, match="queries hold .*float32 products overflow"):
        NUMBERED.search(FEW * np.float32(1e35))
    large = FEW * np.float32(2.0**80)
    for part in (slice(None), slice(0, 1)):
        expected = NUMBERED.search(FEW[part], 7).ids
        assert (NUMBERED.search(large[part], 7).ids == expected).all()


@pytest.mark.parametrize("k", [1, np.int8(3), np.uint64(3), True, 50, 51, 2**20])
def test_numbers_of_results_of_every_kind_passed(k):
    hits = SMALL.search(FEW[:1], k)
    assert hits.ids.shape == (1, int(k))
    assert (hits.rows >= 0).sum() == min(int(k), 50)


@pytest.mark.parametrize("k", [0, -1, 2**20 + 1, 2**63, 3.0, "3", None, [3]])
def test_numbers_of_results_that_are_none_are_refused_passed(k):
    with pytest.raises(ValueError, match="^k must be (at|a whole)"):
        SMALL.search(FEW, k)


def found_rows(index, k=50, **options):
    rows = index.search(FEW, k, **options).rows
    assert all(set(row) == set(rows[0]) for row in rows)
    return sorted(set(rows[0].tolist()) - {-1})


@pytest.mark.parametrize(
    "ids",
    [
        [3, 7, 7], (3, 7), {3, 7}, range(3, 8, 4), np.array([3, 7], np.uint8),
        np.array([3, 7], ">i8"), np.array([3, 7], object), {3: "a", 7: "b"},
        np.array([[3, 7], [0, 0]])[0], iter([3, 7]), [np.int16(3), 7, 10**18],
    ],
    ids=lambda ids: type(ids).__name__,
)  # fmt: skip
def test_allowed_numbers_in_any_container_passed(ids):
    assert found_rows(NUMBERED, allow=ids) == [3, 7]


@pytest.mark.parametrize(
    "ids",
    [
        ["d3", "d7", "no such id"], ("d3", "d7"), {"d3", "d7"}, iter(["d3", "d7"]),
        np.array(["d3", "d7"]), np.array(["d3", "d7"], object), [np.str_("d3"), "d7"],
    ],
    ids=lambda ids: type(ids).__name__,
)  # fmt: skip
def test_allowed_names_in_any_container_passed(ids):
    assert found_rows(SMALL, allow=ids) == [3, 7]


def test_masks_of_any_layout_and_both_filters_passed():
    mask = np.isin(np.arange(50), [3, 7])
    wide = np.zeros(100, bool)
    wide[::2] = mask
    for same in (mask, wide[::2], mask[::-1].copy()[::-1]):
        same.flags.writeable = False
        assert found_rows(SMALL, allow=same) == [3, 7]
        assert found_rows(SMALL, deny=~same, allow=None) == [3, 7]
    assert found_rows(SMALL, allow=mask, deny=["d7"]) == [3]  # a denied id stays out
    assert found_rows(SMALL, allow=[]) == []
    assert found_rows(SMALL, deny=[]) == list(range(50))
    assert found_rows(NUMBERED, allow=np.array([0, 1, 1, 0])) == [0, 1]  # ids, no mask


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ("d3", "several in a row"),
        (b"d3", "several in a row"),
        (3, "several in a row"),
        ([b"d3"], "ids must be all strings or all integers"),
        (["d3", 3], "ids must be all strings or all integers"),
        ([3], "ids of this index are strings, got integers"),
        ([True] * 50, "ids must be all strings or all integers"),
        ([3.0], "ids must be all strings or all integers"),
        ([-1], "ids must be all strings or all integers"),
        ([None], "ids must be all strings or all integers"),
        (np.ones(49, bool), r"mask of shape \(49,\), this index has 50 rows"),
        (np.ones((50, 1), bool), r"mask of shape \(50, 1\)"),
        (np.array([["d3"]]), "several in a row"),
    ],
)
@pytest.mark.parametrize("name", ["allow", "deny"])
def test_filters_that_are_none_are_refused_passed(name, chosen, words):
    with pytest.raises(ValueError, match=words):
        SMALL.search(FEW, **{name: chosen})


@pytest.mark.parametrize(
    "min_prob", [np.float16(0.5), fractions.Fraction(1, 2), True, 0]
)
def test_probabilities_of_every_kind_passed(min_prob):
    assert (SMALL.search(FEW, 3, min_prob=min_prob).leaves == 0).all()


@pytest.mark.parametrize("min_prob", [np.nan, -1e-9, 1.0001, "0.5", 1j, [0.5]])
def test_probabilities_that_are_none_are_refused_passed(min_prob):
    with pytest.raises(ValueError, match="min_prob must be a number between 0 and 1"):
        SMALL.search(FEW, min_prob=min_prob)


def test_none_is_no_probability_passed():
    alone, given = SMALL.search(FEW, 3), SMALL.search(FEW, 3, min_prob=None)
    assert (alone.ids == given.ids).all() and (alone.visited == given.visited).all()


def test_more_threads_than_work_passed():
    for queries in (FEW, FEW[:1], FEW[:0]):
        many = SMALL.search(queries, 3, threads=np.int32(40))
        assert (many.ids == SMALL.search(queries, 3).ids).all()
