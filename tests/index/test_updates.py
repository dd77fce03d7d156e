"""Documents added, deleted, replaced and compacted, in memory and in a folder."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from update_cases import KINDS, NUM, QUERIES, TREE, X, assert_same_hits, built, name_of

from ehi.index import build_index, open_index, save_index


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_updates_equal_an_index_built_of_what_is_left(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(list(KINDS)))
    strings, stored = data.draw(st.booleans()), data.draw(st.booleans())
    index = built(range(NUM), [name_of(i, strings) for i in range(NUM)], kind)
    path = tmp_path_factory.mktemp("updates") / "index"
    if stored:
        save_index(index, path)
        index = open_index(path)
    alive, fresh = {i: i for i in range(NUM)}, NUM  # name -> row of X, in row order
    for step in data.draw(st.lists(st.sampled_from("adduc"), min_size=1, max_size=6)):
        if step == "a":
            names = range(fresh, fresh + data.draw(st.integers(1, 20)))
            index.add(X[list(names)], [name_of(i, strings) for i in names])
            alive |= {i: i for i in names}
            fresh = names[-1] + 1
        elif step == "d" and len(alive) > 20:
            gone = data.draw(st.sets(st.sampled_from(list(alive)), max_size=9))
            deleted = index.delete([name_of(i, strings) for i in gone])
            assert deleted == len(gone)
            alive = {i: row for i, row in alive.items() if i not in gone}
        elif step == "u":
            some = data.draw(st.sets(st.sampled_from(list(alive)), max_size=5))
            if some:
                rows = [fresh + i for i, _ in enumerate(some)]
                fresh += len(some)
                index.update(X[rows], [name_of(i, strings) for i in some])
                alive = {i: row for i, row in alive.items() if i not in some}
                alive |= dict(zip(some, rows, strict=True))
        else:
            index.compact()
            assert len(index.segments) == 1 and index.contents.deleted is None
    assert index.num_documents == len(alive)
    names = [name_of(i, strings) for i in alive]
    rerank = {"rerank": 9} if kind == "spilled" else {}
    expected = built(list(alive.values()), names, kind)
    assert_same_hits(index, expected, **rerank)
    if stored:
        again = open_index(path, verify=True)
        assert_same_hits(again, expected, **rerank)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        assert size == again.index_bytes  # nothing old is left behind
    save_index(index, path)  # merges
    assert_same_hits(open_index(path, mmap=False, verify=True), expected, **rerank)


@pytest.mark.parametrize("kind", KINDS)
def test_filters_apply_before_the_top_k(kind):
    index = built(range(NUM), range(NUM), kind)
    index.add(X[NUM : NUM + 20], range(NUM, NUM + 20))
    index.delete([3, 50])
    allow = [1, 3, 7, 8, 20, 41, 50, 59, 1000]  # of which 3 and 50 are deleted
    expected = built([1, 7, 8, 20, 41, 59] * 2, range(12), kind)  # P = 9 <= 12
    expected.delete(range(6, 12))
    names = np.array([1, 7, 8, 20, 41, 59, -1])
    for beam in (1, 4, 9):
        for queries in (QUERIES, QUERIES[:1]):
            hits = index.search(queries, 8, beam=beam, allow=allow)
            others = expected.search(queries, 8, beam=beam)
            assert (hits.ids == names[others.ids]).all()
            assert (hits.visited == others.visited).all()
            mask = np.isin(np.arange(60), allow)
            masked = index.search(queries, 8, beam=beam, allow=mask)
            assert (masked.ids == hits.ids).all()
            denied = index.search(queries, 8, beam=beam, deny=~mask)
            assert (denied.ids == hits.ids).all()
            both = index.search(queries, 8, beam=beam, allow=allow, deny=[7, 41])
            assert not np.isin(both.ids, [7, 41]).any()
    assert (index.search(QUERIES, 3, beam=9, allow=[]).ids == -1).all()
    assert np.isneginf(index.search(QUERIES, 3, beam=9, allow=[]).scores).all()


def test_everything_deleted_and_added_again(tmp_path):
    for strings in (True, False):
        names = [name_of(i, strings) for i in range(NUM)]
        path = tmp_path / str(strings)
        save_index(built(range(NUM), names), path)
        index = open_index(path)
        assert index.delete(names) == NUM
        empty = None if strings else -1
        for state in ("deleted", "compacted", "opened"):
            hits = index.search(QUERIES, 3, beam=9)
            assert (hits.ids == empty).all(), state
            assert not hits.visited.any()
            assert index.bytes_per_doc == index.leaf_load_cv == 0
            if state == "deleted":
                index.compact()
            else:
                index = open_index(path, verify=True)
        index.add(X[:NUM], names)
        assert_same_hits(index, built(range(NUM), names))


def test_documents_to_show_follow_their_documents(tmp_path):
    shown = [{"title": f"zwölf {i}"} for i in range(NUM + 3)]
    save_index(built(range(NUM), range(NUM)), tmp_path / "index", shown[:NUM])
    index = open_index(tmp_path / "index")
    index.add(X[NUM : NUM + 3], range(NUM, NUM + 3), documents=shown[NUM:])
    index.delete([0, NUM + 1])
    assert index.document(NUM + 2) == shown[NUM + 2]
    index.compact()
    left = [i for i in range(NUM + 3) if i not in (0, NUM + 1)]
    assert [index.document(row) for row in range(NUM + 1)] == [shown[i] for i in left]
    with pytest.raises(ValueError, match="stores its documents to show, got no"):
        index.add(X[:1], [99])
    with pytest.raises(ValueError, match="2 documents to show for 1 embeddings"):
        index.add(X[:1], [99], documents=shown[:2])
    with pytest.raises(ValueError, match="stores no documents to show, got some"):
        built(range(NUM), range(NUM)).add(X[:1], [99], documents=shown[:1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i: i.add(X[:1, :3], [99]), ValueError, "width 3, the index 8"),
        (lambda i: i.add(X[:1] * np.nan, [99]), ValueError, "NaN"),
        (lambda i: i.add(X[:0], []), ValueError, "empty corpus"),
        (lambda i: i.add(X[:1].astype(int), [99]), ValueError, "must be floats"),
        (lambda i: i.add(X[:2], [98]), ValueError, "1 doc_ids for 2"),
        (lambda i: i.add(X[:2], [98, 98]), ValueError, "98 is there twice"),
        (lambda i: i.add(X[:2], [99, 5]), ValueError, "1 ids are in .*, first 5"),
        (lambda i: i.add(X[:1], ["d1"]), ValueError, "are integers, got strings"),
        (lambda i: i.add(X[:1], [-1]), ValueError, "from 0 to .* got -1"),
        (lambda i: i.add(X[:2], "ab"), ValueError, "several in a row, .* got 'ab'"),
        (lambda i: i.delete("11"), ValueError, "several in a row, .* got '11'"),
        (lambda i: i.delete(5), ValueError, "several in a row, .* got 5"),
        (lambda i: i.delete([True, False]), ValueError, "got True among 2"),
        (lambda i: i.search(QUERIES, allow=[True] * NUM), ValueError, "got True"),
        (lambda i: i.search(QUERIES, 10**10), ValueError, "k must be at most 1048576"),
        (
            lambda i: i.add(X[:1], [99], encoder="this"),
            ValueError,
            "encoder must be a dict .* got 'this'",
        ),
        (
            lambda i: i.add(X[:1], [99], encoder={"name": "this"}),
            ValueError,
            r"\['name'\] cannot be compared with .* has \['tower'\]",
        ),
        (
            lambda i: i.add(X[:1], [99], encoder={"tower": "other"}),
            ValueError,
            "another encoder: its tower is 'other'",
        ),
        (lambda i: i.delete([5, 77, 78]), LookupError, "2 ids are not .*, first 77"),
        (lambda i: i.delete([5], missing="no"), ValueError, "missing must be one of"),
        (lambda i: i.delete(["d5"]), ValueError, "are integers, got strings"),
        (lambda i: i.update(X[:2], [5, 77]), LookupError, "1 ids are not"),
        (lambda i: i.search(QUERIES, allow=["d5"]), ValueError, "are integers"),
        (
            lambda i: i.search(QUERIES, deny=np.zeros(3, bool)),
            ValueError,
            "deny is a mask of shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    tmp_path, change, error, message
):
    index = build_index(X[:NUM], range(NUM), tree=TREE, encoder={"tower": "this"})
    save_index(index, tmp_path / "index")
    opened = open_index(tmp_path / "index")
    manifest = (tmp_path / "index" / "manifest.json").read_bytes()
    for one in (index, opened):
        with pytest.raises(error, match=message):
            change(one)
        assert_same_hits(one, built(range(NUM), range(NUM)))
    assert (tmp_path / "index" / "manifest.json").read_bytes() == manifest
    assert opened.delete([5, 77], missing="ignore") == 1
    opened.add(X[5:6], [5], encoder={"tower": "this"})
