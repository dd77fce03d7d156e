"""The examples in the docstrings of ehi.index run and print what they say."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import ehi.index
from ehi.index import Index, index

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


def test_every_public_function_of_the_index_has_an_example():
    few_users = {"search_text", "count_visited", "verify", "check_addresses"}
    few_users |= {"document", "parameter_arrays"}
    methods = inspect.getmembers(Index, inspect.isfunction)
    public = {name for name, _ in methods if not name.startswith("_")} - few_users
    public |= {"build_index", "open_index", "save_index"}
    examples = doctest.DocTestFinder().find(index)
    assert public <= {t.name.rpartition(".")[2] for t in examples if t.examples}
