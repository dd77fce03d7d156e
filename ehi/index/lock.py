"""One writer at a time: a lock on the index folder. Readers need none."""

import contextlib
import os


class IndexLockedError(RuntimeError):
    """Another process, or another thread, is writing to the index."""


@contextlib.contextmanager
def writer_lock(folder):
    """Holds the writer's lock of an index folder.

    The lock belongs to the opened folder: it goes with the process, however that ends.

    Raises:
        IndexLockedError: somebody else holds it.
    """
    import fcntl  # not there on Windows, where an index can still be read

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IndexLockedError(
                f"{folder} is being written to by another writer; "
                "an index has one at a time"
            ) from None
        yield
    finally:
        os.close(handle)
