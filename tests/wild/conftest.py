"""A data set opened with a fresh cache, the warnings of `ehi`, and an index to ask."""

import logging

import numpy as np
import pytest
from topics import FIXTURES

from ehi.data.datasets import open_dataset
from ehi.index import build_index, save_index


@pytest.fixture
def opened(beir_folder, tmp_path):
    """Function: open the tiny folder, or another path, with a fresh cache."""

    def open_it(path=beir_folder):
        return open_dataset(path, data_dir=tmp_path / "cache")

    return open_it


@pytest.fixture
def warnings_of_ehi(caplog):
    """`experiments.main` may have silenced the logger in another test."""
    logger = logging.getLogger("ehi")
    before = logger.propagate, logger.level
    logger.propagate = True
    logger.setLevel(logging.INFO)
    yield
    logger.propagate, logger.level = before


@pytest.fixture(scope="module")
def index_path(tmp_path_factory):
    """An index of 40 documents whose titles no ASCII terminal can print."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    identity = {"tower": str(FIXTURES / "bert_tiny"), "query_length": 8}
    index = build_index(vectors, range(40), tree=None, encoder=identity)
    shown = [{"title": f"café {n} 日本", "line": "µ"} for n in range(40)]
    path = tmp_path_factory.mktemp("commands") / "index"
    save_index(index, path, documents=shown)
    return path
