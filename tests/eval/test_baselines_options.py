"""Options of the library baselines: what each does, and that all get as many trials."""

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
    built,
    clustered,
    recall,
)

from ehi.eval.baselines.faiss import omp_threads
from ehi.eval.baselines.linear_router import top_lists, train_router
from ehi.eval.baselines.options import OPTIONS, TRIALS, check_options, trials_of
from ehi.eval.measure import min_prob_for_budget, shared_beam_for_budget

pytestmark = pytest.mark.faiss

CODED = [n for n, trials in OPTIONS.items() if "metric" in trials[0]]
SIGNS = [("lsh", {}), ("itq-lsh", {}), ("lsh", {"centred": True})]


def with_options(name, **options):
    return built(name, options=tuple(options.items()))


def test_every_baseline_gets_as_many_trials():
    for name, trials in OPTIONS.items():
        assert len(trials) == (1 if name == "faiss-flat" else TRIALS), name
        assert len({tuple(t.items()) for t in trials}) == len(trials), name
    assert [t["soar"] for t in trials_of("scann")] == [None, None]
    assert len(trials_of("scann", num_leaves=4)) == TRIALS


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("faiss-pq", {"links": 8}, "faiss-pq has no option 'links'.*metric, iter"),
        ("faiss-flat", {"metric": "l2"}, "'metric'; its options: none"),
        ("faiss-pq", {"metric": "cosine"}, "'cosine'; must be one of 'ip', 'l2'"),
        ("faiss-hnsw", {"links": 9}, "links of faiss-hnsw is 9; must be one of 32, 16"),
    ],
)  # fmt: skip
def test_options_that_do_not_exist_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_options(name, options)


# Expected: brute force over the stored reconstructions, as the definition says.
@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("name", [n for n in CODED if "rabitq" not in n])
def test_scores_are_those_of_the_reconstructions(name, metric):
    baseline = with_options(name, metric=metric)
    beam = NUM_DOCS if "hnsw" in name else baseline.num_leaves
    hits = baseline.search(QUERIES, 20, beam=beam)
    core = baseline._storage
    if hasattr(core, "make_direct_map"):
        core.make_direct_map()
    if name == "faiss-fastscan":  # its tables have 8 bits
        return
    stored, queries = core.reconstruct_n(0, NUM_DOCS), baseline._rotated(QUERIES)
    expected = queries @ stored.T
    if metric == "l2":
        expected = 2 * expected - (stored**2).sum(axis=1)
        expected -= (queries**2).sum(axis=1, keepdims=True)
    # The norms of additive codes are rounded to 256 steps.
    near = 0.05 if name in ("faiss-rq", "faiss-lsq", "faiss-prq") else 1e-4
    np.testing.assert_allclose(
        hits.scores, np.take_along_axis(expected, hits.rows, 1), atol=near
    )
    if "hnsw" in name:  # a graph of inner products may miss some
        return
    best = -np.sort(-expected, axis=1)[:, :20]
    np.testing.assert_allclose(hits.scores, best, atol=2 * near)


@pytest.mark.parametrize("name, options", SIGNS)
def test_sign_bits_are_scored_by_the_query_itself(name, options):
    baseline = with_options(name, **options)
    bits = 8 * baseline._core.code_size
    matrix = baseline._faiss.vector_to_array(baseline._transform.A)
    matrix = matrix.reshape(bits, WIDTH)
    shift = 0 if (name, options) == SIGNS[0] else DOCUMENTS.mean(axis=0)
    rows = (DOCUMENTS - shift) @ matrix.T
    expected = (QUERIES @ matrix.T) @ (np.sign(rows) * np.abs(rows).mean(axis=0)).T
    hits = baseline.search(QUERIES, NUM_DOCS)
    found = np.take_along_axis(expected, hits.rows, 1)
    np.testing.assert_allclose(hits.scores, found, atol=1e-3)


