"""Scores of quantised documents: every path gives what a sum over documents gives.

Expected scores are computed in float64 from explicit reconstructions, and factors are
rounded by the formula of their byte.
"""

import functools
import itertools

import index_reference as reference
import numpy as np
import pytest

from ehi.index import build_index, open_index, save_index
from ehi.index.search.codes import SCORES, factor_bytes, factor_table
from ehi.index.search.search import route_queries
from ehi.index.sharded import answer, merge_answers, split_index

WIDTH, NUM, LEAVES = 8, 150, 4
RNG = np.random.default_rng(4)
TREE = reference.make_tree("per_node", 2, 2, WIDTH, RNG)
ADDED = range(110, NUM)  # a segment of its own
DELETED = [3, 17, 111]
LEFT = np.setdiff1d(np.arange(NUM), DELETED)


def unit(*shape):
    x = RNG.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


X = unit(NUM, WIDTH)
QUERIES = unit(6, WIDTH)
QUERIES[0] *= 5  # no score needs unit queries
QUANTISERS = {
    "8-bit": {"codebooks": normal(4, 256, 2) / 3},
    "4-bit rotated": {
        "codebooks": normal(4, 16, 2) / 3,
        "assign_codebooks": normal(4, 16, 2) / 3,
        "rotation": reference.make_rotation(WIDTH, RNG),
    },
    "8-bit rotated residual": {
        "codebooks": normal(4, 256, 2) / 4,
        "rotation": reference.make_rotation(WIDTH, RNG),
        "leaf_centroids": normal(LEAVES, WIDTH) / 4,
    },
    "4-bit residual": {
        "codebooks": normal(2, 16, 4) / 4,
        "leaf_centroids": normal(LEAVES, WIDTH) / 4,
    },
}
cases = pytest.mark.parametrize(
    ("score", "quantiser"), list(itertools.product(SCORES, QUANTISERS))
)


def make(score, quantiser, spill=1):
    """An index of two segments with deleted documents."""
    parts = QUANTISERS[quantiser] | {"score": score, "spill": spill}
    index = build_index(X[: ADDED[0]], range(ADDED[0]), tree=TREE, **parts)
    index.add(X[ADDED], ADDED)
    index.delete(DELETED)
    return index


def rounded(factor):
    """The value of the factor's byte."""
    return 2 ** (np.clip(np.round(64 + 64 * np.log2(factor)), 0, 255) / 64 - 1)


def score_of(score, query, known, x):
    product = query @ known
    if score == "l2":
        return product + (1 - known @ known) / 2
    if score == "cosine":
        return product * rounded(1 / np.linalg.norm(known))
    if score == "corrected":
        return product * (rounded(1 / (known @ x)) if known @ x > 0 else rounded(1e9))
    return product


@functools.cache
def known_copies(quantiser, spill):
    """(row, leaf, reconstruction) of every copy, in float64."""
    parts = dict(QUANTISERS[quantiser])
    codebooks = parts.pop("codebooks")
    choosing = parts.pop("assign_codebooks", codebooks)
    copies = []
    for row, x in enumerate(X.astype(np.float64)):
        best = np.argsort(-reference.leaf_log_probs(x, TREE), kind="stable")[:spill]
        for leaf in best.tolist():
            known = reference.reconstruct(x, leaf, codebooks=choosing, **parts)
            if choosing is not codebooks:
                known = swapped(known, choosing, codebooks, parts["rotation"])
            copies.append((row, leaf, known))
    return copies


def swapped(known, choosing, codebooks, rotation):
    """A reconstruction by `choosing` as that of the same codes by `codebooks`."""
    words = (known @ rotation).reshape(len(codebooks), 1, -1)
    codes = ((choosing - words) ** 2).sum(axis=2).argmin(axis=1)
    chosen = codebooks[np.arange(len(codebooks)), codes]
    return chosen.ravel() @ rotation.T.astype(np.float64)


def brute_force(score, quantiser, spill, query, leaves, rows=LEFT):
    """{row: score of its best copy in some leaves}."""
    found = {}
    for row, leaf, known in known_copies(quantiser, spill):
        if leaf in leaves and row in rows:
            new = score_of(score, query.astype(np.float64), known, X[row])
            found[row] = max(new, found.get(row, -np.inf))
    return found


