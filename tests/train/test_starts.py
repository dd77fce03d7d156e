"""Starts of a large corpus are fitted to a sample of it."""

import doctest

import numpy as np
import pytest
from clustered import correlated
from tiny import WIDTH, make_model

from ehi.model.params import merge_model, split_model
from ehi.train import starts
from ehi.train.starts import fit_starts, sampled_rows

ROWS = 400


class Counted:
    """Rows of a file, and how many of them were read."""

    def __init__(self, rows):
        self.rows, self.read = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        self.read.append(np.asarray(rows))
        return self.rows[rows]

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("all rows are read")


def started(documents, cache, seed=0, fit_sample=0, **options):
    """Parameters after the starts, by name."""
    model = merge_model(*make_model({}, cache, fitted=False, **options))
    fit_starts(model, documents, seed=seed, cache=cache, fit_sample=fit_sample)
    return {name: np.asarray(value) for name, value in split_model(model)[1].items()}


def test_the_examples_are_true():
    assert doctest.testmod(starts).attempted and not doctest.testmod(starts).failed


def test_no_fit_reads_more_rows_than_its_sample(tmp_path):
    rows = Counted(correlated(ROWS, WIDTH))
    started(rows, tmp_path, fit_sample=100)
    assert rows.read and all(len(read) == 100 for read in rows.read)
    for read in rows.read:
        assert (np.diff(read) > 0).all()  # ascending, as a file is read best
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "kmeans-tree-4^1-of100-seed0.npz",
        "opq-residual-tree-4^1-of100-4x16-of100-seed0.npz",
    ]  # fmt: skip


def test_the_sample_is_drawn_by_the_seed(tmp_path):
    documents = correlated(ROWS, WIDTH)
    first, again = (
        started(documents, tmp_path / name, fit_sample=100) for name in ("a", "b")
    )
    other = started(documents, tmp_path / "c", seed=1, fit_sample=100)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    assert not np.array_equal(
        first["quantiser/codebooks"], other["quantiser/codebooks"]
    )
    a, b = (sampled_rows(documents, 50, seed) for seed in (0, 1))
    assert a.shape == b.shape == (50, WIDTH) and not np.array_equal(a, b)


def test_codes_of_whole_embeddings_are_fitted_alike_under_any_tree(
    tmp_path, monkeypatch
):
    # 64 rows for the codes, 80 and 160 for trees of 4 and 8 leaves.
    monkeypatch.setattr(starts, "PER_CODEWORD", 4)
    monkeypatch.setattr(starts, "PER_LEAF", 20)
    documents = correlated(ROWS, WIDTH)
    few, many = (
        started(
            documents, tmp_path / str(leaves), residual=False,
            tree={"kind": "per_node", "height": 1, "branching": leaves},
        )
        for leaves in (4, 8)
    )  # fmt: skip
    assert {file.name[:6] for file in tmp_path.glob("*/opq*")} == {"opq-4x"}
    np.testing.assert_array_equal(
        few["quantiser/codebooks"], many["quantiser/codebooks"]
    )


@pytest.mark.parametrize("fit_sample", [ROWS, 10 * ROWS])
def test_a_corpus_that_is_no_larger_is_fitted_whole(tmp_path, fit_sample):
    documents = correlated(ROWS, WIDTH)
    whole = started(documents, tmp_path / "whole", fit_sample=fit_sample)
    default = started(documents, tmp_path / "default")
    for name, value in whole.items():
        np.testing.assert_array_equal(value, default[name])
    assert all("-of" not in file.name for file in tmp_path.glob("*/*"))
    assert sampled_rows(documents, ROWS, 0) is documents
