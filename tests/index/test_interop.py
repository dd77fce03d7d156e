"""An Index as an index of Faiss, an index of Faiss as an Index: the same results."""

import subprocess
import sys

import index_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehi.index import build_index, open_index, save_index
from ehi.index.interop import FaissIndex, from_faiss, to_faiss

faiss = pytest.importorskip("faiss")
pytestmark = pytest.mark.faiss

WIDTH, BRANCHING = 16, 3
LEAVES = ["raw", "half"] + [
    f"{bits}-bit{parts}"
    for bits in (8, 4)
    for parts in ("", " rotated", " residual", " rotated residual")
]


def make(leaf, kind="per_node", height=2, spill=1, strings=False, own=True, seed=0):
    """(Index of a first segment, 60 more embeddings, a name for each row, queries)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32) / 2

    num_leaves = BRANCHING**height
    tree = query_tree = None
    if height:
        tree = reference.make_tree(kind, height, BRANCHING, WIDTH, rng, hidden=3)
        query_tree = reference.make_tree(kind, height, BRANCHING, WIDTH, rng)
    parts = {"leaf_dtype": "float16" if leaf == "half" else "float32"}
    if "bit" in leaf:
        parts["codebooks"] = normal(8, 16 if leaf[0] == "4" else 256, 2)
    if "rotated" in leaf:
        parts["rotation"] = reference.make_rotation(WIDTH, rng)
    if "residual" in leaf:
        parts["leaf_centroids"] = normal(num_leaves, WIDTH)
    names = [f"d{row}" if strings else 7 * row + 1 for row in range(100)]
    x = normal(100, WIDTH) * 2
    index = build_index(
        x[:40], names[:40], tree=tree, query_tree=query_tree if own else None,
        spill=min(spill, num_leaves), **parts,
    )  # fmt: skip
    return index, x[40:], names, normal(9, WIDTH)


def update(index, more, names):
    """Two more segments; some documents of each deleted."""
    index.add(more[:35], names[40:75])
    index.add(more[35:], names[75:])
    index.delete([names[row] for row in (0, 3, 39, 40, 70, 99)])


def assert_same(hits, ids, scores, tolerance=1e-4):
    assert ids.shape == hits.ids.shape and ids.dtype == hits.ids.dtype
    assert (ids == hits.ids).all()
    finite = np.isfinite(hits.scores)
    assert (np.isfinite(scores) == finite).all()
    assert np.isneginf(scores[~finite]).all()
    np.testing.assert_allclose(scores[finite], hits.scores[finite], atol=tolerance)


@pytest.mark.parametrize("spill", [1, 2])
@pytest.mark.parametrize("leaf", LEAVES)
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
    index, more, names, queries = make(draw(*LEAVES), **options)
    if draw(False, True):
        update(index, more, names)
    beam = data.draw(st.integers(1, index.num_leaves))
    k = data.draw(st.integers(1, 120))
    hits = index.search(queries, k, beam=beam)
    ids, scores = to_faiss(index).search(queries, k, beam=beam)
    finite = np.isfinite(hits.scores)
    np.testing.assert_allclose(scores[finite], hits.scores[finite], atol=1e-4)
    assert (np.isfinite(scores) == finite).all()
    differ = ids != hits.ids  # where neighbours have one score, to rounding
    close = np.isclose(hits.scores[:, 1:], hits.scores[:, :-1], atol=1e-5)
    close |= ~finite[:, 1:]
    tied = np.pad(close, ((0, 0), (1, 0))) | np.pad(close, ((0, 0), (0, 1)))
    tied[:, -1] = True  # the one after the last is not seen
    assert not (differ & ~tied).any()


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
    monkeypatch.setattr("ehi.index.interop_search._VALUES", 2 * 18 * WIDTH)
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


def one_level(leaf, x, rng):
    """An Index of 8 leaves whose centroids, where there are some, are the nodes."""
    nodes = x[:8]
    parts = {}
    if "bit" in leaf:
        parts["codebooks"] = rng.standard_normal((8, 256, 2)).astype(np.float32) / 2
        parts["rotation"] = reference.make_rotation(WIDTH, rng)
        parts["leaf_centroids"] = nodes
    tree = {"kind": "per_node", "nodes": [nodes[None]], "scale": 2.0}
    return build_index(x, range(len(x)), tree=tree, **parts)


def searched(index, queries, k, nprobe):
    """Faiss's own search: scores, padded with -inf, and ids."""
    options = faiss.SearchParametersIVF(nprobe=nprobe)
    if isinstance(index, faiss.IndexPreTransform):
        options = faiss.SearchParametersPreTransform(index_params=options)
    if isinstance(index, faiss.IndexFlat):
        options = None
    scores, ids = index.search(queries, k, params=options)
    return np.where(ids < 0, -np.inf, scores), ids


