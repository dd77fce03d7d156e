import numpy as np
from tiny import phase_of

from ehi.data.candidates import Candidates
from ehi.encode.embed import embed
from ehi.index import build_index
from ehi.index.search.search import queries_at_once
from ehi.model.export import index_arrays
from ehi.train import negatives
from ehi.train.batch import drawn_queries, make_batch
from ehi.train.negatives import (
    _search,
    given_negatives,
    mine_from_leaves,
    mine_from_teacher,
    search_whole,
)


def test_mined_are_the_best_unknown_documents_of_the_visited_leaves(tiny, tiny_model):
    data, tables = tiny
    graphdef, params = tiny_model(num_subspaces=0, rotation="none", residual=False)
    documents = embed(graphdef, params, "documents", tables["features_documents"])
    queries = embed(graphdef, params, "queries", tables["features_queries"])
    index = build_index(documents, np.arange(60), **index_arrays(graphdef, params))
    mined = mine_from_leaves(index, queries, data, per_query=5, beam=2)
    assert mined.shape == (data.num_queries, 5)
    for query in range(0, data.num_queries, 7):
        position, known = data.positives(np.array([query]))
        hits = index.search(queries[query : query + 1], 60, beam=2)
        expected = [row for row in hits.rows[0] if row >= 0 and row not in known][:5]
        assert mined[query, : len(expected)].tolist() == expected
        assert (mined[query, len(expected) :] == -1).all()


def test_a_search_in_parts_has_the_bits_of_one_search():
    rng = np.random.default_rng(0)
    documents, queries = (
        rng.normal(size=(n, 8)).astype(np.float32) for n in (50, 9000)
    )
    tree = {"kind": "per_node", "nodes": [documents[None, :4]], "scale": 1.0}
    for nodes in (None, tree):
        index = build_index(documents, np.arange(50), tree=nodes)
        assert queries_at_once(index.parameters, 1, 9) < len(queries)
        found = _search(index, queries, 9, beam=1, threads=1).ids
        np.testing.assert_array_equal(found, index.search(queries, 9, beam=1).ids)


def test_the_teachers_nearest_are_mined_for_every_query_that_is_drawn(tiny):
    data, _ = tiny
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(data.num_documents, 8)).astype(np.float32)
    queries = rng.normal(size=(data.num_queries, 8)).astype(np.float32)
    sources = {"labelled": 0.5, "documents": 0.5}
    phase = phase_of(steps=3, batch_size=6, sources=sources)
    rows = drawn_queries(data, phase, seed=1)
    batches = [
        make_batch(data, phase, seed=1, step=step)["queries"] for step in range(3)
    ]
    assert rows.tolist() == sorted(set(np.concatenate(batches).tolist()))
    assert 0 < len(rows) < data.num_queries
    mined = mine_from_teacher(documents, queries, data, per_query=5, rows=rows)
    assert mined.shape == (len(rows), 5)
    scores = queries @ documents.T
    for row, found in zip(rows, mined, strict=True):
        _, known = data.positives(np.array([row]))
        best = [doc for doc in np.argsort(-scores[row]) if doc not in known][:5]
        assert found.tolist() == best


def test_given_negatives_are_those_of_the_data_set_without_positives(tiny):
    data, _ = tiny
    _, known = data.positives(np.array([0]))
    lists = {0: [7, known[0], 9], 2: [4], 3: list(range(50))}
    lists = {query: [int(d) for d in documents] for query, documents in lists.items()}
    lengths = [len(lists.get(query, ())) for query in range(40)]
    candidates = Candidates(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([lists.get(q, ()) for q in range(40)]).astype(np.int32),
        np.full(sum(lengths), np.nan, np.float32),
    )
    everything = np.arange(data.num_queries)
    found = given_negatives(candidates, data, per_query=5, rows=everything)
    assert found.shape == (data.num_queries, 5) and found.dtype == np.int32
    assert found[0].tolist() == [7, 9, 7, 9, 7]
    assert found[2].tolist() == [4] * 5
    _, known = data.positives(np.array([3]))
    assert found[3].tolist() == [d for d in range(50) if d not in known][:5]
    others = np.delete(np.arange(data.num_queries), [0, 2, 3])
    assert (found[others] == -1).all()
    batch = make_batch(
        data, phase_of(mined_per_query=2, negatives="given", pool=40), seed=0, step=0,
        mined=found,
    )  # fmt: skip
    for query in set(batch["queries"].tolist()) & {0, 2, 3}:
        assert set(found[query].tolist()) & set(batch["documents"].tolist())


def test_an_exhaustive_search_by_parts_finds_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    documents, queries = (rng.normal(size=(n, 8)).astype(np.float32) for n in (50, 9))
    documents[3] *= 9
    documents[40] = documents[3]  # of equal scores the smaller row comes first
    queries[0] = documents[3]
    whole = search_whole(documents, queries, 12)
    monkeypatch.setattr(negatives, "SEARCHED", 7)  # fewer than are kept
    np.testing.assert_array_equal(search_whole(documents, queries, 12), whole)
    assert whole[0, :2].tolist() == [3, 40]


def test_drawn_rows_are_those_of_all_steps_also_over_epochs(tiny):
    data, _ = tiny
    for steps in (0, 1, 4, 30):
        phase = phase_of(steps=steps)
        batches = [
            make_batch(data, phase, seed=5, step=step)["queries"]
            for step in range(steps)
        ]
        expected = np.unique(np.concatenate([np.zeros(0, int), *batches]))
        assert drawn_queries(data, phase, seed=5).tolist() == expected.tolist()
