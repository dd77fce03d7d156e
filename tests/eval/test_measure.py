import dataclasses

import numpy as np
import pytest

from ehi.eval.measure import (
    beam_for_budget,
    curve,
    measure,
    min_prob_for_budget,
    per_query_path,
    rank,
)
from ehi.eval.metrics import evaluate, read_run
from ehi.eval.records import Record
from ehi.index import build_index
from ehi.index.search.routing import leaf_log_probs

NUM_DOCS, WIDTH = 300, 8


@pytest.fixture(scope="module")
def corpus():
    """Documents, queries, query ids, qrels: query i wants document i."""
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(NUM_DOCS, WIDTH)).astype(np.float32)
    queries = documents[:40] + 0.3 * rng.normal(size=(40, WIDTH)).astype(np.float32)
    query_ids = [f"q{i:02}" for i in range(40)]
    return documents, queries, query_ids, {f"q{i:02}": {f"d{i}": 1} for i in range(40)}


def make_index(documents, height=1, branching=16, **options):
    rng = np.random.default_rng(1)
    nodes = [
        rng.normal(size=(branching**level, branching, WIDTH)).astype(np.float32)
        for level in range(height)
    ]
    tree = {"kind": "per_node", "nodes": nodes, "scale": 3.0}
    ids = [f"d{i}" for i in range(len(documents))]
    return build_index(documents, ids, tree=tree, **options)


@pytest.mark.parametrize("height, branching", [(1, 16), (2, 4), (3, 3)])
@pytest.mark.parametrize("percent", [5, 12.5, 40, 100])
def test_beam_is_the_largest_that_fits(corpus, height, branching, percent):
    documents, queries, *_ = corpus
    index = make_index(documents, height, branching)
    fits = [
        beam
        for beam in range(1, index.num_leaves + 1)
        if index.count_visited(queries, beam).mean() <= percent / 100 * NUM_DOCS
    ]
    assert beam_for_budget(index, queries, percent) == max(fits, default=None)


def test_no_beam_where_one_leaf_is_too_much(corpus):
    documents, queries, *_ = corpus
    assert beam_for_budget(make_index(documents, branching=2), queries, 1) is None


class DippingIndex:
    """A deeper tree's count may dip: beam 3 is over the budget, beams 4 and 5 fit."""

    num_documents, num_leaves = 100, 16
    counts = (5, 8, 12, 9, 10, 20, 30, 40, 50, 60, 70, 75, 80, 90, 95, 100)

    def count_visited(self, queries, beam):
        return np.full(len(queries), self.counts[beam - 1])


def test_a_dip_behind_the_bisected_beam_is_found():
    assert beam_for_budget(DippingIndex(), np.zeros((1, WIDTH)), 10) == 5


@pytest.mark.parametrize("spill", [1, 2])
@pytest.mark.parametrize("height, branching", [(1, 16), (2, 4), (3, 3)])
@pytest.mark.parametrize("percent", [25, 40, 90])
def test_min_prob_is_the_least_that_fits(corpus, height, branching, percent, spill):
    documents, queries, *_ = corpus
    index = make_index(documents, height, branching, spill=spill)
    min_prob = min_prob_for_budget(index, queries, percent)
    probs = np.exp(leaf_log_probs(queries, index.tree))
    below = probs[probs < min_prob].max()  # one leaf more, of one query

    def visited(min_prob):
        return index.count_visited(queries, index.num_leaves, min_prob).mean()

    assert visited(min_prob) <= percent / 100 * NUM_DOCS < visited(below * (1 - 1e-6))


def test_min_prob_of_all_documents_and_of_too_few(corpus):
    documents, queries, *_ = corpus
    assert min_prob_for_budget(make_index(documents), queries, 100) == 0.0
    index = make_index(documents, branching=2)
    assert min_prob_for_budget(index, queries, 1) is None
    least = 100 * index.count_visited(queries, 1).mean() / NUM_DOCS
    assert min_prob_for_budget(index, queries, least) == 1.0


def test_equal_probabilities_are_visited_together_or_not_at_all(corpus):
    documents, queries, *_ = corpus
    nodes = [np.zeros((1, 4, WIDTH), np.float32)]  # p = 1/4 of every leaf
    tree = {"kind": "per_node", "nodes": nodes, "scale": 1.0}
    index = build_index(documents, range(NUM_DOCS), tree=tree)
    assert min_prob_for_budget(index, queries, 100) == 0.0
    # All documents stand in leaf 0: the others are empty, and cost nothing.
    assert index.leaf_sizes.tolist() == [NUM_DOCS, 0, 0, 0]
    assert min_prob_for_budget(index, queries, 50) is None


@pytest.mark.parametrize("percent", [0, -1, 101])
def test_impossible_budget_is_refused(corpus, percent):
    documents, queries, *_ = corpus
    with pytest.raises(ValueError, match=str(percent)):
        beam_for_budget(make_index(documents), queries, percent)
    with pytest.raises(ValueError, match=str(percent)):
        min_prob_for_budget(make_index(documents), queries, percent)


