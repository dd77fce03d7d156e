"""The search in the step equals NumPy's exhaustive ADC; its scores have a gradient."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from ehi.index.search.codes import decode
from ehi.parallel.mesh import make_mesh
from ehi.train.step_search import score_rows, search_codes

N, M, K, S, DOCUMENTS = 5, 4, 16, 3, 50


def arrays(seed=0, documents=DOCUMENTS):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (N, M * S))
    codebooks = jax.random.normal(keys[1], (M, K, S))
    codes = jax.random.randint(keys[2], (documents, M), 0, K).astype(jnp.uint8)
    return q, codebooks, codes


def exhaustive(q, codebooks, codes, k, score="ip"):
    """Sums of table look-ups, sorted; of equal scores the smaller row first."""
    q, codebooks, codes = (np.asarray(x) for x in (q, codebooks, codes))
    parts = q.reshape(len(q), M, S).astype(np.float64)
    table = np.einsum("nms,mks->nmk", parts, codebooks)
    scores = table[:, np.arange(M), codes].sum(-1)
    norms = np.square(codebooks.astype(np.float64))[np.arange(M), codes].sum((1, 2))
    if score == "l2":
        scores = scores + (1 - norms) / 2
    if score == "cosine":
        scores = scores * np.clip(norms**-0.5, 0.5, 2 ** (191 / 64))
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


@pytest.mark.parametrize("chunk", [1, 7, 10, 49, 50, 51, 65536])
def test_equals_the_exhaustive_search_whatever_the_chunk(chunk):
    q, codebooks, codes = arrays()
    search = jax.jit(functools.partial(search_codes, k=12, chunk=chunk))
    scores, rows = search(q, codebooks, codes)
    expected, expected_rows = exhaustive(q, codebooks, codes, 12)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert scores.dtype == jnp.float32 and rows.dtype == jnp.int32


@pytest.mark.parametrize("score", ["l2", "cosine"])
@pytest.mark.parametrize("chunk", [7, 65536])
def test_other_scores_equal_the_exhaustive_search(score, chunk):
    q, codebooks, codes = arrays()
    codebooks = codebooks / 3.5  # lengths about 1, as of embeddings
    search = jax.jit(functools.partial(search_codes, k=12, chunk=chunk, score=score))
    scores, rows = search(q, codebooks, codes)
    expected, expected_rows = exhaustive(q, codebooks, codes, 12, score)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert not np.array_equal(rows, exhaustive(q, codebooks, codes, 12)[1])
    again = score_rows(q, codebooks, codes, rows, score=score)
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-5)


def test_a_score_that_codes_do_not_tell_is_refused():
    q, codebooks, codes = arrays()
    with pytest.raises(ValueError, match="'corrected' compares with the embedding"):
        search_codes(q, codebooks, codes, k=3, score="corrected")
    with pytest.raises(ValueError, match="'dot'; allowed: 'ip', 'l2'"):
        score_rows(q, codebooks, codes, jnp.zeros((N, 1), int), score="dot")


def test_ranks_like_the_numpy_index():
    q, codebooks, codes = (np.asarray(x) for x in arrays())
    # The index scores bytes: 16 codewords, in a codebook that is filled up to 256.
    wide = np.zeros((M, 256, S), np.float32)
    wide[:, :K] = codebooks
    expected = q @ decode(codes, wide).T
    scores, rows = search_codes(*arrays(), k=DOCUMENTS, chunk=7)
    np.testing.assert_array_equal(rows, np.argsort(-expected, 1, kind="stable"))
    np.testing.assert_allclose(
        scores, np.take_along_axis(expected, np.asarray(rows), 1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("chunk", [3, 16, 64])
def test_equal_scores_go_to_the_smaller_row(chunk):
    keys = jax.random.split(jax.random.key(3), 3)
    # Small integers: sums are exact in any order, and there are many ties.
    q = jax.random.randint(keys[0], (N, M * S), -1, 2).astype(jnp.float32)
    books = jax.random.randint(keys[1], (M, K, S), -1, 2).astype(jnp.float32)
    codes = jax.random.randint(keys[2], (DOCUMENTS, M), 0, K).astype(jnp.uint8)
    scores, rows = search_codes(q, books, codes, k=20, chunk=chunk)
    expected, expected_rows = exhaustive(q, books, codes, 20)
    assert (expected[:, :-1] == expected[:, 1:]).any()
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected)


def test_all_documents_alike_come_in_their_order():
    q, codebooks, codes = arrays()
    alike = jnp.tile(codes[:1], (DOCUMENTS, 1))
    _, rows = search_codes(q, codebooks, alike, k=15, chunk=4)
    np.testing.assert_array_equal(rows, np.tile(np.arange(15), (N, 1)))


def test_negatives_come_from_the_current_codebooks():
    q, codebooks, codes = arrays()
    search = jax.jit(functools.partial(search_codes, k=10, chunk=16))
    _, before = search(q, codebooks, codes)
    # All queries like one codeword, so the documents that have it rank first.
    changed = codebooks.at[0, 5].set(100.0 * q[0, :S])
    _, after = search(q, changed, codes)
    np.testing.assert_array_equal(after, exhaustive(q, changed, codes, 10)[1])
    holders = np.flatnonzero(np.asarray(codes)[:, 0] == 5)[:10]
    assert len(holders) and set(holders) <= set(np.asarray(after)[0].tolist())
    assert not np.array_equal(before, after)


def test_the_search_has_no_gradient():
    q, codebooks, codes = arrays()
    gradients = jax.grad(
        lambda q, c: search_codes(q, c, codes, k=3, chunk=16)[0].sum(), (0, 1)
    )(q, codebooks)
    assert not any(g.any() for g in gradients)


def test_memory_does_not_grow_with_the_documents():
    def bytes_needed(documents):
        shapes = jax.eval_shape(lambda: arrays(documents=documents))
        search = jax.jit(functools.partial(search_codes, k=10, chunk=1000))
        return search.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    few, many = bytes_needed(10_000), bytes_needed(1_000_001)
    assert many < few + 100_000  # one table of codes is 4 MB


def test_scores_of_rows_are_those_of_the_search():
    q, codebooks, codes = arrays()
    scores, rows = search_codes(q, codebooks, codes, k=10, chunk=16)
    found = score_rows(q, codebooks, codes, rows)
    np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-5)
    missing = score_rows(q, codebooks, codes, rows.at[:, 3].set(-1))
    np.testing.assert_array_equal(missing[:, 4:], found[:, 4:])
    np.testing.assert_array_equal(
        missing[:, 3], score_rows(q, codebooks, codes, jnp.zeros((N, 1), int))[:, 0]
    )


@pytest.mark.parametrize("score", ["ip", "l2", "cosine"])
def test_gradient_of_scores_matches_finite_differences(score):
    q, codebooks, codes = arrays()
    codebooks = codebooks / 3.5
    rows = jnp.array([[0, 3, 3], [7, 49, 1], [2, 2, 2], [5, 6, 7], [48, 0, 9]])

    def f(q, codebooks):
        return jnp.sin(score_rows(q, codebooks, codes, rows, score=score))

    check_grads(f, (q, codebooks), order=1, modes=("rev",), rtol=1e-2)
    to_q, to_books = jax.grad(lambda *a: f(*a).sum(), (0, 1))(q, codebooks)
    chosen = np.zeros((M, K), bool)
    chosen[np.arange(M), np.asarray(codes)[np.asarray(rows).ravel()]] = True
    assert to_q.any() and not np.asarray(to_books)[~chosen].any()


def test_half_precision_queries_are_scored_in_float32():
    q, codebooks, codes = arrays()
    half = q.astype(jnp.bfloat16)
    scores, _ = search_codes(half, codebooks, codes, k=3)
    exact, _ = search_codes(half.astype(jnp.float32), codebooks, codes, k=3)
    np.testing.assert_array_equal(scores, exact)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"k": 51}, "k=51 of 50 .*1 to 50"),
        ({"k": 0}, "k=0"),
        ({"k": 3, "chunk": 0}, "chunk=0"),
    ],
)
def test_bad_numbers_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        search_codes(*arrays(), **change)


def test_shapes_that_do_not_fit_are_refused():
    q, codebooks, codes = arrays()
    with pytest.raises(ValueError, match=r"\(50, 3\)"):
        search_codes(q, codebooks, codes[:, :3], k=3)
    with pytest.raises(ValueError, match=r"\(5, 11\)"):
        score_rows(q[:, :11], codebooks, codes, jnp.zeros((N, 1), int))


@pytest.mark.skipif(jax.device_count() != 4, reason="runs in the child of 4 devices")
class TestInParts:
    """The table on 4 devices gives the answer of one device, bit for bit."""

    @pytest.mark.parametrize("documents", [50, 52, 5])
    @pytest.mark.parametrize("chunk", [3, 65536])
    def test_equals_one_device(self, documents, chunk):
        rng, k, mesh = np.random.default_rng(documents), min(20, documents), make_mesh()
        # Small integers: sums are exact in any order, and there are many ties.
        q, books = (rng.integers(-1, 2, s) for s in ((N, M * S), (M, K, S)))
        codes = rng.integers(0, K, (documents, M)).astype(np.uint8)
        search = functools.partial(search_codes, k=k, chunk=chunk)
        expected = jax.jit(search)(q, books, codes)
        if documents % 4 == 0:
            parts = NamedSharding(mesh, PartitionSpec("data"))
            codes = jax.device_put(codes, parts)
        found = jax.jit(functools.partial(search, mesh=mesh))(q, books, codes)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0], expected[0])
        assert (np.diff(found[0], axis=1) == 0).any()

    def test_no_device_gathers_the_table(self):
        mesh, documents = make_mesh(), 400_000
        parts = NamedSharding(mesh, PartitionSpec("data"))

        def compiled(**options):
            q, books, codes = jax.eval_shape(lambda: arrays(documents=documents))
            codes = jax.ShapeDtypeStruct(codes.shape, codes.dtype, sharding=parts)
            search = functools.partial(search_codes, k=10, chunk=1000, **options)
            return jax.jit(search).lower(q, books, codes).compile()

        whole, shared = compiled(), compiled(mesh=mesh)
        assert "u8[400000,4]" in whole.as_text()
        assert "u8[400000,4]" not in shared.as_text()
        memory = shared.memory_analysis().temp_size_in_bytes
        assert memory < whole.memory_analysis().temp_size_in_bytes - M * documents // 2

    def test_the_search_has_no_gradient(self):
        q, codebooks, codes = arrays()

        def total(q, codebooks):
            scores, _ = search_codes(q, codebooks, codes, k=3, mesh=make_mesh())
            return scores.sum()

        gradients = jax.jit(jax.grad(total, (0, 1)))(q, codebooks)
        assert not any(g.any() for g in gradients)


def test_four_fake_devices():
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__,
         "-k", "TestInParts"],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout
