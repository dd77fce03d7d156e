"""BLAS has one thread while anything searches, and then what it had before."""

import threading
import types

import pytest
import threadpoolctl

from ehi.index import threads
from ehi.index.threads import one_blas_thread


def test_blas_threads_are_restored_after_overlapping_searches():
    def blas_threads():
        # NumPy's pools; SciPy, if a test before has loaded it, has one of its own, and
        # so has Faiss, by OpenMP, where the number belongs to the thread that sets it.
        pools = threads._blas().info()
        return {p["num_threads"] for p in pools if p["threading_layer"] != "openmp"}

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
    blas = types.SimpleNamespace(lib_controllers=[one, three])
    monkeypatch.setattr("ehi.index.threads._blas", lambda: blas)
    with one_blas_thread(), one_blas_thread():
        assert three.count == 1
    with pytest.raises(KeyError), one_blas_thread():
        raise KeyError
    assert one.set_to == [] and three.set_to == [1, 3, 1, 3]