@pytest.mark.parametrize("spill", [1, 2])
@pytest.mark.parametrize("leaf", ["4-bit rotated", "4-bit rotated residual"])
def test_fast_scan_rounds_its_scores_and_exact_scores_mend_it(leaf, spill):
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
    if "residual" in leaf:
        parts |= {"leaf_centroids": nodes, "codebooks": parts["codebooks"] * 0.9}
    tree = {"kind": "per_node", "nodes": [nodes[None]], "scale": 1.0}
    index = build_index(x[:2000], range(2000), tree=tree, rotation=rotation, **parts)
    index.add(x[2000:], range(2000, num))
    index.delete(range(0, num, 9))
    queries = x[:200] + rng.standard_normal((200, width)).astype(np.float32) / 20

    fast = to_faiss(index, fastscan=True)
    for beam in (2, 16):
        hits = index.search(queries, 10, beam=beam)
        ids, _ = fast.search(queries, 10, beam=beam)
        pairs = zip(ids, hits.ids, strict=True)
        overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in pairs])
        assert overlap >= 0.95, overlap
        assert_same(hits, *fast.search(queries, 10, beam=beam, rerank=60), 1e-5)


@pytest.mark.parametrize("leaf", ["raw", "half", "8-bit", "4-bit rotated residual"])
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
    with pytest.raises(ValueError, match="other documents than the index in leaf"):
        FaissIndex.read(tmp_path / "x.faiss", index)


# From Faiss

NUM = 700
RNG = np.random.default_rng(11)
X = RNG.standard_normal((NUM, WIDTH)).astype(np.float32)
X += 2 * X[RNG.integers(12, size=NUM)]
QUERIES = X[:50] + RNG.standard_normal((50, WIDTH)).astype(np.float32)
PRODUCT = faiss.METRIC_INNER_PRODUCT


def trained(recipe, ids=None, add=True):
    index = faiss.index_factory(WIDTH, recipe, PRODUCT)
    index.train(X)
    if add and ids is None:
        index.add(X)
    elif add:
        index.add_with_ids(X, ids)
    return index


def pq(bits=8, residual=True, quantiser=None, num_lists=12):
    quantiser = quantiser or faiss.IndexFlatIP(WIDTH)
    index = faiss.IndexIVFPQ(quantiser, WIDTH, num_lists, 8, bits, PRODUCT)
    index.by_residual = residual
    index.train(X)
    index.add(X)
    return index


def assert_same_as_faiss(index, source, k=15):
    beams = (1, 4, index.num_leaves) if index.num_leaves > 1 else (1,)
    for beam in beams:
        scores, ids = searched(source, QUERIES, k, beam)
        hits = index.search(QUERIES, k, beam=beam)
        finite = ids >= 0
        assert (np.isfinite(hits.scores) == finite).all()
        np.testing.assert_allclose(
            hits.scores[finite], scores[finite], rtol=1e-5, atol=1e-4
        )
        # Equal codes have equal scores; Faiss orders them otherwise.
        apart = np.diff(np.maximum(scores, -1e6), axis=1) < -1e-4
        clear = np.pad(apart, ((0, 0), (1, 0)), constant_values=True)
        clear &= np.pad(apart, ((0, 0), (0, 1)))  # the one after the last is not seen
        assert (hits.ids == ids)[clear].all() and clear.mean() > 0.5


@pytest.mark.parametrize(
    "recipe",
    [
        "Flat", "IVF12,Flat", "IVF12,PQ8x8np", "IVF12,PQ8x4np", "OPQ8,IVF12,PQ8x8np",
        "OPQ8,IVF12,PQ8x4np", "RR,IVF12,Flat", "RR,OPQ4,IVF1,PQ4x8np", "RR,Flat",
    ],
)  # fmt: skip
def test_an_index_of_faiss_finds_what_faiss_finds(recipe):
    source = trained(recipe)
    index = from_faiss(source)
    assert index.num_documents == NUM
    assert_same_as_faiss(index, source)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("quantiser", [faiss.IndexFlatIP, faiss.IndexFlatL2])
