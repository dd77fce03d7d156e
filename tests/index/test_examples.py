"""The examples in the docstrings of ehi.index run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import ehi.index

MODULES = [
    module.name for module in pkgutil.walk_packages(ehi.index.__path__, "ehi.index.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    found = doctest.DocTestFinder().find(module)
    examples = [test for test in found if test.examples]
    if any("import faiss" in test.docstring for test in examples):
        pytest.importorskip("faiss", reason="the extra `faiss` is not installed")
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in examples:
        assert runner.run(test).failed == 0, test.name
