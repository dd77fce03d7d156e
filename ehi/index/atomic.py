"""Files written, summed up and flushed to the disk in one pass."""

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ehi.index.aligned import aligned_empty


@dataclass(frozen=True)
class Stream:
    """An array that is written block by block and never stands in memory whole.

    Attributes:
        dtype: name of the values' type.
        shape: of the whole array.
        blocks: arrays that make it, one after the other, along its first axis.
    """

    dtype: str
    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]

    def array(self):
        """The array itself, in memory."""
        whole = aligned_empty(self.shape, self.dtype)
        start = 0
        for block in self.blocks:
            whole[start : start + len(block)] = block
            start += len(block)
        return whole


def write_array(path, array):
    """Writes an array or a Stream as .npy and flushes it to the disk.

    Returns:
        The file's entry in a manifest: name, bytes, sha256, dtype and shape.
    """
    if isinstance(array, np.ndarray):
        array = Stream(array.dtype.name, array.shape, [array])
    parts = _npy(array)
    shape = {"dtype": array.dtype, "shape": list(array.shape)}
    return {**write_file(path, parts), **shape}


def write_file(path, parts):
    """Writes byte strings one after the other and flushes them to the disk.

    Args:
        path: the file.
        parts: iterable of bytes, or of contiguous arrays whose bytes are meant.

    Returns:
        The file's entry in a manifest: its name, bytes and sha256.
    """
    with path.open("wb") as file:
        hashed = _Hashed(file)
        for part in parts:
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


def npy_header(dtype, shape):
    """The bytes before the values of a plain C-ordered .npy file, format 1.0."""
    described = f"{{'descr': '{np.dtype(dtype).str}', 'fortran_order': False, "
    described += f"'shape': {tuple(shape)!r}, }}"
    # The header ends on a multiple of 64 bytes, so that mapped values are aligned.
    padding = -(len(described) + 11) % 64
    text = described.encode() + b" " * padding + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _npy(stream):
    yield npy_header(stream.dtype, stream.shape)
    left = math.prod(stream.shape)
    for block in stream.blocks:
        left -= block.size
        yield np.ascontiguousarray(block, stream.dtype).reshape(-1).view(np.uint8)
    if left:
        raise ValueError(f"{left} values are missing of an array {stream.shape}")


class _Hashed:
    """A file that sums up what is written to it."""

    def __init__(self, file):
        self.file = file
        self.sum = hashlib.sha256()

    def write(self, data):
        self.sum.update(data)
        return self.file.write(data)
