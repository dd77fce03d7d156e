"""The library baselines: exact where they should be, counted as the libraries count."""

import dataclasses

import numpy as np
import pytest
from library_cases import (
    DOCUMENTS,
    EXACT,
    LISTS,
    NUM_DOCS,
    QUERIES,
    SIZES,
    WIDTH,
    WITH_LISTS,
    built,
    recall,
    skip_without_library,
)

from ehi.eval.baselines.build import BASELINES, build_baseline
from ehi.eval.measure import beam_for_budget, measure

pytestmark = pytest.mark.faiss
GRAPHS = ("faiss-hnsw", "faiss-hnsw-sq", "faiss-hnsw-pq")


def distortion(baseline):
    stored = baseline._index.reconstruct_n(0, NUM_DOCS)
    return ((stored - DOCUMENTS) ** 2).sum(axis=1).mean()


def test_flat_is_exact():
    flat = built("faiss-flat")
    hits = flat.search(QUERIES, 20)
    np.testing.assert_array_equal(hits.ids, EXACT[:, :20])
    expected = np.take_along_axis(QUERIES @ DOCUMENTS.T, EXACT[:, :20], 1)
    np.testing.assert_allclose(hits.scores, expected, rtol=1e-5)
    assert hits.ids.dtype == np.int64 and hits.scores.dtype == np.float32
    assert (hits.visited == NUM_DOCS).all() and (hits.nodes_scored == 0).all()
    assert (flat.leaf_load_max, flat.leaf_load_cv) == (NUM_DOCS, 0.0)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("queries", [1, 50])
def test_results_are_ordered_and_padded(name, queries):
    baseline = built(name)
    hits = baseline.search(QUERIES[:queries], NUM_DOCS + 5, beam=1)
    assert hits.ids.shape == hits.scores.shape == (queries, NUM_DOCS + 5)
    found = hits.rows >= 0
    np.testing.assert_array_equal(found, hits.scores > -np.inf)
    assert not found[:, -5:].any() and (hits.ids[~found] == -1).all()
    assert (np.diff(found.astype(int), axis=1) <= 0).all()  # padding comes last
    for rows, scores in zip(hits.rows, hits.scores, strict=True):
        kept = rows[rows >= 0]
        assert len(kept) > 0 and len(np.unique(kept)) == len(kept)
        assert (np.diff(scores[: len(kept)]) <= 0).all()
    if name in GRAPHS:
        assert (found.sum(axis=1) <= hits.visited).all()
    else:
        np.testing.assert_array_equal(found.sum(axis=1), hits.visited)


@pytest.mark.parametrize("name", SIZES)
def test_equal_seeds_give_equal_results(name):
    built(name)  # skips where the library is missing
    again = build_baseline(name, DOCUMENTS, **SIZES[name])
    one, other = (b.search(QUERIES, 10, beam=1) for b in (built(name), again))
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize(
    "name", [n for n in SIZES if n not in ("faiss-flat", "faiss-sq", "scann")]
)
def test_seeds_are_used(name):
    one, other = built(name), built(name, seed=1)
    beam = min(4, one.num_leaves)
    hits = [b.search(QUERIES, 10, beam=beam).scores for b in (one, other)]
    assert (hits[0] != hits[1]).any()


@pytest.mark.parametrize("name", [n for n in WITH_LISTS if n != "scann"])
@pytest.mark.parametrize("beam", [1, 3, LISTS])
def test_visited_is_what_faiss_counts(name, beam):
    faiss = pytest.importorskip("faiss")
    baseline = built(name)
    faiss.cvar.indexIVF_stats.reset()
    hits = baseline.search(QUERIES, 10, beam=beam)
    assert hits.visited.sum() == faiss.cvar.indexIVF_stats.ndis
    assert (hits.nodes_scored == LISTS).all()
    assert baseline.leaf_sizes.sum() == NUM_DOCS


@pytest.mark.parametrize("name", WITH_LISTS)
def test_a_wider_beam_visits_more_and_at_last_all(name):
    visited = [built(name).count_visited(QUERIES, beam) for beam in range(1, LISTS + 1)]
    assert (np.diff(visited, axis=0) >= 0).all()
    assert (visited[-1] == NUM_DOCS).all()


@pytest.mark.parametrize("name", ["faiss-ivf", "scann"])
def test_every_list_visited_is_exact(name):
    baseline = built(name, **({"code_bytes": None} if name == "scann" else {}))
    hits = baseline.search(QUERIES, 10, beam=LISTS)
    np.testing.assert_array_equal(hits.rows, EXACT[:, :10])
    assert recall(baseline.search(QUERIES, 10, beam=1)) < recall(hits) == 1.0


@pytest.mark.parametrize("code_bytes", [None, 8])
def test_scann_visits_whole_lists(code_bytes, tmp_path):
    baseline = built("scann", code_bytes=code_bytes)
    baseline._searcher.serialize(str(tmp_path))
    list_of = np.load(tmp_path / "datapoint_to_token.npy")
    for beam in (1, 3):
        hits = baseline.search(QUERIES, NUM_DOCS, beam=beam)
        for rows, visited in zip(hits.rows, hits.visited, strict=True):
            lists = np.unique(list_of[rows[rows >= 0]])
            assert len(lists) == beam
            assert visited == np.isin(list_of, lists).sum()


