"""Fast products: arrays that start at a cache line, and one BLAS thread.

Arrays mapped from a file start at a cache line, but those of NumPy start 16 bytes after
one. The widest loads of a product then touch two lines each, and OpenBLAS takes 6 to
15% longer for vectors of 200,000 x 384.

BLAS is held to one thread while Python threads, or small products, do the work.
"""

import collections
import functools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ehi.index.check import check_installed

check_installed("an index", "threadpoolctl")
import threadpoolctl  # noqa: E402

_LINE = 64  # bytes
_of_thread = threading.local()


def aligned_empty(shape, dtype):
    """`np.empty` that starts at a cache line."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _LINE, np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + size].view(dtype).reshape(shape)


def aligned_row(row):
    """A copy of a row that starts at a cache line; this thread's next call reuses it.

    For a short row, finding the address of new memory takes longer than the copy.
    """
    copy = getattr(_of_thread, "row", None)
    if copy is None or copy.shape != row.shape or copy.dtype != row.dtype:
        copy = _of_thread.row = aligned_empty(row.shape, row.dtype)
    copy[...] = row
    return copy


def aligned(array):
    """A C-contiguous copy that starts at a cache line."""
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


class _OneThread:
    """A context in which BLAS runs on one thread, shared by all threads inside it.

    It counts the threads inside: the first sets the limit and the last lifts it. With a
    limit each, one thread would restore another one's limit. A library that runs on one
    thread already is not touched: setting its limit takes a tenth of the time of
    searching one query.
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

    The calling thread is one of them. After an exception no other item is started.
    """
    items = list(items)
    threads = min(threads, len(items))
    if threads <= 1:
        return [function(item) for item in items]
    results = [None] * len(items)
    todo = iter(enumerate(items))  # shared: a free thread takes the next item

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
    """The processor that NumPy's BLAS has kernels for, as 'Haswell'; '' if unknown."""
    for library in _blas():
        return getattr(library, "architecture", None) or ""
    return ""


def _more_than_one():
    """The libraries that run on several threads, and their numbers of threads."""
    counts = [(library, library.get_num_threads()) for library in _blas()]
    return [(library, count) for library, count in counts if count != 1]


@functools.cache
def _blas():
    """NumPy's own BLAS, or all BLAS libraries if none has NumPy's name."""
    # The first search looks for it, once. NumPy's is loaded by then, and those of other
    # packages (SciPy, Faiss) compute nothing here.
    found = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    own = [library for library in found if "numpy" in library.filepath]
    return own or found


def _free_control(library):
    # Since version 3.8, only the thread that set a limit lifts it: threadpoolctl
    # silently ignores others. The last thread to leave is often another one.
    if hasattr(library, "clear_controlling_thread"):
        library.clear_controlling_thread(force=True)