@pytest.mark.parametrize("name", ["lsh", "itq-lsh"])
def test_float_queries_find_more_than_bits(name):
    asymmetric, symmetric = (with_options(name, query=q) for q in ("float", "bits"))
    assert symmetric.bytes_per_doc == asymmetric.bytes_per_doc
    found = [recall(b.search(QUERIES, 10)) for b in (asymmetric, symmetric)]
    assert found[0] > found[1] + 0.03


# Numbers without rounding would be the principal axes; 8 bits are near them.
def test_bytes_and_bits_share_the_leading_axes():
    baseline = built("binary-int8", code_bytes=16, options=(("share", 0.25),))
    hits = baseline.search(QUERIES, NUM_DOCS)
    assert baseline.bytes_per_doc == 16
    stored = baseline._core.reconstruct_n(0, NUM_DOCS).reshape(NUM_DOCS, 16, 8)
    centred = DOCUMENTS - DOCUMENTS.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:4]
    projected = np.abs(centred @ axes.T)
    np.testing.assert_allclose(np.abs(stored[:, :4, 0]), projected, atol=0.01)
    assert (stored[:, :4, 1:] == 0).all() and (stored[:, 4:] != 0).mean() == 60 / 96
    expected = baseline._rotated(QUERIES) @ stored.reshape(NUM_DOCS, 128).T
    found = np.take_along_axis(expected, hits.rows, 1)
    np.testing.assert_allclose(hits.scores, found, atol=1e-4)
    assert recall(hits) > 0.4


def test_a_graph_returns_as_many_documents_as_are_asked_for():
    for name in ("faiss-hnsw", "faiss-hnsw-sq", "faiss-hnsw-pq"):
        graph = built(name)
        for beam in (1, 8):
            assert (graph.search(QUERIES, 10, beam=beam).rows >= 0).all(), name
        # Beyond its breadth, a list goes on with documents that were scored as well.
        short, long = (graph.search(QUERIES, k, beam=20) for k in (20, 60))
        np.testing.assert_array_equal(long.rows[:, :20], short.rows)
        found = (long.rows >= 0).sum(axis=1)
        assert (found > 20).all() and (found <= long.visited).all()
        np.testing.assert_array_equal(long.visited, short.visited)


# Fewer links cost less memory; each document has 2 M of them in the lowest level.
def test_links_are_counted():
    found = [with_options("faiss-hnsw", links=m) for m in (8, 12, 16, 32)]
    stored = [graph.bytes_per_doc - 4 * WIDTH for graph in found]
    for links, total in zip((8, 12, 16, 32), stored, strict=True):
        assert 8 * links + 12 <= total < 8 * links * 1.15 + 12
    assert all(graph._core.hnsw.efConstruction == 200 for graph in found)
    assert min(recall(g.search(QUERIES, 10, beam=64)) for g in found) > 0.9


@pytest.mark.parametrize("name", ["faiss-ivf", "faiss-opq-ivfpq", "faiss-ivfrabitq"])
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_probable_lists_are_searched(name, metric):
    if name == "faiss-ivf" and metric == "l2":
        pytest.skip("raw vectors have unit norm: both metrics are the same")
    options = {} if name == "faiss-ivf" else {"metric": metric}
    baseline = with_options(name, **options)
    # Every list visited, both ways.
    every = baseline.search(QUERIES, 20, beam=LISTS)
    probable = baseline.search(QUERIES, 20, beam=LISTS, min_prob=0.0)
    np.testing.assert_array_equal(every.rows, probable.rows)
    np.testing.assert_allclose(every.scores, probable.scores, atol=1e-5)
    log_probs = baseline.leaf_log_probs(QUERIES)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-5)
    hits = baseline.search(QUERIES, NUM_DOCS, beam=LISTS, min_prob=0.05)
    visited = np.exp(log_probs) >= 0.05
    visited[np.arange(len(QUERIES)), log_probs.argmax(axis=1)] = True
    np.testing.assert_array_equal(hits.visited, visited @ baseline.leaf_sizes)
    np.testing.assert_array_equal((hits.rows >= 0).sum(axis=1), hits.visited)
    one = baseline.search(QUERIES, 10, beam=1)
    likeliest = baseline.search(QUERIES, 10, beam=LISTS, min_prob=1.0)
    np.testing.assert_array_equal(one.rows, likeliest.rows)


