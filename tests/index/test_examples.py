"""The examples in the docstrings of ehi.index run and print what they say."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil

import pytest

import ehi.index
from ehi.index import sharded

MODULES = [
    module.name for module in pkgutil.walk_packages(ehi.index.__path__, "ehi.index.")
]
# What an example says -> the extra that it needs.
EXTRAS = {
    "import faiss": "faiss",
    "ShardedIndex.start": "ray",
    "import_ray()": "ray",
}


def examples_in(module):
    """Name of a function, a class or a method -> its examples."""
    found = doctest.DocTestFinder().find(module)
    return {test.name: test for test in found if test.examples}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    missing = []
    for test in examples_in(module).values():
        extras = [extra for said, extra in EXTRAS.items() if said in test.docstring]
        if extras and not importlib.util.find_spec(extras[0]):
            missing += extras
        else:
            assert runner.run(test).failed == 0, test.name
    if missing:
        pytest.skip(f"the extra `{missing[0]}` is not installed")


def public():
    """Every public function, class and method of the index that is no error."""
    values = [getattr(ehi.index, name) for name in ehi.index.__all__]
    values += [
        value
        for name, value in vars(sharded).items()
        if getattr(value, "__module__", "") == sharded.__name__ and name[0] != "_"
    ]
    for value in values:
        if inspect.isclass(value) and issubclass(value, Exception):
            continue
        yield value
        for name, method in vars(value).items() if inspect.isclass(value) else ():
            method = getattr(method, "__func__", method)
            if inspect.isfunction(method) and not name.startswith("_"):
                yield method


def test_every_public_name_of_the_index_is_in_an_example():
    """In its own docstring; or that of its class calls it, or another one names it."""
    assert len(list(public())) > 30
    modules = {importlib.import_module(value.__module__) for value in public()}
    examples = {name: t for m in modules for name, t in examples_in(m).items()}
    sources = {
        name: "".join(example.source + example.want for example in test.examples)
        for name, test in examples.items()
    }
    for value in public():
        name = f"{value.__module__}.{value.__qualname__}"
        owner, _, last = name.rpartition(".")
        if inspect.isclass(value):
            shown = any(last in source for source in sources.values())
        else:
            shown = f".{last}(" in sources.get(owner, "")
        assert name in examples or shown, name
