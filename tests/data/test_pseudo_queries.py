import numpy as np
import pytest

from ehi.data.pseudo_queries import (
    SPAN_WORDS,
    MovedDocuments,
    pseudo_queries,
    split_name,
)
from ehi.data.tfds_builder import Document

LONG = " ".join(f"word{number}" for number in range(40))
DOCUMENTS = [
    Document(
        "a", "A title", f"First sentence has five words. {LONG}. Ends. Last here."
    ),
    Document("b", "pkg.parse_isoDate", LONG),
    Document("c", "", "too short"),
    Document("d", "Title only", ""),
]


def test_kinds_come_from_their_document():
    texts, rows, kinds = pseudo_queries(DOCUMENTS, per_document=3)
    assert set(rows) == {0, 1, 2, 3}
    for text, row, kind in zip(texts, rows, kinds, strict=True):
        document = DOCUMENTS[row]
        if kind == "title":
            assert text == split_name(document.title)
        else:
            assert text in document.content
    spans = [t for t, row, k in zip(texts, rows, kinds, strict=True) if k == "span"]
    assert all(
        len(t.split()) in range(SPAN_WORDS[0], SPAN_WORDS[1] + 1) for t in spans[:2]
    )


def test_sentences_are_drawn_from_all_and_long_enough():
    drawn = {
        pseudo_queries(DOCUMENTS[:1], kinds=["sentence"], per_document=1, seed=seed)[0][
            0
        ]
        for seed in range(20)
    }
    assert drawn == {"First sentence has five words.", f"{LONG}."}


def test_document_without_any_kind_gives_its_content():
    texts, rows, _ = pseudo_queries(DOCUMENTS[2:], kinds=["sentence"])
    assert texts == ["too short", "Title only"]
    assert rows.tolist() == [0, 1]


def test_draws_depend_on_seed_and_row_only():
    one = pseudo_queries(DOCUMENTS, seed=1)
    again = pseudo_queries(DOCUMENTS, seed=1)
    assert one[0] == again[0]
    np.testing.assert_array_equal(one[1], again[1])
    assert one[0] != pseudo_queries(DOCUMENTS, seed=2)[0]
    fewer = pseudo_queries(DOCUMENTS[:2], seed=1)[0]
    assert one[0][: len(fewer)] == fewer


def test_more_than_the_kinds_are_more_draws():
    texts, _, _ = pseudo_queries(DOCUMENTS[:1], kinds=["span"], per_document=4)
    assert len(set(texts)) == len(texts) == 4


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("os.path.isfile", "os path isfile"),
        ("pkg.parse_iso_date", "pkg parse iso date"),
        ("email.HTTPServer.__init__", "email http server init"),
        ("m.f#2", "m f 2"),
        ("Tree", "Tree"),
        ("A title. With a stop", "A title. With a stop"),
    ],
)
def test_names_are_split_into_words(title, words):
    assert split_name(title) == words


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="'tilte'"):
        pseudo_queries(DOCUMENTS, kinds=["tilte"])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pseudo_queries(DOCUMENTS, per_document=0)


def test_moved_documents_lie_as_queries_do():
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(5, 4)).astype(np.float32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    offset = np.array([0.5, 0, 0, 0], np.float32)
    queries = documents[[1, 3]] + offset  # every query lies the same way
    pairs = (np.array([0, 1]), np.array([1, 3]))
    table = MovedDocuments(documents, queries, pairs, per_document=2)
    moved, rows = np.asarray(table), [0, 1, 2, 3, 4] * 2
    assert table.shape == moved.shape == (10, 4)
    expected = documents[rows] + offset
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    again = MovedDocuments(documents, queries, pairs, per_document=2)
    for some in ([7], [9, 0, 9], np.arange(10)):  # made alone or together
        assert np.array_equal(again[some], moved[some])


def test_moved_documents_have_the_bits_that_one_draw_gives():
    rng = np.random.default_rng(0)
    documents, queries = (
        rng.normal(size=(n, 384)).astype(np.float32) for n in (50, 30)
    )
    pairs = (rng.integers(30, size=40), rng.integers(50, size=40))
    table = MovedDocuments(documents, queries, pairs, per_document=2, seed=3)
    drawn = np.random.default_rng(3).integers(40, size=100)
    away = queries[pairs[0][drawn]] - documents[pairs[1][drawn]]
    moved = documents[np.tile(np.arange(50), 2)] + away
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    whole = (moved / np.maximum(norms, 1e-12)).astype(np.float32)
    assert np.array_equal(np.asarray(table), whole)
    for row in (0, 49, 50, 99):
        assert np.array_equal(table[row], whole[row])


def test_synthetic_queries_need_pairs():
    nothing = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match=r"set pseudo.synthetic=0"):
        MovedDocuments(np.eye(3), np.eye(3), (nothing, nothing), per_document=1)
