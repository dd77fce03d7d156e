"""The examples in the docstrings of the losses run, and every loss has one."""

import doctest
import inspect

import pytest

from ehi.train import losses, tree_losses


@pytest.mark.parametrize("module", [losses, tree_losses], ids=lambda m: m.__name__)
def test_the_examples_of_all_public_functions_are_true(module):
    found = doctest.testmod(module)
    assert found.failed == 0
    public = {
        name
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and value.__module__ == module.__name__
    }
    examples = {
        test.name.rpartition(".")[2]
        for test in doctest.DocTestFinder().find(module)
        if test.examples
    }
    assert examples == public
