import numpy as np
import pytest

from ehi.eval.answers import describe_hits, format_hits
from ehi.index import build_index, open_index, save_index

WIDTH = 4


@pytest.fixture
def index(tmp_path):
    """12 documents in the 4 leaves of a tree of height 2, spilled to two"""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, WIDTH)).astype(np.float32)
    nodes = [
        rng.normal(size=(2**level, 2, WIDTH)).astype(np.float32) for level in range(2)
    ]
    tree = {"kind": "per_node", "nodes": nodes, "scale": 1.0}
    ids = [f"m.f{i}" for i in range(12)]
    shown = [{"title": f"f{i}", "line": f"def f{i}(x):"} for i in range(12)]
    built = build_index(vectors, ids, tree=tree, spill=2)
    save_index(built, tmp_path / "index", documents=shown)
    return open_index(tmp_path / "index")


def test_description_names_documents_leaves_and_work(index):
    queries = np.random.default_rng(1).normal(size=(3, WIDTH)).astype(np.float32)
    hits = index.search(queries, 20, beam=2)
    for number in range(3):
        described = describe_hits(index, hits, number)
        assert described["documents_visited"] == hits.visited[number]
        assert described["documents"] == 12
        paths = {"".join(f"{c}/" for c in index.leaf_path(p))[:-1]: p for p in range(4)}
        leaves = [paths[path] for path in described["leaves"]]
        assert leaves == hits.leaves[number].tolist()
        # k is more than was found: the padding is not described.
        assert len(described["hits"]) == (hits.rows[number] >= 0).sum() < 20
        for rank, hit in enumerate(described["hits"], start=1):
            row = hits.rows[number, rank - 1]
            assert (hit["rank"], hit["id"]) == (rank, f"m.f{row}")
            assert (hit["title"], hit["line"]) == (f"f{row}", f"def f{row}(x):")
            leaf = paths[hit["leaf"]]
            start, stop = index.segments[0].leaf_offsets[leaf : leaf + 2]
            assert row in index.segments[0].leaf_rows[start:stop]
            assert leaf in leaves


def test_text_shows_rank_score_title_line_leaf_and_share(index):
    hits = index.search(np.ones((1, WIDTH), np.float32), 2, beam=2)
    described = describe_hits(index, hits)
    text = format_hits("what is one", described)
    assert text.startswith('"what is one"')
    assert f"visited {hits.visited[0]} of 12 documents" in text
    assert f"in 2 of 4 leaves: {', '.join(described['leaves'])}" in text
    assert len(described["hits"]) == 2
    for hit in described["hits"]:
        line = next(x for x in text.splitlines() if x.startswith(f"  {hit['rank']}  "))
        assert f"{hit['score']:.4f}  {hit['title']}" in line
        assert line.endswith(f"leaf {hit['leaf']}")
        assert hit["line"] in text


def test_flat_index_without_documents_shows_ids_and_no_leaf():
    flat = build_index(np.eye(WIDTH, dtype=np.float32), [5, 6, 7, 8], tree=None)
    hits = flat.search(np.eye(WIDTH, dtype=np.float32)[2:3], 1)
    text = format_hits("q", describe_hits(flat, hits))
    assert text.splitlines()[-1] == "  1  1.0000  7"
    assert "leaf" not in text and "leaves" not in text