def test_measure_fills_the_record_from_what_was_counted(corpus, tmp_path, make_record):
    documents, queries, query_ids, qrels = corpus
    index = make_index(documents, spill=2)
    path = tmp_path / "ehi.run.gz"
    fields = measure(
        index, queries, query_ids, qrels, beam=3, tower_width=16, run_path=path
    )
    # Everything else of a record is the caller's: cell, costs and provenance.
    ours = {f.name for f in dataclasses.fields(Record)}
    assert set(fields) < ours
    record = dataclasses.replace(make_record(), **fields)
    assert record.docs_visited == pytest.approx(
        index.count_visited(queries, 3).mean() / NUM_DOCS
    )
    assert record.nodes_scored == pytest.approx(16 / NUM_DOCS)
    assert record.bytes_per_doc == 2 * 4 * WIDTH
    assert record.compression == 1.0  # 4 x 16 / (2 copies x 4 x 8)
    assert record.latency_ms_p50 <= record.latency_ms_p95 <= record.latency_ms_p99
    assert record.qps_batch > 0 and record.threads == 1
    per_query = np.load(per_query_path(path))
    assert per_query_path(path) == tmp_path / "ehi.npy"
    assert per_query["query_id"].tolist() == query_ids
    assert per_query["ndcg@10"].mean() == pytest.approx(record.ndcg_at_10)
    from_file = evaluate(read_run(path), qrels)
    np.testing.assert_array_equal(from_file, per_query)
    assert 0 < record.ndcg_at_10 < 1


def test_full_beam_scores_as_exact_search(corpus):
    documents, queries, query_ids, qrels = corpus
    exact = build_index(documents, [f"d{i}" for i in range(NUM_DOCS)], tree=None)
    fields = [
        measure(index, queries, query_ids, qrels, beam=beam, tower_width=WIDTH)
        for index, beam in ((exact, 1), (make_index(documents), 16))
    ]
    for name in ("ndcg_at_10", "recall_at_1000", "docs_visited"):
        assert fields[0][name] == fields[1][name]
    assert fields[0]["docs_visited"] == fields[0]["recall_at_1000"] == 1.0


def test_reranking_scores_only_the_candidates_it_reads(corpus):
    documents, queries, query_ids, qrels = corpus
    index = make_index(documents, rerank_vectors=True)
    fields = measure(
        index, queries, query_ids, qrels, beam=16, rerank=5, tower_width=WIDTH
    )
    assert fields["rerank"] == 5
    assert fields["recall_at_1000"] == fields["recall_at_10"]


def test_curve_has_a_point_for_each_setting(corpus):
    documents, queries, query_ids, qrels = corpus
    settings = [{"beam": 1}, {"beam": 16, "min_prob": 0.05}, {"beam": 16}]
    points = curve(make_index(documents), queries, query_ids, qrels, settings)
    visited, ndcg = zip(*points, strict=True)
    assert visited[0] < visited[1] < visited[2] == 1.0
    assert ndcg[0] < ndcg[2]


def test_a_budget_names_the_bytes_of_codes_without_factors(corpus):
    documents, queries, query_ids, qrels = corpus
    codebooks = np.random.default_rng(2).normal(size=(4, 256, 2)).astype(np.float32)
    documents = documents / np.linalg.norm(documents, axis=1, keepdims=True)
    index = make_index(documents, codebooks=codebooks, score="cosine")
    fields = measure(index, queries, query_ids, qrels, beam=3, tower_width=16)
    assert fields["compression"] == 4 * 16 / 4
    assert fields["bytes_per_doc"] == 4 + 1  # and the factor
    # And a byte for the leaf; 16 nodes and the codebooks are shared.
    shared = 4 * (16 * WIDTH + codebooks.size)
    assert fields["total_bytes_per_doc"] == pytest.approx(6 + shared / NUM_DOCS)
    assert fields["total_bytes_per_doc_1m"] == pytest.approx(6 + shared / 10**6)


def test_a_ranking_in_parts_has_the_bits_of_one_search(corpus, monkeypatch):
    documents, _, _, qrels = corpus
    index, settings = make_index(documents), {"beam": 4}
    queries = np.random.default_rng(2).normal(size=(9000, WIDTH)).astype(np.float32)
    whole = index.search(queries, 5, **settings)
    searched, search = [], type(index).search

    def counted(index, part, k, **settings):
        searched.append(len(part))
        return search(index, part, k, **settings)

    monkeypatch.setattr(type(index), "search", counted)
    names = [f"q{number}" for number in range(len(queries))]
    _, hits = rank(index, queries, names, qrels, 5, **settings)
    assert len(searched) > 1 and sum(searched) == len(queries)
    for name in ("ids", "scores", "visited", "nodes_scored", "leaves", "rows"):
        np.testing.assert_array_equal(getattr(hits, name), getattr(whole, name))