@cases
def test_one_query_batches_and_threads_are_the_sum_over_documents(score, quantiser):
    spill = 2 if "residual" in quantiser else 1
    index = make(score, quantiser, spill)
    many = np.repeat(QUERIES, 30, axis=0)  # so that leaves are shared
    allowed = np.arange(0, NUM, 2)
    for beam, k, allow in ((2, 7, None), (4, 200, None), (3, 5, allowed)):
        rows = LEFT if allow is None else np.intersect1d(LEFT, allow)
        batch = index.search(many, k, beam=beam, allow=allow)
        threads = index.search(many, k, beam=beam, allow=allow, threads=3)
        assert (threads.rows == batch.rows).all()
        assert (threads.scores == batch.scores).all()
        for number, query in enumerate(QUERIES):
            one = index.search(query[None], k, beam=beam, allow=allow)
            leaves = one.leaves[0].tolist()
            expected = brute_force(score, quantiser, spill, query, leaves, rows)
            for hits, place in ((one, 0), (batch, 30 * number)):
                reference.assert_same_results(
                    hits.rows[place], hits.scores[place], expected, k
                )


@cases
def test_shards_of_a_folder_find_what_the_whole_finds(score, quantiser, tmp_path):
    save_index(make(score, quantiser, spill=2), tmp_path / "index")
    index = open_index(tmp_path / "index", verify=True)
    assert index.score == score
    folders = split_index(tmp_path / "index", tmp_path / "parts", 3)
    parts = [open_index(folder, verify=True) for folder in folders]
    leaves, _ = route_queries(index.parameters, QUERIES, 3)
    answers = [answer(part, QUERIES, leaves, 20, beam=3) for part in parts]
    sizes = [part.contents.num_rows for part in parts]
    merged = merge_answers(answers, np.cumsum(sizes) - sizes, 20)
    hits = index.search(QUERIES, 20, beam=3)
    assert (merged["ids"] == hits.ids).all()
    np.testing.assert_allclose(merged["scores"], hits.scores, rtol=1e-5, atol=1e-6)


@cases
def test_updates_and_compaction_keep_every_factor(score, quantiser, tmp_path):
    parts = QUANTISERS[quantiser] | {"score": score, "spill": 2}
    whole = build_index(X[LEFT], LEFT, tree=TREE, **parts)
    save_index(build_index(X[:50], range(50), tree=TREE, **parts), tmp_path / "index")
    index = open_index(tmp_path / "index")
    index.update(X[40 : ADDED[0]], range(40, ADDED[0]), missing="add")
    index.add(X[ADDED], ADDED)
    index.delete(DELETED)
    before = index.search(QUERIES, 9, beam=3)
    in_memory = make(score, quantiser, spill=2)
    for used in (index, in_memory):
        used.compact()
        (segment,) = used.segments
        order = np.argsort(segment.ids)[segment.leaf_rows], segment.leaf_offsets
        assert np.array_equal(order[1], whole.segments[0].leaf_offsets)
        after = used.search(QUERIES, 9, beam=3)
        assert (after.ids == before.ids).all()
        np.testing.assert_allclose(after.scores, before.scores, rtol=1e-5, atol=1e-6)
    assert (index.segments[0].factors is None) == (score in ("ip", "l2"))
    if index.segments[0].factors is not None:
        factors = [np.sort(i.segments[0].factors) for i in (whole, index, in_memory)]
        assert (factors[0] == factors[1]).all() and (factors[0] == factors[2]).all()


def test_a_factor_is_a_byte_of_half_a_percent():
    factors = 2 ** np.linspace(-1, 2.98, 1000)
    found = factor_table()[factor_bytes(factors)]
    assert found.dtype == np.float32
    assert np.abs(found / factors - 1).max() < 0.0055
    assert factor_table()[64] == 1
    extremes = factor_bytes(np.array([0, 1e-3, 0.5, 7.9, 100, np.inf]))
    assert extremes.tolist() == [0, 0, 0, 255, 255, 255]


