"""BLAS has one thread during any search, and its old number afterwards."""

import threading

import pytest
import threadpoolctl

from ehi.index.search import blas
from ehi.index.search.blas import map_threads, one_blas_thread


def test_blas_threads_are_restored_after_overlapping_searches():
    def blas_threads():
        # NumPy's BLAS; an earlier test may have loaded those of SciPy and Faiss.
        return {library.get_num_threads() for library in blas._blas()}

    entered, leave = threading.Event(), threading.Event()

    def other():
        with one_blas_thread():
            entered.set()
            leave.wait(10)

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with one_blas_thread():
            thread = threading.Thread(target=other)
            thread.start()
            entered.wait(10)
            assert blas_threads() == {1}
        assert blas_threads() == {1}  # the other search is still inside
        leave.set()
        thread.join()
        assert blas_threads() == before


def test_libraries_on_one_thread_are_left_alone(monkeypatch):
    class Library:
        def __init__(self, count):
            self.count, self.set_to = count, []

        def get_num_threads(self):
            return self.count

        def set_num_threads(self, count):
            self.count = count
            self.set_to.append(count)

    one, three = Library(1), Library(3)
    monkeypatch.setattr("ehi.index.search.blas._blas", lambda: [one, three])
    with one_blas_thread(), one_blas_thread():
        assert three.count == 1
    with pytest.raises(KeyError), one_blas_thread():
        raise KeyError
    assert one.set_to == [] and three.set_to == [1, 3, 1, 3]


def test_an_exception_in_one_thread_ends_the_others():
    begun = []

    def work(item):
        begun.append(item)
        if item == 3:
            raise KeyError(item)

    for count in (1, 3):
        with pytest.raises(KeyError, match="3"):
            map_threads(work, range(1000), count)
    assert len(begun) < 1000


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_of_threads_keep_the_order_of_the_items(count):
    assert map_threads(lambda x: -x, range(40), count) == [-x for x in range(40)]
    assert map_threads(abs, [], count) == []
