"""The search setting that reaches a recall: found, stored, and used."""

import json
import shutil

import index_reference as reference
import numpy as np
import pytest

from ehi.index import build_index, open_index, save_index
from ehi.index.sharded import ShardedIndex, split_index
from ehi.index.tune import _least

WIDTH, NUM, K = 8, 600, 5
RNG = np.random.default_rng(11)
X = RNG.standard_normal((NUM, WIDTH)).astype(np.float32)
QUERIES = RNG.standard_normal((40, WIDTH)).astype(np.float32)
TREES = {
    "wide": {"kind": "per_node", "nodes": [X[None, :25]], "scale": 1.0},
    "tall": reference.make_tree("per_node", 2, 5, WIDTH, RNG, hidden=3),
    "level": reference.make_tree("per_level", 2, 5, WIDTH, RNG),
}
PQ = {
    "codebooks": RNG.standard_normal((4, 16, 2)).astype(np.float32),
    "rotation": reference.make_rotation(WIDTH, RNG),
    "leaf_centroids": RNG.standard_normal((25, WIDTH)).astype(np.float32) / 2,
}
KINDS = {
    "raw": {},
    "spilled": {"spill": 2},
    "codes": PQ,
    "l2": {**PQ, "score": "l2"},
    "rescored": {**PQ, "rerank_vectors": True, "spill": 2},
}
# `exact` of the result, by kind.
EXACT = {"codes": "codes", "l2": "codes"}


def make(kind="raw", tree="wide", names=range(NUM)):
    return build_index(X, names, tree=TREES[tree], **KINDS[kind])


def recall_of(index, truth, **setting):
    ids = index.search(QUERIES, K, **setting).ids
    common = [len(set(a) & set(b)) for a, b in zip(ids, truth, strict=True)]
    return sum(common) / truth.size


def exact_ids(index, exact):
    if exact == "codes":
        return index.search(QUERIES, K, beam=index.num_leaves).ids
    stored = X.astype(np.float16) if index.codebooks is not None else X
    return np.argsort(-(QUERIES @ stored.T.astype(np.float32)), axis=1)[:, :K]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_reaches_the_recall_and_says_what_a_search_does(kind, tree):
    index, exact = make(kind, tree), EXACT.get(kind, "vectors")
    truth = exact_ids(index, exact)
    visited, most = [], recall_of(index, truth, beam=25, rerank=0)
    for recall in (0.4, 0.8, 1.0):
        tuned = index.tune(QUERIES, recall, K)
        assert tuned.exact == exact and (tuned.reached or recall > most)
        assert tuned.recall == recall_of(index, truth, **tuned.setting)
        hits = index.search(QUERIES, K, **tuned.setting)
        assert tuned.visited_mean == hits.visited.mean()
        assert tuned.visited_p95 == np.percentile(hits.visited, 95)
        visited.append(tuned.visited_mean + tuned.rerank)
    assert visited == sorted(visited)
    again = index.tune(QUERIES, recall, K, threads=2)
    assert again.setting == tuned.setting  # deterministic
    if kind != "rescored":
        assert index.tune(QUERIES, 1.0, K).recall == 1
        assert index.tune(QUERIES, 1.0, K, truth=truth).recall == 1


@pytest.mark.parametrize("kind", ["raw", "codes"])
def test_no_smaller_beam_or_larger_probability_reaches_it(kind):
    index = make(kind)
    truth = exact_ids(index, EXACT.get(kind, "vectors"))
    for recall in (0.5, 0.8):
        tuned = index.tune(QUERIES, recall, K)
        reaching = [
            b for b in range(1, 26) if recall_of(index, truth, beam=b) >= recall
        ]
        by_beam = index.search(QUERIES, K, beam=reaching[0]).visited.mean()
        probs = [2 ** (-i / 64) for i in range(1000)]
        for prob in probs:
            if recall_of(index, truth, beam=25, min_prob=prob) >= recall:
                break
        by_prob = index.search(QUERIES, K, beam=25, min_prob=prob).visited.mean()
        # Two of the tried probabilities differ by 4.4%, those here by 1.1%.
        assert tuned.visited_mean <= min(by_beam, by_prob * 1.06)


def test_bisection_finds_the_least_with_few_tries():
    for low, high in ((0, 0), (0, 1), (3, 90)):
        for answer in range(low, high + 1):
            tried = []
            assert _least(lambda n: tried.append(n) or n >= answer, low, high) == answer  # noqa: B023
            assert len(tried) == len(set(tried)) <= 14 and high not in tried


def test_re_ranking_is_found_where_vectors_are_stored():
    index = make("rescored")
    truth = exact_ids(index, "vectors")
    everything = recall_of(index, truth, beam=25)
    tuned = index.tune(QUERIES, everything + 0.1, K)  # codes alone do not reach it
    assert tuned.reached and tuned.rerank > K
    assert tuned.recall == recall_of(index, truth, **tuned.setting)


def test_a_recall_out_of_reach_is_said_and_the_best_returned():
    index = make("codes")
    truth = exact_ids(make(), "vectors")
    best = recall_of(index, truth, beam=25)
    tuned = index.tune(QUERIES, 0.99, K, truth=truth, save=True)
    assert not tuned.reached and tuned.recall >= best
    assert "recall 0.99 cannot be reached" in str(tuned)
    assert index.setting is None  # nothing was stored
    assert "cannot" not in str(index.tune(QUERIES, 0.99, K))


def test_truth_may_be_padded_and_shorter():
    names = [f"d{i}" for i in range(NUM)]
    index = make(names=names)
    truth = np.array(names, object)[exact_ids(index, "vectors")]
    assert index.tune(QUERIES, 0.8, K, truth=truth.astype(str).tolist()) == (
        index.tune(QUERIES, 0.8, K, truth=truth)
    )
    truth[:, 1:] = None
    first = index.tune(QUERIES, 1.0, K, truth=truth)
    assert first.visited_mean < index.tune(QUERIES, 1.0, K).visited_mean
    assert first.recall == 1 and first.exact == "truth"


