import numpy as np

from ehi.index import build_index
from ehi.train.embed import embed
from ehi.train.export import index_arrays
from ehi.train.negatives import mine_from_leaves


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
