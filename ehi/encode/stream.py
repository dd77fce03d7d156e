"""Rows that are computed block by block into one .npy file, never all in memory.

    .NAME.npy.part    a header, then the blocks that are finished, one after another
    NAME.npy          the same file, renamed when the last block is in it

A run that is killed leaves the first file, and the next one goes on behind its last
whole block. A lock keeps two processes from writing one file: the second one waits, and
then finds the work done.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from ehi.files import sync_folder

# Rows that are computed and written at once: what a killed run loses at most.
BLOCK = 2**16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def stream_rows(
    path: Path,
    num: int,
    make: Callable[[int, int], np.ndarray],
    *,
    dtype: str | np.dtype | None = None,
) -> np.ndarray:
    """The rows of a file, which are computed first unless they are there.

    Memory holds one block of `BLOCK` rows. Several processes that train together start
    from the first block each, since they compute a block together.

    Args:
      path: the .npy file.
      num: number of rows.
      make: first row and the row behind the last -> these rows (n, ...); called with
        whole blocks in turn.
      dtype: of the file; None: that of the rows.

    Returns:
      read-only memory map (num, ...).

    Raises:
      OSError: the disk is full, or has no room for the file; what is written is kept.
      ValueError: the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            with _locked(part) as file:
                if not path.is_file():
                    _write(file, path, num, make, dtype)
                    os.replace(part, path)
                    sync_folder(path.parent)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise OSError(
                error.errno,
                f"the disk of {path.parent} is full while {num:,} rows are written; "
                "what is written is kept: make room, and the same command goes on",
            ) from None
    return open_rows(path, num)


def open_rows(path: Path, num: int) -> np.ndarray:
    """The memory map of a finished file.

    Raises:
      ValueError: it is damaged, or has another number of rows.
    """
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if len(rows) != num:
            raise ValueError(f"{len(rows)} rows instead of {num}")
    except (ValueError, EOFError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: delete it and start again ({error})"
        ) from None
    return rows


@contextlib.contextmanager
def _locked(part: Path):
    """The unfinished file, open for reading and writing, and locked."""
    while True:
        file = part.open("a+b")
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_named(file, part):
            break
        file.close()  # the one who had the lock renamed the file meanwhile
    with file:
        try:
            yield file
        finally:  # an empty file is nothing to go on from
            if not os.fstat(file.fileno()).st_size and _is_named(file, part):
                part.unlink()


def _is_named(file, path: Path) -> bool:
    """Whether a path still is the name of an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _write(file, path: Path, num: int, make, dtype) -> None:
    """Append the blocks that are missing."""
    header, size = _header(file, num, dtype), os.fstat(file.fileno()).st_size
    done = 0
    if header is not None and jax.process_count() == 1:
        begin, row_bytes = header
        done = (size - begin) // row_bytes // BLOCK * BLOCK
        file.truncate(begin + done * row_bytes)
    else:
        file.truncate(0)
    for start in range(done, num, BLOCK):
        rows = np.asarray(make(start, min(start + BLOCK, num)))
        rows = np.ascontiguousarray(rows, dtype or rows.dtype)
        if start == 0:
            shape = (num, *rows.shape[1:])
            descr = np.lib.format.dtype_to_descr(rows.dtype)
            _check_room(path, rows.nbytes // len(rows) * num)
            np.lib.format.write_array_header_1_0(
                file, {"descr": descr, "fortran_order": False, "shape": shape}
            )
        file.write(rows.data)
        file.flush()
        os.fsync(file.fileno())


def _header(file, num: int, dtype) -> tuple[int, int] | None:
    """Where the rows of an unfinished file begin, and bytes of a row; None if new."""
    file.seek(0)
    try:
        np.lib.format.read_magic(file)
        shape, _, found = np.lib.format.read_array_header_1_0(file)
    except (ValueError, EOFError):
        return None
    if shape[0] != num or (dtype is not None and found != np.dtype(dtype)):
        return None
    return file.tell(), int(np.prod(shape[1:], dtype=int)) * found.itemsize


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{path} needs {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are "
            "free",
        )
