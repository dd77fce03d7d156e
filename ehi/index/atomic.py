"""Files written, summed up and flushed to the disk in one pass."""

import hashlib
import os

import numpy as np


def write_file(path, parts):
    """Writes byte strings, or one array as .npy, and flushes them to the disk.

    Args:
        path: the file.
        parts: iterable of bytes or arrays.

    Returns:
        The file's entry in a manifest: its name, bytes and sha256.
    """
    with path.open("wb") as file:
        hashed = _Hashed(file)
        for part in parts:
            if isinstance(part, np.ndarray):
                np.lib.format.write_array(hashed, part, allow_pickle=False)
            else:
                hashed.write(part)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"file": path.name, "bytes": size, "sha256": hashed.sum.hexdigest()}


def sync_folder(path):
    """Flushes a folder: names made, replaced or removed in it survive a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Hashed:
    """A file that sums up what is written to it."""

    def __init__(self, file):
        self.file = file
        self.sum = hashlib.sha256()

    def write(self, data):
        self.sum.update(data)
        return self.file.write(data)
