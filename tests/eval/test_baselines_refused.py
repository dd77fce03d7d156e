"""What the library baselines refuse, and what they say."""

import builtins

import pytest
from library_cases import DOCUMENTS, LISTS, QUERIES, SIZES, built

from ehi.eval.baselines.build import build_baseline

pytestmark = pytest.mark.faiss


@pytest.mark.parametrize(
    "name, sizes, message",
    [
        ("faiss-hnws", {}, "faiss-hnws.*faiss-hnsw"),
        ("faiss-ivf", {}, "needs num_leaves"),
        ("faiss-flat", {"num_leaves": 4}, "has no num_leaves"),
        ("faiss-flat", {"code_bytes": 4}, "has no code_bytes"),
        ("faiss-pq", {}, "needs code_bytes"),
        ("faiss-pq", {"code_bytes": 0}, "at least 1, got 0"),
        ("faiss-pq", {"code_bytes": 7}, "7 subspaces.*64"),
        ("faiss-fastscan", {"code_bytes": 24}, "48 subspaces.*64"),
        ("scann", {"code_bytes": 24}, "48 subspaces.*64"),
        ("itq-lsh", {"code_bytes": 16}, "128 bits of 64"),
        ("faiss-ivf", {"num_leaves": 1001}, "1001 of only 1000"),
        ("faiss-flat", {"doc_ids": ["a"]}, "1 doc_ids for 1000"),
        ("faiss-flat", {"seed": -1}, "seed must be at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        build_baseline(name, DOCUMENTS, **sizes)


def test_too_few_documents_are_refused():
    with pytest.raises(ValueError, match="100 documents are fewer than 256"):
        build_baseline("faiss-pq", DOCUMENTS[:100], code_bytes=8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beam": LISTS + 1}, f"beam 17 is larger than {LISTS}"),
        ({"beam": 0}, "at least 1, got 0"),
        ({"rerank": 20}, "rerank_vectors=True"),
        ({"threads": 0}, "at least 1, got 0"),
    ],
)
def test_searches_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        built("faiss-ivf").search(QUERIES, 10, **options)
    with pytest.raises(ValueError, match="width of the index"):
        built("faiss-ivf").search(QUERIES[:, :8], 10)


def test_scann_that_reorders_always_does():
    with pytest.raises(ValueError, match="at least k=10, got 0"):
        built("scann", rerank_vectors=True).search(QUERIES, 10)


@pytest.mark.parametrize(
    "name, library, extra", [("lsh", "faiss", "faiss"), ("scann", "scann", "baselines")]
)
def test_missing_library_says_how_to_install_it(monkeypatch, name, library, extra):
    original = builtins.__import__

    def refuse(wanted, *args, **kwargs):
        if wanted == library:
            raise ModuleNotFoundError(f"No module named {wanted!r}")
        return original(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=rf"pip install 'ehi\[{extra}\]'"):
        build_baseline(name, DOCUMENTS, **SIZES[name])