def test_every_coarse_quantiser_and_residual_is_taken(bits, residual, quantiser):
    source = pq(bits, residual, quantiser(WIDTH))
    index = from_faiss(source)
    assert (index.leaf_centroids is not None) == residual
    assert_same_as_faiss(index, source)


def test_ids_removed_documents_and_empty_lists_are_kept_as_they_are():
    ids = RNG.permutation(10**12 + np.arange(NUM))
    source = trained("IVF40,Flat", ids)
    lists = [source.invlists.list_size(number) for number in range(40)]
    emptied = np.arange(3)
    gone = [faiss.rev_swig_ptr(source.invlists.get_ids(n), lists[n]) for n in range(3)]
    source.remove_ids(np.concatenate(gone).copy())
    index = from_faiss(source)
    assert (index.leaf_sizes[emptied] == 0).all()
    assert index.leaf_sizes[3:].tolist() == lists[3:]
    assert_same_as_faiss(index, source)
    index.add(X[:1], [5])
    assert index.search(X[:1], 3, beam=40).ids.max() >= 5


def test_names_are_given_by_faiss_id():
    source = trained("IVF12,Flat")
    source.remove_ids(np.arange(0, NUM, 2))
    index = from_faiss(source, [f"n{number}" for number in range(NUM)])
    hits, (_, ids) = index.search(QUERIES, 1), searched(source, QUERIES, 1, 1)
    assert hits.ids[:, 0].tolist() == [f"n{number}" for number in ids[:, 0]]
    with pytest.raises(ValueError, match="10 ids, none for Faiss id 699"):
        from_faiss(source, range(10))


def test_a_direct_map_changes_nothing():
    source = trained("IVF12,Flat")
    source.make_direct_map()
    assert_same_as_faiss(from_faiss(source), source)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("spill", [1, 2])
def test_ours_to_faiss_to_a_file_to_faiss_to_ours(leaf, spill, tmp_path):
    index, more, names, queries = make(leaf, spill=spill, strings=True)
    update(index, more, names)
    to_faiss(index).write(tmp_path / "x.faiss")
    read = faiss.read_index(str(tmp_path / "x.faiss"))
    again = from_faiss(read, names)
    assert (again.spill, again.num_documents) == (spill, 94)
    hits = index.search(queries, 12, beam=9)  # all leaves: the trees differ
    found = again.search(queries, 12, beam=9)
    assert_same(hits, found.ids, found.scores)
    save_index(again, tmp_path / "index")
    opened = open_index(tmp_path / "index", verify=True)
    assert (opened.search(queries, 12, beam=9).ids == hits.ids).all()


@pytest.mark.parametrize("leaf", ["raw", "8-bit"])
def test_a_tree_of_one_level_survives_the_round_trip(leaf):
    rng = np.random.default_rng(5)
    index = one_level(leaf, X[:300], rng)
    again = from_faiss(to_faiss(index).index)
    for beam in (1, 3, 8):
        hits, found = (i.search(QUERIES, 9, beam=beam) for i in (index, again))
        assert_same(hits, found.ids, found.scores)
        assert (hits.leaves == found.leaves).all()


@pytest.mark.parametrize(
    "recipe", ["IVF12,Flat", "OPQ8,IVF12,PQ8x4np", "IVF12,PQ8x8np"]
)
def test_theirs_to_ours_to_theirs_has_the_same_lists(recipe):
    source = trained(recipe)
    exported = to_faiss(from_faiss(source)).index
    one, other = (faiss.extract_index_ivf(index) for index in (source, exported))
    for number in range(9):
        size = one.invlists.list_size(number)
        assert other.invlists.list_size(number) == size
        for pointers, length in (("get_ids", 1), ("get_codes", one.code_size)):
            parts = (getattr(i.invlists, pointers)(number) for i in (one, other))
            a, b = (faiss.rev_swig_ptr(part, size * length) for part in parts)
            assert (a == b).all()
    for beam in (1, 5):
        a, b = (searched(index, QUERIES, 5, beam)[0] for index in (source, exported))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


# What is refused


def l2(index):
    index.metric_type = faiss.METRIC_L2
    return index


def biased():
    step = faiss.PCAMatrix(WIDTH, WIDTH)
    index = faiss.IndexPreTransform(step, trained("IVF2,Flat", add=False))
    index.train(X)
    index.add(X)
    return index


