"""What to_faiss and from_faiss refuse, and the message if Faiss is missing."""

import subprocess
import sys

import numpy as np
import pytest
from faiss_cases import NUM, PRODUCT, WIDTH, X, make, trained

from ehi.index import from_faiss, to_faiss

faiss = pytest.importorskip("faiss")
pytestmark = pytest.mark.faiss


def l2(index):
    index.metric_type = faiss.METRIC_L2
    return index


def flat_l2():
    index = faiss.IndexFlatL2(WIDTH)
    index.add(X)
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
        (flat_l2, "IndexFlatL2 ranks by L2.*normalise"),
        (lambda: l2(trained("IVF2,Flat")), "IndexIVFFlat ranks by L2"),
        (
            lambda: faiss.index_factory(WIDTH, "OPQ8,IVF2,PQ8x4np"),
            "OPQMatrix is not trained",
        ),
        (lambda: faiss.IndexFlat(WIDTH, faiss.METRIC_L1), "METRIC_L2, got number 2"),
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
            "Faiss id 0 is twice in one list",
        ),
        (
            lambda: trained("IVF700,Flat", np.r_[0, np.arange(NUM - 1)]),
            "Faiss id 0 is in 2 lists and id 1 in 1",
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
    code = "import sys, ehi.index.faiss_from; print('faiss' in sys.modules)"
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True) == "False\n"
