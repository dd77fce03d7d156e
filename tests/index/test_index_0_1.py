"""A folder that version 0.1 wrote opens, answers the same, and takes updates.

`fixtures/index_0_1` comes from commit 285bdc8: 40 documents in 4 leaves, spilled to 2,
residual 8-bit codes behind a rotation, a tree for queries, string ids, vectors to
re-rank, documents to show; then 10 documents added and one deleted. `expected.npz` has
what that commit found for 10 queries.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ehi.index import open_index, save_index

FIXTURE = Path(__file__).parents[1] / "fixtures/index_0_1"
EXPECTED = np.load(FIXTURE / "expected.npz")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FIXTURE / "index", tmp_path / "index")


def assert_answers(index, rows=True):
    hits = index.search(EXPECTED["queries"], 7, beam=2)
    assert (hits.ids == EXPECTED["ids"]).all()
    np.testing.assert_allclose(hits.scores, EXPECTED["scores"], rtol=1e-5, atol=1e-6)
    assert (hits.visited == EXPECTED["visited"]).all()
    assert (hits.leaves == EXPECTED["leaves"]).all()
    assert not rows or (hits.rows == EXPECTED["rows"]).all()
    rerank = index.search(EXPECTED["queries"], 7, beam=3, rerank=20)
    assert (rerank.ids == EXPECTED["rerank_ids"]).all()
    np.testing.assert_allclose(rerank.scores, EXPECTED["rerank_scores"], rtol=1e-5)


@pytest.mark.parametrize("mmap", [True, False])
def test_it_opens_and_answers_the_same(folder, mmap):
    index = open_index(folder, mmap=mmap, verify=True)
    assert (index.num_documents, len(index.segments)) == (49, 2)
    assert index.document(39) == {"title": "document 39"}
    assert index.external_ids(np.array([39, 40])).tolist() == ["d\u00f6k/39", "new0"]
    assert (index.encoder, index.config) == ({"tower": "none"}, {"hash": "0"})
    assert_answers(index)


def test_it_takes_updates(folder, tmp_path):
    index = open_index(folder)
    show = [{"title": "more"}]
    index.add(np.ones((1, 8)), ["more"], documents=show)
    assert open_index(folder, verify=True).num_documents == 50
    index.delete(["more"])
    assert_answers(index)
    index.compact()
    assert_answers(open_index(folder, verify=True), rows=False)
    save_index(index, tmp_path / "copy")
    assert_answers(open_index(tmp_path / "copy", verify=True), rows=False)