@pytest.mark.parametrize(
    ("make_index", "words"),
    [
        (lambda: faiss.IndexFlatL2(WIDTH), "IndexFlatL2 ranks by L2.*normalise"),
        (lambda: l2(trained("IVF2,Flat")), "IndexIVFFlat ranks by L2"),
        (
            lambda: faiss.index_factory(WIDTH, "OPQ8,IVF2,PQ8x4np"),
            "IndexIVFPQ ranks by L2",
        ),
        (lambda: faiss.IndexFlat(WIDTH, faiss.METRIC_L1), "PRODUCT, got number 2"),
        (
            lambda: trained("HNSW8"),
            "cannot take IndexHNSWFlat; allowed are IndexFlatIP, IndexIVFFlat, Ind",
        ),
        (lambda: trained("IVF2,PQ8x4fs"), "cannot take IndexIVFPQFastScan; allowed"),
        (lambda: trained("IVF2,SQ8"), "cannot take IndexIVFScalarQuantizer"),
        (lambda: trained("IVF4_HNSW8,Flat"), "coarse quantiser must be.*HNSWFlat"),
        (lambda: "IVF4,Flat", "cannot take str; allowed"),
        (lambda: trained("IVF2,PQ8x6np"), "4 or 8 bits, got 6"),
        (lambda: trained("PCA8,IVF2,Flat"), "changes the width: 16 to 8"),
        (biased, "PCAMatrix has a bias"),
        (lambda: trained("L2norm,IVF2,Flat"), "cannot take NormalizationTransform"),
        (lambda: trained("IVF2,Flat", add=False), "this Faiss index is empty"),
        (lambda: faiss.IndexFlatIP(WIDTH), "this Faiss index is empty"),
        (
            lambda: faiss.index_factory(WIDTH, "IVF2,Flat", PRODUCT),
            "0 coarse centroids for 2 lists: not trained",
        ),
        (
            lambda: faiss.index_factory(WIDTH, "OPQ8,IVF2,PQ8x4np", PRODUCT),
            "OPQMatrix is not trained",
        ),
        (
            lambda: trained("IVF12,Flat", np.arange(NUM) - 5),
            "ids start from 0, the Faiss index has -5",
        ),
        (
            lambda: trained("IVF1,Flat", np.arange(NUM) // 2),
            "Faiss id 0 stands twice in one list",
        ),
        (
            lambda: trained("IVF700,Flat", np.r_[0, np.arange(NUM - 1)]),
            "Faiss id 0 stands in 2 lists and id 1 in 1",
        ),
    ],
)
def test_what_an_index_cannot_hold_is_refused(make_index, words):
    index = make_index()
    with pytest.raises(ValueError, match=words):
        from_faiss(index)


def test_a_scaling_transform_is_refused():
    step = faiss.LinearTransform(WIDTH, WIDTH, False)
    faiss.copy_array_to_vector(2 * np.eye(WIDTH, dtype=np.float32).ravel(), step.A)
    step.is_trained = True
    index = faiss.IndexPreTransform(step, trained("IVF2,Flat"))
    with pytest.raises(ValueError, match="rotation is not orthogonal"):
        from_faiss(index)


@pytest.mark.parametrize("leaf", ["raw", "8-bit"])
def test_fast_scan_needs_4_bit_codes(leaf):
    got = "raw vectors" if leaf == "raw" else "K = 256"
    with pytest.raises(ValueError, match=f"K = 16 codewords, got {got}"):
        to_faiss(make(leaf)[0], fastscan=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queries": np.ones((2, 3))}, r"shape \(N, 16\).*got \(2, 3\)"),
        ({"queries": np.full((2, WIDTH), np.nan)}, "NaN or infinity"),
        ({"k": 0}, "k must be at least 1"),
        ({"beam": 10}, "beam 10 is larger than the 9 leaves"),
        ({"rerank": 2}, "rerank=2 candidates are fewer than k=3"),
    ],
)
def test_bad_searches_are_refused(change, words):
    index, _, _, queries = make("raw")
    arguments = {"queries": queries, "k": 3} | change
    with pytest.raises(ValueError, match=words):
        to_faiss(index).search(**arguments)


def test_without_faiss_the_install_line_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (lambda: to_faiss(make("raw")[0]), lambda: from_faiss(None)):
        with pytest.raises(ImportError, match=r"pip install 'ehi\[faiss\]'"):
            call()


def test_importing_the_functions_does_not_import_faiss():
    code = "import sys, ehi.index.interop; print('faiss' in sys.modules)"
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True) == "False\n"
