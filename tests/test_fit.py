"""`ehi.fit`: vectors in, an index that searches, saves and takes more documents."""

import doctest
import subprocess
import sys

import numpy as np
import pytest

import ehi
from ehi import api
from ehi.index import Index, open_index

ROWS, WIDTH = 300, 16
OPTIONS = {"compression": 16, "steps": 2, "leaves": 8}


def vectors(rows=ROWS, seed=0, unit=True):
    x = np.random.default_rng(seed).normal(size=(rows, WIDTH)) + 0.1
    if unit:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32)


def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = [e for e in doctest.DocTestFinder().find(api.fit) if e.examples]
    assert 7 <= len(example.examples) <= 10
    assert doctest.DocTestRunner().run(example).failed == 0


def test_jax_is_imported_only_by_the_call():
    script = (
        "import sys, ehi, ehi.index, ehi.vector_index\nehi.load\n"
        "print('jax' in sys.modules)\nehi.fit\nprint('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("metric", ["", "cosine", "ip", "l2"])
def test_an_index_searches_by_its_metric_and_is_saved(metric, tmp_path):
    x, q = vectors(unit=not metric), vectors(20, seed=1, unit=False)
    index = ehi.fit(x, q, metric=metric, **OPTIONS)
    assert isinstance(index, Index) and index.num_documents == ROWS
    index.save(tmp_path / "index")
    opened, everything = ehi.load(tmp_path / "index"), {"beam": 8}
    hits, again = index.search(q, 10), opened.search(q, 10)
    assert np.array_equal(hits.ids, again.ids)
    assert 0 < hits.visited.mean() < ROWS / 2  # about a tenth, by default
    products = x / np.linalg.norm(x, axis=1, keepdims=True) if metric != "ip" else x
    scores = q @ products.T
    if metric == "l2":
        scores = -np.square(q[:, None] - x).sum(2)
    # Codes of 4 bytes find more of the exact results than chance (1 in 30) does.
    exact = np.argsort(-scores, axis=1)[:, :10]
    found = opened.search(q, 10, **everything).ids
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]
    assert np.mean(shares) > 0.25
    opened.add(0.9 * x[:2], [ROWS, ROWS + 1])
    assert opened.search(0.9 * x[:1], 302, **everything).ids.max() == ROWS + 1
    assert opened.tune(q, recall=0.5).recall >= 0.5
    drift = opened.drift(q)
    assert drift.documents_added == 2 and 0 < drift.visited_now < 0.5


def test_equal_seeds_give_equal_indexes():
    one, two = (ehi.fit(vectors(), seed=3, **OPTIONS) for _ in range(2))
    arrays = (index.parameter_arrays().items() for index in (one, two))
    for (name, a), (_, b) in zip(*arrays, strict=True):
        assert np.array_equal(a, b), name


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        (vectors().tolist(), {}, "documents holds list"),
        (vectors().astype(float), {}, "documents holds float64"),
        (np.where(np.arange(ROWS)[:, None] == 7, np.nan, vectors()), {}, "row 7 has a"),
        (2 * vectors(), {}, "documents: row 0 has not unit length"),
        (vectors(), {"metric": "dot"}, "allowed: 'cosine', 'ip', 'l2'"),
        (vectors(), {"ids": ["a"]}, "300 different ones, .* got 1"),
        (vectors(), {"ids": ["a"] * ROWS}, "of which 1 are different"),
        (vectors(), {"compression": 0}, "whole numbers from 1 to 64"),
        (vectors(), {"compression": 7}, "not a whole number"),
        (vectors(), {"compression": 1}, "64 codes of a document"),
        (vectors(), {"leaves": 301}, "300 documents for 301 leaves"),
        (vectors(), {"queries": vectors()[:, :3]}, "queries: queries have shape"),
        (vectors(), {"steps": -1}, "steps is -1"),
    ],
)
def test_wrong_arguments_are_refused_before_training(
    documents, options, message, monkeypatch
):
    monkeypatch.setattr(api, "_train", None)
    monkeypatch.setattr(api, "_training_data", None)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        ehi.fit(documents, **options)
    assert "NoneType" not in str(error.value)


def test_other_indexes_and_longer_documents_are_refused(tmp_path):
    plain = ehi.index.build_index(vectors(), range(ROWS), tree=None)
    ehi.index.save_index(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match="was not built of given"):
        ehi.load(tmp_path / "plain")
    index = ehi.fit(vectors(unit=False), metric="ip", **OPTIONS)
    with pytest.raises(ValueError, match="document 1 is .* times as long"):
        index.add(vectors(2, unit=False) * [[1], [9]], [900, 901])
    with pytest.raises(ValueError, match="must have shape"):
        index.search(vectors()[:, :3])
    index.save(tmp_path / "index")
    assert open_index(tmp_path / "index").width > WIDTH