@pytest.mark.parametrize("percent", [15, 20, 33])
def test_budgets_are_met_on_average(percent):
    queries = clustered(2000, 3)
    lists = built("faiss-ivf")
    beam = shared_beam_for_budget(lists, queries, percent)
    counted = lists.count_visited(queries, beam).mean() / NUM_DOCS
    assert abs(100 * counted - percent) < 0.3
    low, high = (lists.count_visited(queries, int(beam) + more) for more in (0, 1))
    assert low.mean() < percent / 100 * NUM_DOCS < high.mean()
    min_prob = min_prob_for_budget(lists, queries, percent)
    counted = lists.count_visited(queries, LISTS, min_prob).mean() / NUM_DOCS
    assert percent - 0.3 < 100 * counted <= percent


def test_a_query_visits_as_many_lists_in_any_batch():
    lists = built("faiss-ivf")
    together = lists.search(QUERIES, 10, beam=2.5)
    alone = [lists.search(QUERIES[i : i + 1], 10, beam=2.5) for i in range(50)]
    np.testing.assert_array_equal(
        together.rows, np.concatenate([h.rows for h in alone])
    )
    counts = [h.visited[0] for h in alone]
    np.testing.assert_array_equal(together.visited, counts)
    wide = together.visited == lists.count_visited(QUERIES, 3)
    assert 10 < wide.sum() < 40
    np.testing.assert_array_equal(
        lists.search(QUERIES, 10, beam=2.0).rows, lists.search(QUERIES, 10, beam=2).rows
    )


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("faiss-ivf", {"beam": 0.5}, "at least 1, got 0.5"),
        ("faiss-ivf", {"beam": 16.5}, "16.5 is larger than 16"),
        ("faiss-ivf", {"beam": 4, "min_prob": 1.5}, "between 0 and 1, got 1.5"),
        ("faiss-flat", {"min_prob": 0.5}, "this index has none: it must be None"),
        ("faiss-hnsw", {"beam": 12.5}, "whole number, got 12.5"),
    ],
)
def test_what_to_visit_must_fit(name, options, message):
    with pytest.raises(ValueError, match=message):
        built(name).search(QUERIES, 10, **options)


def test_as_many_lists_for_every_query_have_no_probabilities():
    baseline = with_options("faiss-ivf", scale=None)
    with pytest.raises(ValueError, match="must be None"):
        baseline.search(QUERIES, 10, beam=4, min_prob=0.5)


# The order of Vecchiato et al. 2024: a learned router puts more best documents into the
# first list than centroids do.
def test_a_linear_router_finds_the_list_of_the_best_document():
    train, asked = clustered(3000, 4), clustered(1000, 5)
    centroids = built("faiss-ivf")
    learned = built("linear-router", queries=train)
    np.testing.assert_array_equal(centroids.leaf_sizes, learned.leaf_sizes)
    assert centroids.bytes_per_doc == learned.bytes_per_doc
    assert centroids.fixed_bytes == learned.fixed_bytes
    best = (asked @ DOCUMENTS.T).argmax(axis=1)
    found = [
        (b.search(asked, 1, beam=1).rows[:, 0] == best).mean()
        for b in (centroids, learned, built("linear-router"))
    ]
    assert found[1] > found[0] + 0.01
    assert found[2] > found[0] - 0.02  # of documents alone
    hits = learned.search(QUERIES, 10, beam=LISTS)
    np.testing.assert_array_equal(hits.rows, EXACT[:, :10])


def test_the_router_lowers_its_cross_entropy():
    rng = np.random.default_rng(0)
    lists = rng.integers(0, LISTS, NUM_DOCS)
    targets = top_lists(QUERIES, DOCUMENTS, lists)
    np.testing.assert_array_equal(targets, lists[EXACT[:, 0]])
    start = np.zeros((LISTS, WIDTH), np.float32)
    weights = train_router(QUERIES, targets, start, rate=0.1, seed=0, epochs=300)
    assert ((QUERIES @ weights.T).argmax(axis=1) == targets).all()


