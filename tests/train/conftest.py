import functools

import pytest
from tiny import make_model, make_tiny


@pytest.fixture(scope="session")
def tiny():
    """A TrainingSet, and the tables of a step: features and teacher embeddings."""
    return make_tiny()


@pytest.fixture
def tiny_model(tiny, tmp_path):
    """make(**options) -> graphdef, params of a started JointIndex."""
    return functools.partial(make_model, tiny[1], tmp_path / "starts")
