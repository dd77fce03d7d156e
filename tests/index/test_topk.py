import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ehi.index.search.batch import Blocks, Workspace
from ehi.index.search.topk import (
    EMPTY,
    TopK,
    drop_duplicates,
    kth_bound,
    pack,
    smallest,
    unpack,
)


def offer(top, queries, scores, rows, leaves=1, order="C"):
    """Offers scores (n, m) as Blocks, with the documents divided into leaves."""
    cuts = np.array_split(np.arange(len(rows)), leaves)
    workspace = Workspace(
        np.empty(scores.size, np.float32), np.empty(scores.size, bool)
    )
    blocks = Blocks([queries] * leaves, [rows[cut] for cut in cuts], workspace, order)
    for out, cut in zip(blocks.scores, cuts, strict=True):
        assert out.T.flags.c_contiguous if order == "F" else out.flags.c_contiguous
        out[:] = scores[:, cut]
    top.offer(blocks)


floats = st.floats(width=32, allow_nan=False)
few_values = st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.0000001])


@given(st.lists(st.tuples(floats, st.integers(0, 2**32 - 2)), min_size=1))
def test_keys_order_by_score_then_number_and_unpack_exactly(pairs):
    scores = np.array([score for score, _ in pairs], np.float32)
    numbers = np.array([number for _, number in pairs])
    keys = pack(scores, numbers)
    order = np.argsort(keys, kind="stable")
    expected = np.lexsort((numbers, -scores))
    assert (scores[order] == scores[expected]).all()
    assert (numbers[order] == numbers[expected]).all()
    unpacked_scores, unpacked_numbers = unpack(keys)
    assert (unpacked_scores == scores).all() and (unpacked_numbers == numbers).all()
    assert (keys < EMPTY).all()


def test_empty_keys_are_missing_results():
    scores, numbers = unpack(smallest(pack(np.float32([[3.0]]), np.array([[7]])), 3))
    assert scores.tolist() == [[3.0, -np.inf, -np.inf]]
    assert numbers.tolist() == [[7, -1, -1]]


@given(
    npst.arrays(np.float32, (3, 6), elements=few_values),
    npst.arrays(np.int64, (3, 6), elements=st.integers(0, 3)),
)
def test_drop_duplicates_keeps_each_number_at_its_best_score(scores, numbers):
    found = drop_duplicates(np.sort(pack(scores, numbers), axis=1), 5)
    for row in range(3):
        best = {}
        for score, number in zip(scores[row], numbers[row], strict=True):
            best[number] = max(score, best.get(number, -np.inf))
        expected = sorted((-score, number) for number, score in best.items())
        result_scores, result_numbers = unpack(found[row])
        assert result_numbers[: len(best)].tolist() == [n for _, n in expected]
        assert (-result_scores[: len(best)]).tolist() == [s for s, _ in expected]
        assert (result_numbers[len(best) :] == -1).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 7), st.booleans(), st.sampled_from("CF"))
def test_top_k_of_blocks_is_the_top_k_of_all(data, k, compact, order):
    """Blocks of few distinct scores, in any order, with ties at every cut."""
    top = TopK(4, k)
    if compact:  # as if too many hits were stored after every block
        top._pending = 2**40
    seen = {query: [] for query in range(4)}
    row = 0
    for _ in range(data.draw(st.integers(1, 5))):
        queries = np.array(sorted(data.draw(st.sets(st.integers(0, 3), min_size=1))))
        m = data.draw(st.integers(1, 30))
        shape = (len(queries), m)
        scores = data.draw(npst.arrays(np.float32, shape, elements=few_values))
        rows = np.arange(row, row + m, dtype=np.uint32)
        row += m
        offer(top, queries, scores, rows, data.draw(st.integers(1, 3)), order)
        for query, values in zip(queries, scores, strict=True):
            seen[query] += list(zip((-values).tolist(), rows.tolist(), strict=True))
    scores, numbers = unpack(top.result())
    for query, pairs in seen.items():
        expected = sorted(pairs)[:k]
        assert numbers[query, : len(expected)].tolist() == [n for _, n in expected]
        assert (-scores[query, : len(expected)]).tolist() == [s for s, _ in expected]
        assert (numbers[query, len(expected) :] == -1).all()


@given(st.data(), st.integers(1, 40))
def test_the_bound_is_below_the_kth_best_and_above_most(data, k):
    m = data.draw(st.integers(k, 3000))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    scores = rng.standard_normal(m, np.float32)
    if data.draw(st.booleans()):
        scores = np.sort(scores)  # the best are neighbours
    bound = kth_bound(scores, k)
    assert bound <= np.sort(scores)[m - k]
    groups = max(128, 4 * k)  # the rest of the last run is left out
    assert (scores >= bound).sum() <= 2 * k + 20 + groups


@pytest.mark.parametrize("order", ["C", "F"])
def test_bounds_of_blocks_are_below_the_kth_best(order):
    rng = np.random.default_rng(0)
    sizes, k = (3, 7, 90, 400), 7
    rows = [np.arange(m) for m in sizes]
    workspace = Workspace(np.empty(2500, np.float32), np.empty(2500, bool))
    blocks = Blocks([np.arange(5)] * 4, rows, workspace, order)
    for out in blocks.scores:
        out[:] = rng.standard_normal(out.shape, np.float32)
    for part, scores in zip(blocks.parts, blocks.scores, strict=True):
        bound = blocks.bounds(k)[part]
        if scores.shape[1] < k:
            assert (bound == -np.inf).all()
            continue
        assert (bound <= np.sort(scores, axis=1)[:, -k]).all()
        assert ((scores >= bound[:, None]).sum(axis=1) <= 2 * k + 20).all()
    assert (blocks.bounds(10**9) == -np.inf).all()  # without memory for so many


def test_many_hits_raise_the_floor_and_stay_bounded():
    """The scores of each block are above all floors so far."""
    top, k = TopK(50, 5), 5
    for block in range(400):
        scores = np.arange(40, dtype=np.float32) + np.zeros((50, 1), np.float32)
        offer(top, np.arange(50), scores + 40 * block, np.arange(40) + 40 * block)
        assert top._pending <= 2**16 + 4 * 50 * k
    assert (unpack(top.result())[1] == 15999 - np.arange(k)).all()
