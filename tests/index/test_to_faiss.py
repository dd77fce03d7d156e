"""An Index as an index of Faiss: the same results."""

import signal
from dataclasses import replace

import index_reference as reference
import numpy as np
import pytest
from faiss_cases import (
    FACTORED,
    L2,
    LEAVES,
    WIDTH,
    assert_same,
    make,
    one_level,
    searched,
    update,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ehi.index import (
    FaissIndex,
    IndexCorruptError,
    build_index,
    open_index,
    save_index,
    to_faiss,
)

pytestmark = pytest.mark.faiss


@pytest.mark.parametrize("spill", [1, 2])
@pytest.mark.parametrize("leaf", LEAVES + L2)
def test_the_export_finds_what_the_index_finds(leaf, spill):
    index, more, names, queries = make(leaf, spill=spill, strings=spill == 2)
    before = to_faiss(index)
    ids, scores = before.search(queries, 10, beam=4)
    assert_same(index.search(queries, 10, beam=4), ids, scores)
    update(index, more, names)
    exported = to_faiss(index)
    for k, beam in ((1, 1), (5, 3), (10, 9), (200, 4)):
        hits = index.search(queries, k, beam=beam)
        assert_same(hits, *exported.search(queries, k, beam=beam))
    again = before.search(queries, 10, beam=4)  # a snapshot
    assert (again[0] == ids).all() and (again[1] == scores).all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_index_is_exported(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    options = {
        "kind": draw("per_node", "per_level"), "height": draw(0, 1, 2),
        "spill": draw(1, 2, 3), "strings": draw(False, True), "own": draw(False, True),
        "seed": data.draw(st.integers(0, 2**32)),
    }  # fmt: skip
    leaf = draw(*LEAVES, *L2, *FACTORED)
    index, more, names, queries = make(leaf, **options)
    if draw(False, True):
        if leaf in FACTORED:
            more /= np.linalg.norm(more, axis=1, keepdims=True)
        update(index, more, names)
    beam = data.draw(st.integers(1, index.num_leaves))
    k = data.draw(st.integers(1, 120))
    hits = index.search(queries, k, beam=beam)
    ids, scores = to_faiss(index).search(queries, k, beam=beam)
    finite = np.isfinite(hits.scores)
    np.testing.assert_allclose(scores[finite], hits.scores[finite], atol=1e-4)
    assert (np.isfinite(scores) == finite).all()
    assert (ids == hits.ids).all()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("words", [16, 256])
@pytest.mark.parametrize("score", ["ip", "l2", "cosine", "corrected"])
def test_every_score_finds_the_same_ids_in_the_same_order(score, words, residual):
    """Coarse codes: many documents have equal ones, and factors differ much."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((30, 16))
    x = centres[rng.integers(30, size=1500)] + 0.4 * rng.standard_normal((1500, 16))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    leaf_centroids = 0.7 * x[:8] if residual else None
    nearest = (x @ x[:8].T).argmax(axis=1)
    parts = x - leaf_centroids[nearest] if residual else x
    books = [parts[-words:, 4 * m : 4 * m + 4] for m in range(4)]
    index = build_index(
        x, range(1500), tree={"kind": "per_node", "nodes": [x[None, :8]], "scale": 9.0},
        codebooks=np.stack(books), leaf_centroids=leaf_centroids, score=score,
    )  # fmt: skip
    exported = to_faiss(index)
    for k, beam in ((10, 8), (100, 8), (10, 2), (1500, 8)):
        hits = index.search(x[::20], k, beam=beam)
        ids, scores = exported.search(x[::20], k, beam=beam)
        assert (ids == hits.ids).all()
        np.testing.assert_allclose(scores, hits.scores, atol=1e-5)


@pytest.mark.parametrize("spill", [1, 2])
@pytest.mark.parametrize("leaf", FACTORED)
def test_candidates_of_faiss_are_scored_again_with_their_factors(leaf, spill):
    index, more, names, queries = make(leaf, spill=spill)
    more /= np.linalg.norm(more, axis=1, keepdims=True)
    update(index, more, names)
    exported = to_faiss(index)
    assert not exported.exact and to_faiss(make("8-bit l2")[0]).exact
    for k, beam in ((1, 1), (10, 4), (94, 9)):  # 100 candidates are all documents
        hits = index.search(queries, k, beam=beam)
        assert_same(hits, *exported.search(queries, k, beam=beam), tolerance=1e-5)
    few, _ = exported.search(queries, 5, beam=9, rerank=5)
    by_product = [i.search(queries, 5, beam=9).ids for i in (index, as_product(index))]
    assert (np.sort(few) == np.sort(by_product[1])).all()
    assert (np.sort(by_product[0]) != np.sort(by_product[1])).any()


def as_product(index):
    """The same codes scored by inner product."""
    segments = tuple(replace(part, factors=None) for part in index.segments)
    contents = replace(index.contents, segments=segments)
    return replace(
        index, parameters=replace(index.parameters, score="ip"), contents=contents
    )


def test_an_emptied_index_and_no_queries_are_exported():
    index, _, names, queries = make("4-bit residual", strings=True)
    ids, scores = to_faiss(index).search(queries[:0], 3, beam=2)
    assert ids.shape == scores.shape == (0, 3)
    index.delete(names[:40])
    ids, scores = to_faiss(index).search(queries, 3, beam=2)
    assert (ids == None).all() and np.isneginf(scores).all()  # noqa: E711


def test_a_large_batch_is_cut_into_parts_without_a_seam(monkeypatch):
    index, _, _, queries = make("8-bit rotated residual", spill=2)
    exported = to_faiss(index)
    whole = exported.search(queries, 5, beam=4, rerank=9)
    monkeypatch.setattr("ehi.index.faiss_to._VALUES", 2 * 18 * WIDTH)
    parts = exported.search(queries, 5, beam=4, rerank=9)
    assert (whole[0] == parts[0]).all()
    np.testing.assert_allclose(whole[1], parts[1], atol=1e-6)


@pytest.mark.parametrize("leaf", ["raw", "8-bit rotated residual"])
def test_where_the_tree_is_one_level_faiss_alone_finds_the_same(leaf):
    rng = np.random.default_rng(5)
    index = one_level(leaf, rng.standard_normal((300, WIDTH)).astype(np.float32), rng)
    queries = rng.standard_normal((20, WIDTH)).astype(np.float32)
    alone = to_faiss(index).index
    for beam in (1, 3, 8):
        scores, rows = searched(alone, queries, 10, beam)
        assert_same(index.search(queries, 10, beam=beam), rows, scores)


@pytest.mark.parametrize("spill", [1, 2])
@pytest.mark.parametrize("score", ["ip", "l2", "cosine"])
@pytest.mark.parametrize("leaf", ["4-bit rotated", "4-bit rotated residual"])
def test_fast_scan_rounds_its_scores_and_exact_scores_mend_it(leaf, score, spill):
    rng = np.random.default_rng(1)
    width, num_leaves, num = 64, 16, 3000
    centres = rng.standard_normal((40, width))
    x = centres[rng.integers(40, size=num)] + rng.standard_normal((num, width))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    nodes = x[:num_leaves]
    rotation = reference.make_rotation(width, rng)
    sample = (x[rng.integers(num, size=(32, 16)).ravel()] @ rotation).reshape(
        32, 16, 32, 2
    )
    parts = {"codebooks": sample[np.arange(32), :, np.arange(32)], "spill": spill}
    parts["score"] = score
    if "residual" in leaf:
        parts |= {"leaf_centroids": nodes, "codebooks": parts["codebooks"] * 0.9}
    tree = {"kind": "per_node", "nodes": [nodes[None]], "scale": 1.0}
    index = build_index(x[:2000], range(2000), tree=tree, rotation=rotation, **parts)
    index.add(x[2000:], range(2000, num))
    index.delete(range(0, num, 9))
    queries = x[:200] + rng.standard_normal((200, width)).astype(np.float32) / 20

    fast = to_faiss(index, fastscan=True)
    assert not fast.exact
    for beam in (2, 16):
        hits = index.search(queries, 10, beam=beam)
        ids, _ = fast.search(queries, 10, beam=beam)
        pairs = zip(ids, hits.ids, strict=True)
        overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in pairs])
        assert overlap >= 0.95, overlap
        again = 60 if score != "cosine" else 400  # its factors reorder many
        assert_same(hits, *fast.search(queries, 10, beam=beam, rerank=again), 1e-5)


@pytest.mark.parametrize(
    "leaf",
    ["raw", "half", "8-bit", "4-bit rotated residual", "4-bit rotated residual l2"],
)
def test_a_written_export_is_read_beside_its_index(leaf, tmp_path):
    index, more, names, queries = make(leaf, spill=2)
    update(index, more, names)
    save_index(index, tmp_path / "index")
    index = open_index(tmp_path / "index")
    for fastscan in {False, leaf.startswith("4")}:
        exported = to_faiss(index, fastscan=fastscan)
        exported.write(tmp_path / "x.faiss")
        read = FaissIndex.read(tmp_path / "x.faiss", index)
        one = exported.search(queries, 9, beam=3, rerank=20)
        other = read.search(queries, 9, beam=3, rerank=20)
        assert (one[0] == other[0]).all() and (one[1] == other[1]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "x.faiss"]
    with pytest.raises(ValueError, match="9 lists of width 16, the index 3 leaves"):
        FaissIndex.read(tmp_path / "x.faiss", make(leaf, height=1)[0])
    index.delete([names[5]])
    with pytest.raises(ValueError, match="different documents in leaf"):
        FaissIndex.read(tmp_path / "x.faiss", index)


def test_a_full_disk_leaves_the_file_and_a_damaged_one_is_refused(tmp_path):
    resource = pytest.importorskip("resource")
    index, path = make("raw")[0], tmp_path / "x.faiss"
    to_faiss(index).write(path)
    written = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(written) // 2, limits[1]))
        with pytest.raises(OSError, match="too large"):
            to_faiss(index).write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == written
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.faiss"]
    path.write_bytes(written[: len(written) // 2])
    with pytest.raises(IndexCorruptError, match=r"Faiss cannot read .*x\.faiss"):
        FaissIndex.read(path, index)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        FaissIndex.read(tmp_path / "none", index)
