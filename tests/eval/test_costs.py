"""Work and bytes, counted by hand for small indexes and for those of libraries."""

import dataclasses

import numpy as np
import pytest
from library_cases import DOCUMENTS, NUM_DOCS, QUERIES, built
from library_cases import WIDTH as LIBRARY_WIDTH

from ehi.eval.costs import multiply_adds, total_bytes_per_doc, work
from ehi.eval.metrics import unlabelled_queries
from ehi.index import build_index

DOCS, WIDTH, LEAVES, HIDDEN = 300, 8, 16, 5


def floats(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def make_index(hidden=False, height=1, kind="per_node", **options):
    branching = round(LEAVES ** (1 / height))
    levels = range(height)
    if kind == "per_level":
        wide = [WIDTH + level * branching for level in levels]
        tree = {
            "kind": kind,
            "u": [0.1 * floats(e, e) for e in wide],
            "w": [floats(e, branching) for e in wide],
        }
    else:
        nodes = [floats(branching**level, branching, WIDTH) for level in levels]
        tree = {"kind": kind, "nodes": nodes, "scale": 3.0}
    if hidden:
        tree |= {"w_in": floats(WIDTH, HIDDEN), "w_out": floats(HIDDEN, WIDTH)}
    documents = floats(DOCS, WIDTH)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    return build_index(documents, range(DOCS), tree=tree, **options)


PQ = {"codebooks": floats(4, 16, 2), "rotation": np.eye(WIDTH)}
RESIDUAL = {"leaf_centroids": floats(LEAVES, WIDTH)}


@pytest.mark.parametrize(
    ("options", "beam", "expected"),
    [
        ({}, 3, LEAVES * WIDTH),
        ({"hidden": True}, 3, LEAVES * WIDTH + 2 * WIDTH * HIDDEN),
        # 4 nodes of the first level, then the children of the 3 best.
        ({"height": 2}, 3, (4 + 3 * 4) * WIDTH),
        # Rotation D^2, look-up table K D, and a centroid in each visited leaf.
        (PQ, 3, LEAVES * WIDTH + WIDTH**2 + 16 * WIDTH),
        (PQ | RESIDUAL, 3, (LEAVES + 3) * WIDTH + WIDTH**2 + 16 * WIDTH),
        # The score l2 needs a look-up table in each visited leaf.
        (PQ | {"score": "l2"}, 3, LEAVES * WIDTH + WIDTH**2 + 16 * WIDTH),
        (
            PQ | RESIDUAL | {"score": "l2"},
            3,
            (LEAVES + 3) * WIDTH + WIDTH**2 + 3 * 16 * WIDTH,
        ),
        (PQ | {"score": "cosine"}, 3, LEAVES * WIDTH + WIDTH**2 + 16 * WIDTH),
        # x u and x w, then relu(.) w.
        ({"kind": "per_level"}, 3, WIDTH * (WIDTH + LEAVES) + WIDTH * LEAVES),
        (
            {"kind": "per_level", "height": 2},
            3,
            WIDTH * (WIDTH + 4 + WIDTH + 4 + 4) + WIDTH * 4 + (WIDTH + 4) * 12,
        ),
    ],
)
def test_multiply_adds_are_those_of_the_nodes_scored(options, beam, expected):
    index = make_index(**options)
    hits = index.search(floats(7, WIDTH), beam=beam)
    assert multiply_adds(index, hits).tolist() == [expected] * 7
    visited = index.count_visited(floats(7, WIDTH), beam)
    np.testing.assert_allclose(
        work(index, hits) * DOCS, visited + expected / WIDTH, rtol=1e-12
    )


def test_a_document_counts_as_one_whatever_its_code_and_again_if_rescored():
    queries = floats(7, WIDTH)
    raw, coded = make_index(rerank_vectors=True), make_index(**PQ)
    hits, of_codes = raw.search(queries, beam=4), coded.search(queries, beam=4)
    more = work(coded, of_codes) - work(raw, hits)
    np.testing.assert_allclose(more * DOCS, WIDTH + 16)
    twice = work(raw, hits, rerank=20) - work(raw, hits)
    np.testing.assert_allclose(twice * DOCS, 20)


def test_a_query_that_stops_early_pays_for_fewer_centroids():
    index = make_index(**PQ, **RESIDUAL)
    hits = index.search(floats(50, WIDTH), beam=LEAVES, min_prob=0.2)
    leaves = (hits.leaves >= 0).sum(axis=1)
    assert leaves.min() < leaves.max()
    fixed = LEAVES * WIDTH + WIDTH**2 + 16 * WIDTH
    assert multiply_adds(index, hits).tolist() == (fixed + WIDTH * leaves).tolist()


def test_total_bytes_are_codes_leaf_numbers_and_parameters():
    flat = build_index(floats(DOCS, WIDTH), range(DOCS), tree=None)
    assert total_bytes_per_doc(flat) == 4 * WIDTH
    index = make_index(hidden=True, **PQ, **RESIDUAL)
    nodes, hidden, centroids = LEAVES * WIDTH, 2 * WIDTH * HIDDEN, LEAVES * WIDTH
    fixed = 4 * (nodes + hidden + centroids + 16 * WIDTH + WIDTH**2)
    # Four 4-bit codes, and one byte to tell 16 leaves apart.
    assert total_bytes_per_doc(index) == pytest.approx(2 + 1 + fixed / DOCS)
    assert total_bytes_per_doc(index, 10**6) == pytest.approx(3 + fixed / 10**6)
    factored = make_index(hidden=True, **PQ, **RESIDUAL, score="corrected")
    assert total_bytes_per_doc(factored) == pytest.approx(3 + 1 + fixed / DOCS)
    spilled = make_index(spill=2)
    per_copy = 4 * WIDTH + 1
    assert total_bytes_per_doc(spilled) == pytest.approx(
        2 * per_copy + 4 * nodes / DOCS
    )


# Of width 64, with 16 lists, and codes of 8 or 16 bytes: products of a query that are
# no document's, floats that are shared, and bytes of a leaf number.
D = LIBRARY_WIDTH
LIBRARIES = {
    "faiss-flat": (0, 0, 0),
    "faiss-ivf": (16 * D, 16 * D, 1),
    "faiss-pq": (256 * D, 256 * D, 0),
    "faiss-opq": (256 * D + D * D, 256 * D + D * D, 0),
    "faiss-ivfpq": (272 * D, 272 * D, 1),
    "faiss-opq-ivfpq": (272 * D + D * D, 272 * D + D * D, 1),
    "faiss-fastscan": (16 * D, 16 * D, 0),
    "lsh": (128 * D, 128 * D, 0),
    "itq-lsh": (64 * D, 64 * D, 0),
    "faiss-hnsw": (0, 0, 0),
    "scann": (32 * D, 32 * D, 1),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_are_counted_by_the_same_parts(name):
    index, (products, shared, number) = built(name), LIBRARIES[name]
    beam = {"faiss-hnsw": 20}.get(name, min(3, index.num_leaves))
    hits = index.search(QUERIES, beam=beam)
    assert multiply_adds(index, hits).tolist() == [products] * len(QUERIES)
    np.testing.assert_allclose(
        work(index, hits), (hits.visited + products / D) / NUM_DOCS
    )
    own = index.bytes_per_doc + number
    assert total_bytes_per_doc(index) == pytest.approx(own + 4 * shared / NUM_DOCS)
    assert total_bytes_per_doc(index, 10**6) == pytest.approx(own + 4 * shared / 10**6)


def test_our_index_and_the_library_count_equal_indexes_alike():
    theirs = built("faiss-ivf")
    nodes = theirs._core.quantizer.reconstruct_n(0, theirs.num_leaves)[None]
    tree = {"kind": "per_node", "nodes": [nodes], "scale": 1.0}
    ours = build_index(DOCUMENTS, range(NUM_DOCS), tree=tree)
    np.testing.assert_allclose(
        work(ours, ours.search(QUERIES, beam=3)),
        work(theirs, theirs.search(QUERIES, beam=3)),
    )
    assert total_bytes_per_doc(ours) == pytest.approx(total_bytes_per_doc(theirs))


def test_a_query_is_unlabelled_if_train_knows_none_of_its_answers():
    qrels = {
        "new": {"d1": 1, "d2": 0},
        "known": {"d3": 1},
        "half": {"d1": 2, "d3": 1},
        "no answer": {"d3": 0},
    }
    train = {"t": {"d2": 1, "d3": 1, "d1": 0}}
    assert unlabelled_queries(qrels, train) == {"new", "no answer"}
    assert unlabelled_queries(qrels, {}) == set(qrels)


def test_records_of_earlier_commits_know_no_work(make_record):
    data = make_record().to_json()
    later = ("work", "docs_visited_max", "total_bytes_per_doc_1m", "budget_queries")
    for name in later:
        del data[name]
    assert type(make_record()).from_json(data) == make_record()
    full = dataclasses.replace(make_record(), work=0.2, ndcg_at_10_unlabelled=0.5)
    assert full.to_json()["ndcg@10_unlabelled"] == 0.5
