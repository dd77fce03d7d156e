"""An index of Faiss as an Index, and there and back again: the same results."""

import numpy as np
import pytest
from faiss_cases import (
    L2,
    LEAVES,
    NUM,
    PRODUCT,
    QUERIES,
    RNG,
    WIDTH,
    X,
    assert_same,
    make,
    one_level,
    searched,
    trained,
    update,
)

from ehi.index import from_faiss, open_index, save_index, to_faiss

faiss = pytest.importorskip("faiss")
pytestmark = pytest.mark.faiss


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
        # Faiss orders documents of equal codes, and so of equal scores, differently.
        apart = np.diff(np.maximum(scores, -1e6), axis=1) < -1e-4
        clear = np.pad(apart, ((0, 0), (1, 0)), constant_values=True)
        clear &= np.pad(apart, ((0, 0), (0, 1)))  # its next neighbour is unknown
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


@pytest.mark.parametrize("leaf", LEAVES + L2)
@pytest.mark.parametrize("spill", [1, 2])
def test_ours_to_faiss_to_a_file_to_faiss_to_ours(leaf, spill, tmp_path):
    index, more, names, queries = make(leaf, spill=spill, strings=True)
    update(index, more, names)
    to_faiss(index).write(tmp_path / "x.faiss")
    read = faiss.read_index(str(tmp_path / "x.faiss"))
    again = from_faiss(read, names)
    assert (again.spill, again.num_documents) == (spill, 94)
    assert again.score == index.score
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