def test_flat_and_updated_indexes():
    flat = build_index(X, range(NUM), tree=None)
    tuned = flat.tune(QUERIES, 0.5)
    assert (tuned.setting["beam"], tuned.recall, tuned.visited_mean) == (1, 1, NUM)
    for kind in ("raw", "rescored"):
        index = make(kind)
        index.delete(exact_ids(index, "vectors")[:, 0].tolist())
        index.add(QUERIES[::2], range(1000, 1020))
        tuned = index.tune(QUERIES, 1.0, K)
        index.compact()
        assert index.tune(QUERIES, 1.0, K) == tuned


def test_few_of_many_queries_are_used():
    index = make()
    many = np.repeat(QUERIES, 60, axis=0)  # 2,400
    tuned = index.tune(many, 0.9, K)
    assert tuned.num_queries == 1000
    assert (
        abs(tuned.visited_mean - index.tune(QUERIES, 0.9, K).visited_mean) < 0.05 * NUM
    )


@pytest.mark.parametrize("kind", ["raw", "rescored"])
def test_a_stored_setting_is_used_and_survives(tmp_path, kind):
    index = make(kind)
    assert index.setting is None
    assert (index.search(QUERIES).leaves.shape[1]) == 1
    save_index(index, tmp_path / "index")
    writer, reader = open_index(tmp_path / "index"), open_index(tmp_path / "index")
    stale = open_index(tmp_path / "index")
    tuned = writer.tune(QUERIES, 0.6, K, save=True)
    assert writer.setting == tuned.setting and reader.setting is None
    assert reader.refresh() and reader.setting == tuned.setting
    # A writer that opened the folder before keeps what it did not know of.
    stale.add(X[:1], [9999])
    stale.delete([9999])

    def check(one):
        assert one.setting == tuned.setting
        found = one.search(QUERIES, K)
        expected = one.search(QUERIES, K, **tuned.setting)
        assert (found.ids == expected.ids).all()
        assert (one.search(QUERIES, K, beam=1).leaves >= 0).sum() == len(QUERIES)
        # More results than candidates to re-rank: no refusal of a stored number.
        assert one.search(QUERIES, NUM).ids.shape == (len(QUERIES), NUM)

    check(open_index(tmp_path / "index", verify=True))
    stale.compact()
    check(open_index(tmp_path / "index"))
    save_index(writer, tmp_path / "copy")
    check(open_index(tmp_path / "copy"))
    for folder in split_index(tmp_path / "copy", tmp_path / "parts", shards=2):
        assert open_index(folder).setting == tuned.setting
    index.tune(QUERIES, 0.6, K, save=True)
    check(index)
    index.compact()
    check(index)


def test_a_setting_of_training_counts_until_tuned():
    encoder = {"tower": "none", "default_beam": 3, "default_min_prob": 0.01}
    index = build_index(X, range(NUM), tree=TREES["wide"], encoder=encoder)
    assert index.setting == {"beam": 3, "min_prob": 0.01, "rerank": 0}
    assert index.search(QUERIES).leaves.shape[1] <= 3
    tuned = index.tune(QUERIES, 1.0, save=True)
    assert index.setting == tuned.setting


@pytest.mark.parametrize(
    "change",
    [{"beam": 26}, {"beam": 0}, {"min_prob": 2}, {"rerank": -1}, {"beam": "a"}],
)
def test_a_damaged_setting_is_refused(tmp_path, change):
    index = make()
    index.tune(QUERIES, save=True)
    save_index(index, tmp_path / "index")
    file = tmp_path / "index" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["search"] |= change
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="do not fit together"):
        open_index(tmp_path / "index")
    shutil.rmtree(tmp_path / "index")


BAD = {
    "recall 0": ({"recall": 0}, "above 0 and at most 1, got 0"),
    "recall 1.1": ({"recall": 1.1}, "above 0 and at most 1, got 1.1"),
    "recall nan": ({"recall": float("nan")}, "above 0 and at most 1, got nan"),
    "recall text": ({"recall": "0.9"}, "above 0 and at most 1, got '0.9'"),
    "k too large": ({"k": NUM + 1}, f"k={NUM + 1} results are more than the {NUM}"),
    "k 0": ({"k": 0}, "k must be at least 1"),
    "width": ({"queries": QUERIES[:, :3]}, r"shape \(N, 8\), .* got \(40, 3\)"),
    "whole numbers": ({"queries": QUERIES.astype(int)}, "queries must be floats"),
    "NaN": ({"queries": QUERIES * np.nan}, "NaN or infinity in 40 rows"),
    "none": ({"queries": QUERIES[:0]}, "there are no queries"),
    "texts": ({"queries": ["a text"]}, "encoder"),
    "truth shape": ({"truth": np.zeros((3, 5), int)}, r"shape \(40, m\), .* \(3, 5\)"),
    "ragged": ({"truth": [[1], [1, 2]] * 20}, r"shape \(40, m\)"),
    "unknown": ({"truth": np.full((40, 1), NUM + 7)}, "40 documents that .* first"),
    "strings": ({"truth": [["a"]] * 40}, "are integers, got strings"),
    "no truth": ({"truth": np.full((40, 2), -1)}, "truth names no document"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message) as refused:
        make().tune(**{"queries": QUERIES, **arguments})
    assert "\n" not in str(refused.value)


def test_shards_are_tuned_before_they_are_divided():
    with pytest.raises(NotImplementedError, match="before split_index"):
        ShardedIndex.tune(None, QUERIES)
