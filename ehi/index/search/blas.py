"""Arrays that start at a cache line, as those mapped from a file do.

NumPy's own start 16 bytes behind one. The widest loads of a product then touch two
lines each: of vectors of 200,000 x 384, OpenBLAS takes 6 to 15% longer.
"""

import collections
import functools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import threadpoolctl

_LINE = 64  # bytes
_of_thread = threading.local()


def aligned_empty(shape, dtype):
    """`np.empty`, from a cache line on."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _LINE, np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + size].view(dtype).reshape(shape)


def aligned_row(row):
    """A copy of a row, in memory that the thread's next call overwrites.

    Of a short row, asking for the address of new memory takes longer than the copy.
    """
    copy = getattr(_of_thread, "row", None)
    if copy is None or copy.shape != row.shape or copy.dtype != row.dtype:
        copy = _of_thread.row = aligned_empty(row.shape, row.dtype)
    copy[...] = row
    return copy


def aligned(array):
    """A C-contiguous copy, from a cache line on."""
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


# MERGED ehi_index_threads: BLAS held to one thread while Python threads, or small
# products, do the work.


class _OneThread:
    """A context in which BLAS runs on one thread, shared by all threads inside it.

    It counts who is inside: the first sets the limit and the last lifts it. Limits of
    their own would restore each other's limit instead of the number before. A library
    that runs on one thread already is left alone: setting it costs as much as a tenth
    of the search of one query.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.depth = 0
        self.changed = []  # (library, its number of threads before)

    def __call__(self):
        return self

    def __enter__(self):
        with self.lock:
            self.depth += 1
            if self.depth == 1:
                self.changed = _more_than_one()
                for library, _ in self.changed:
                    library.set_num_threads(1)

    def __exit__(self, *error):
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                for library, before in self.changed:
                    _free_control(library)
                    library.set_num_threads(before)
                    _free_control(library)


one_blas_thread = _OneThread()


def map_threads(function, items, threads):
    """[function(item) for item in items], on that many Python threads.

    The calling thread is one of them. After an exception no further item is begun.
    """
    items = list(items)
    threads = min(threads, len(items))
    if threads <= 1:
        return [function(item) for item in items]
    results = [None] * len(items)
    todo = iter(enumerate(items))  # shared: who is free takes the next

    def work():
        try:
            for position, item in todo:
                results[position] = function(item)
        finally:
            collections.deque(todo, maxlen=0)

    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()
    return results


@functools.cache
def blas_architecture():
    """Whose kernels NumPy's BLAS runs, as 'Haswell'; '' where it does not tell."""
    for library in _blas():
        return getattr(library, "architecture", None) or ""
    return ""


def _more_than_one():
    """The libraries that run on several threads, and on how many."""
    counts = [(library, library.get_num_threads()) for library in _blas()]
    return [(library, count) for library, count in counts if count != 1]


@functools.cache
def _blas():
    """NumPy's own BLAS, or where none is called after NumPy, all there are."""
    # Looked for once, at the first search: NumPy's is loaded by then, and what other
    # packages bring (SciPy, Faiss) computes nothing here.
    found = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    own = [library for library in found if "numpy" in library.filepath]
    return own or found


def _free_control(library):
    # From version 3.8 on, threadpoolctl lets only the thread that set a limit lift it,
    # and silently ignores others. The last to leave is often another one.
    if hasattr(library, "clear_controlling_thread"):
        library.clear_controlling_thread(force=True)