# Peers: what `index_factory` makes with Faiss's own settings, same bytes, same score.
@pytest.mark.parametrize(
    "name, factory, options",
    [
        ("faiss-hnsw", "HNSW16,Flat", {"links": 16}),
        ("faiss-hnsw-sq", "HNSW16_SQ8", {"links": 16}),
        ("faiss-pq", "PQ8", {"metric": "l2"}),
        ("faiss-rq", "RQ4x8_Nqint8", {"metric": "l2"}),
        ("faiss-prq", "PRQ4x2x8_Nqint8", {"metric": "l2"}),
        ("faiss-lsq", "PLSQ4x2x8_Nqint8", {"metric": "l2"}),
        ("faiss-rabitq", "PCAR48,RaBitQ", {"metric": "l2"}),
        ("faiss-pca-pq", "PCAR32,PQ8", {"metric": "l2"}),
        ("faiss-sq", "PCA16,SQ8", {"metric": "l2"}),
        ("itq-lsh", "ITQ64,LSH", {"query": "bits"}),
    ],
)
def test_as_good_as_the_library_with_its_own_settings(name, factory, options):
    faiss = pytest.importorskip("faiss")
    baseline = with_options(name, **options)
    metric = faiss.METRIC_INNER_PRODUCT if "hnsw" in name else faiss.METRIC_L2
    beam = 16 if "hnsw" in name else 1
    peer = faiss.index_factory(WIDTH, factory, metric)
    with omp_threads(faiss, 1):
        peer.train(DOCUMENTS)
        peer.add(DOCUMENTS)
        _, rows = peer.search(QUERIES, 10)
    pairs = zip(rows, EXACT[:, :10], strict=True)
    theirs = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in pairs])
    assert recall(baseline.search(QUERIES, 10, beam=beam)) > theirs - 0.03


def test_rabitq_finds_more_than_its_bits_alone():
    rabitq = built("faiss-rabitq")  # 48 bits and two factors, or 112 bits
    assert rabitq._core.d == 48 and rabitq.bytes_per_doc == 14
    bits = with_options("lsh", query="bits")
    assert recall(rabitq.search(QUERIES, 10)) > recall(bits.search(QUERIES, 10)) - 0.1


@pytest.mark.parametrize("code_bytes", [None, 8])
def test_soar_stores_and_scores_two_copies(code_bytes):
    one = built("scann", code_bytes=code_bytes)
    two = built("scann", code_bytes=code_bytes, options=(("soar", 1.5),))
    copies = two.leaf_sizes.sum() / NUM_DOCS
    assert 1.5 < copies <= 2
    assert two.bytes_per_doc == copies * one.bytes_per_doc
    assert (two.count_visited(QUERIES, LISTS) == two.leaf_sizes.sum()).all()
    hits = two.search(QUERIES, NUM_DOCS, beam=3)
    assert (hits.visited >= (hits.rows >= 0).sum(axis=1)).all()
    # Three lists are visited, whichever they are.
    sizes = np.sort(two.leaf_sizes)
    assert (hits.visited <= sizes[-3:].sum()).all()
    assert (hits.visited >= sizes[:3].sum()).all()


def test_costs_are_those_of_the_arrays():
    assert built("lsh").query_multiply_adds == 128 * WIDTH
    assert built("faiss-pq").query_multiply_adds == 256 * WIDTH
    assert built("faiss-rq").fixed_bytes == 4 * 4 * 256 * WIDTH
    opq = built("faiss-opq-ivfpq")
    assert opq.query_multiply_adds == WIDTH * WIDTH + 256 * WIDTH
    assert opq.fixed_bytes == 4 * (WIDTH * WIDTH + 256 * WIDTH + LISTS * WIDTH)
    assert built("faiss-sq").query_multiply_adds == 16 * WIDTH + 16
    for name in SIZES:
        if name != "scann":
            assert built(name).fixed_bytes >= 0, name
