"""A corpus that an experiment learns in seconds, and caches of its own."""

import pytest
from topics import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """320 documents on 8 topics, 48 queries; train and test ask for other documents."""
    return write_corpus(tmp_path_factory.mktemp("data") / "topics")


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.getbasetemp() / "main-cache"
    monkeypatch.setenv("EHI_CACHE", str(cache))
