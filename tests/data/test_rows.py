"""Tables that are not in memory give the rows of the arrays that they stand for."""

import doctest

import numpy as np
import pytest

from ehi.data import rows
from ehi.data.rows import Counted, JoinedRows, SomeRows


def test_the_examples_are_true():
    assert doctest.testmod(rows).attempted and not doctest.testmod(rows).failed


def test_joined_rows_are_those_of_all_tables_in_turn():
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(n, 4)).astype(np.float32) for n in (3, 0, 5, 1)]
    joined, whole = JoinedRows(tables), np.concatenate(tables)
    asked = np.array([8, 0, 3, 3, 7, 2])
    np.testing.assert_array_equal(joined[asked], whole[asked])
    np.testing.assert_array_equal(joined[2:8:2], whole[2:8:2])
    np.testing.assert_array_equal(joined[4], whole[4])
    np.testing.assert_array_equal(np.asarray(joined), whole)
    assert (joined.shape, len(joined), joined.nbytes) == ((9, 4), 9, whole.nbytes)
    for bad in (-1, 9):
        with pytest.raises(IndexError, match=f"row {bad} of 9"):
            joined[[0, bad]]


def test_a_joined_table_is_not_read_before_it_is_asked_for():
    class Unread(np.ndarray):
        def __getitem__(self, rows):
            raise AssertionError("read")

    unread = np.ones((4, 2), np.float32).view(Unread)
    joined = JoinedRows([np.zeros((3, 2), np.float32), unread])
    assert joined[[2, 1]].tolist() == [[0, 0], [0, 0]]
    with pytest.raises(AssertionError, match="read"):
        joined[[3]]


def test_some_rows_are_found_by_their_number_in_the_whole():
    some = SomeRows(np.array([2, 5, 9]), np.arange(6, dtype=np.int32).reshape(3, 2))
    assert some[[9, 2, 2]].tolist() == [[4, 5], [0, 1], [0, 1]]
    for bad in (0, 4, 10):
        with pytest.raises(IndexError, match=f"row {bad} is not among the 3"):
            some[[2, bad]]


def test_counted_numbers_take_no_memory_and_equal_their_array():
    counted, whole = Counted(7, 10, period=4), 7 + np.arange(10) % 4
    np.testing.assert_array_equal(np.asarray(counted), whole)
    np.testing.assert_array_equal(counted[[9, 0, 4]], whole[[9, 0, 4]])
    np.testing.assert_array_equal(counted[::3], whole[::3])
    assert len(counted) == 10 and np.asarray(Counted(0, 0)).shape == (0,)