def test_opq_distorts_less_than_pq():
    assert distortion(built("faiss-opq")) < 0.95 * distortion(built("faiss-pq"))


def test_codes_find_most_neighbours():
    found = {}
    for name, sizes in SIZES.items():
        if "code_bytes" in sizes and name != "scann":
            baseline = built(name)
            found[name] = recall(baseline.search(QUERIES, 10, beam=baseline.num_leaves))
    assert min(found.values()) > 0.2, found
    assert found["faiss-opq"] > found["faiss-pq"] > 0.4, found


def test_graph_finds_neighbours_and_counts_distances():
    faiss = pytest.importorskip("faiss")
    graph = built("faiss-hnsw")
    hits = graph.search(QUERIES, 10, beam=64)
    assert recall(hits) > 0.9
    faiss.cvar.hnsw_stats.reset()
    again = graph.search(QUERIES, 10, beam=64)
    assert again.visited.sum() == hits.visited.sum()
    assert 64 < hits.visited.mean() < NUM_DOCS
    faiss.cvar.hnsw_stats.reset()
    graph.search(QUERIES, 10, beam=64)
    assert faiss.cvar.hnsw_stats.ndis == hits.visited.sum()
    assert graph.count_visited(QUERIES, 128).mean() > hits.visited.mean()
    assert graph.leaf_load_max is None and graph.leaf_load_cv is None


def test_bytes_are_what_is_stored():
    for name, sizes in SIZES.items():
        if name in GRAPHS or name == "scann":
            continue
        expected = sizes.get("code_bytes", 4 * WIDTH)
        assert built(name).bytes_per_doc == expected, name
        assert built(name).index_bytes > expected * NUM_DOCS
    kept = built("faiss-pq", rerank_vectors=True)
    assert kept.bytes_per_doc == 8 + 2 * WIDTH
    # 64 links of the lowest level and those above, 4 bytes each, level and offset.
    for name, links, code in (
        ("faiss-hnsw", 32, 4 * WIDTH), ("faiss-hnsw-sq", 32, WIDTH),
        ("faiss-hnsw-pq", 16, 8),
    ):  # fmt: skip
        stored = built(name).bytes_per_doc - code
        assert 2 * links * 4 + 12 <= stored < 2 * links * 4 * 1.1 + 12, name


def test_bytes_of_scann():
    assert built("scann").bytes_per_doc == 8
    assert built("scann", code_bytes=None).bytes_per_doc == 4 * WIDTH
    assert built("scann", rerank_vectors=True).bytes_per_doc == 8 + 2 * WIDTH
    assert built("scann", num_leaves=None).count_visited(QUERIES, 1).min() == NUM_DOCS


@pytest.mark.parametrize("name", ["faiss-pq", "lsh", "faiss-opq-ivfpq", "scann"])
def test_reranking_finds_more(name):
    baseline = built(name, rerank_vectors=True)
    beam = baseline.num_leaves
    few = baseline.search(QUERIES, 10, beam=beam, rerank=10)
    many = baseline.search(QUERIES, 10, beam=beam, rerank=300)
    assert recall(many) > 0.9 and recall(many) > recall(few)
    expected = np.take_along_axis(QUERIES @ DOCUMENTS.T, many.rows, 1)
    np.testing.assert_allclose(many.scores, expected, atol=5e-3)


@pytest.mark.parametrize("name", ["faiss-opq-ivfpq", "faiss-hnsw", "scann"])
def test_measured_as_an_index_is(name, make_record):
    skip_without_library(name)
    names = [f"d{row}" for row in range(NUM_DOCS)]
    baseline = build_baseline(name, DOCUMENTS, doc_ids=names, **SIZES[name])
    query_ids = [f"q{row}" for row in range(len(QUERIES))]
    qrels = {q: {names[row]: 1} for q, row in zip(query_ids, EXACT[:, 0], strict=True)}
    beam = beam_for_budget(baseline, QUERIES, 40)
    fields = measure(
        baseline, QUERIES, query_ids, qrels, beam=beam, tower_width=WIDTH, k=100
    )
    record = dataclasses.replace(make_record(), **fields)
    assert 0.2 < record.docs_visited <= 0.4
    assert record.recall_at_100 > 0.8
    assert record.compression == 4 * WIDTH / baseline.bytes_per_doc
    assert baseline.search(QUERIES, 500, beam=1).ids[0, -1] is None


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_lent(threads):
    faiss = pytest.importorskip("faiss")
    before = faiss.omp_get_max_threads()
    hits = built("faiss-ivf").search(QUERIES, 10, beam=2, threads=threads)
    assert faiss.omp_get_max_threads() == before
    one = built("faiss-ivf").search(QUERIES, 10, beam=2)
    np.testing.assert_array_equal(hits.rows, one.rows)


def test_scann_threads_find_the_same():
    baseline = built("scann")
    one, two = (baseline.search(QUERIES, 10, beam=4, threads=t) for t in (1, 2))
    np.testing.assert_array_equal(one.rows, two.rows)


def test_every_baseline_is_tested():
    assert set(SIZES) == set(BASELINES)
