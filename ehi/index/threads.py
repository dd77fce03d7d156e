"""BLAS held to one thread while Python threads, or small products, do the work."""

import contextlib
import functools
import threading

import threadpoolctl


class _OneThread:
    """A context in which BLAS runs on one thread, shared by all threads inside it.

    It counts who is inside: the first sets the limit and the last lifts it. Limits of
    their own would restore each other's limit instead of the number before.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.depth = 0
        self.limit = None

    @contextlib.contextmanager
    def __call__(self):
        with self.lock:
            self.depth += 1
            if self.depth == 1:
                self.limit = _blas().limit(limits=1)
        try:
            yield
        finally:
            with self.lock:
                self.depth -= 1
                if self.depth == 0:
                    _free_control()
                    self.limit.restore_original_limits()
                    _free_control()


one_blas_thread = _OneThread()


@functools.cache
def _blas():
    # Looked for once, at the first search: NumPy's own BLAS is loaded by then. One that
    # another package brings later (SciPy has its own) computes nothing here.
    return threadpoolctl.ThreadpoolController().select(user_api="blas")


def _free_control():
    # From version 3.8 on, threadpoolctl lets only the thread that set a limit lift it,
    # and silently ignores others. The last to leave is often another one.
    for library in _blas().lib_controllers:
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)