@pytest.mark.parametrize("score", ["cosine", "corrected"])
def test_factors_are_of_each_copy(score):
    for quantiser in QUANTISERS:
        parts = QUANTISERS[quantiser] | {"score": score, "spill": 2}
        index = build_index(X, range(NUM), tree=TREE, **parts)
        (segment,) = index.segments
        leaves = np.repeat(np.arange(LEAVES), np.diff(segment.leaf_offsets)).tolist()
        rows = segment.leaf_rows.tolist()
        found = dict(zip(zip(rows, leaves, strict=True), segment.factors, strict=True))
        for row, leaf, known in known_copies(quantiser, 2):
            one = score_of(score, known / (known @ known), known, X[row])
            assert factor_table()[found[row, leaf]] == pytest.approx(one)


def test_a_budget_counts_codes_and_a_size_counts_factors_too():
    parts = QUANTISERS["4-bit rotated"]
    for score, factor in (("ip", 0), ("l2", 0), ("cosine", 1), ("corrected", 1)):
        index = build_index(X, range(NUM), tree=TREE, spill=2, score=score, **parts)
        assert index.code_bytes_per_doc == 2 * 2
        assert index.bytes_per_doc == 2 * (2 + factor)
        index = build_index(
            X, range(NUM), tree=TREE, score=score, rerank_vectors=True, **parts
        )
        assert index.code_bytes_per_doc == 2
        assert index.bytes_per_doc == 2 + factor + 2 * WIDTH
    raw = build_index(X, range(NUM), tree=None, leaf_dtype="float16")
    assert raw.code_bytes_per_doc == raw.bytes_per_doc == 2 * WIDTH


@pytest.mark.parametrize("score", SCORES)
def test_rerank_needs_no_score(score):
    parts = QUANTISERS["8-bit rotated residual"]
    index = build_index(
        X, range(NUM), tree=TREE, score=score, rerank_vectors=True, **parts
    )
    hits = index.search(QUERIES, 5, beam=4, rerank=NUM)
    exact = QUERIES @ X.T
    assert (hits.rows == np.argsort(-exact, axis=1)[:, :5]).all()


@pytest.mark.parametrize("score", SCORES)
def test_equal_documents_come_in_the_order_of_their_rows(score):
    """Their scores are equal although some lie elsewhere in a product."""
    rows = RNG.permutation(np.repeat(np.arange(8), 40))
    for quantiser in QUANTISERS:
        parts = QUANTISERS[quantiser] | {"score": score}
        index = build_index(X[rows], range(len(rows)), tree=TREE, **parts)
        many = np.repeat(QUERIES, 20, axis=0)
        batch = index.search(many, 60, beam=4)
        for number, query in enumerate(QUERIES):
            one = index.search(query[None], 60, beam=4)
            assert (one.rows[0] == batch.rows[20 * number]).all()
            for document in range(8):
                same = one.rows[0][rows[one.rows[0]] == document]
                assert (np.diff(same) > 0).all()


def test_what_a_score_cannot_have_is_refused():
    codes = QUANTISERS["8-bit"]
    with pytest.raises(ValueError, match="one of .*'corrected'.*, got 'dot'"):
        build_index(X, range(NUM), tree=TREE, score="dot", **codes)
    with pytest.raises(ValueError, match="'cosine' is for codes; raw leaves hold"):
        build_index(2 * X, range(NUM), tree=TREE, score="cosine")
    x = X.copy()
    x[7] *= 1.002
    for score in ("cosine", "corrected"):
        words = f"norm 1.002, where score '{score}' needs unit vectors.* row 7"
        with pytest.raises(ValueError, match=words):
            build_index(x, range(NUM), tree=TREE, score=score, **codes)
        index = build_index(X, range(NUM), tree=TREE, score=score, **codes)
        for change in (index.add, index.update):
            with pytest.raises(ValueError, match=words):
                change(x[:50], range(NUM, NUM + 50))
        assert index.num_documents == NUM
    for score in ("ip", "l2"):  # they need no unit vectors
        build_index(3 * X, range(NUM), tree=TREE, score=score, **codes)
