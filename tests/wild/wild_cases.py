"""Marks of cases: whether they failed before the tests of their file were written.

A case that stands alone has the same word at the end of the test's name.
"""

import pytest


def failed(*values, id=None, **options):
    """A parameter set whose id ends in `failed`."""
    return _marked("failed", values, id, options)


def passed(*values, id=None, **options):
    """A parameter set whose id ends in `passed`."""
    return _marked("passed", values, id, options)


def _marked(was, values, id, options):
    name = "-".join(map(str, values)) if id is None else id
    return pytest.param(*values, id=f"{name}-{was}", **options)
