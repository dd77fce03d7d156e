"""A folder of checked files: how they are written, opened, and locked.

manifest.json names every file, its bytes and its sha256. No file changes under its
name: a new manifest names new files, so an opened index stays as it was. One writer
at a time holds the lock, readers need none. `ehi.index.commit` writes whole indexes.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.files import file_sha256
from ehi.index.check import IndexCorruptError, IndexLockedError
from ehi.index.search.blas import aligned, aligned_empty

FORMAT = "ehi-index"
# What a folder needs of its reader: 2 has no scores; 4 has metadata or a tower, which
# code that does not know of them would lose. A folder without them stays at 3.
OLDEST, PLAIN, VERSION = 2, 3, 4
TOWER = "tower"  # entry of a manifest: a folder in the index, and its files
MANIFEST = "manifest.json"
_DTYPES = ("float64", "float32", "float16", "int64", "uint32", "uint8")
_MAX_HEADER = 1024
# The bytes before the values of a plain C-ordered .npy file, format 1.0.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<descr>[^']*)', 'fortran_order': False, "
    rb"'shape': \((?P<shape>[0-9, ]*)\), \} *\n",
    re.DOTALL,
)
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_FILE = re.compile(rf"(segments/)?{_NAME.pattern}")
TOWER_FOLDER = re.compile(r"tower-[0-9a-f]{8}")
TOWER_FILE = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
# Files up to this size are read even if the folder is mapped: a mapped file holds a
# descriptor, and an index of many small additions has many files.
_READ_BYTES = 2**16
_OPENINGS = 100  # attempts; no writer replaces the manifest that often meanwhile


@dataclass(frozen=True)
class Folder:
    """An index folder whose manifest and file sizes have been checked.

    Attributes:
        path: the folder.
        manifest: the parsed manifest; 'files' maps names to their entries.
        mmap: whether arrays are mapped into memory, else they are loaded.
    """

    path: Path
    manifest: dict
    mmap: bool = True

    @property
    def files(self):
        return self.manifest["files"]

    @property
    def num_bytes(self):
        """Bytes of all files but those of a tower, which belongs to no one index."""
        sizes = [entry["bytes"] for entry in self.files.values()]
        manifest = {key: self.manifest[key] for key in self.manifest if key != TOWER}
        return sum(sizes) + len(manifest_text(manifest))

    @property
    def tower(self):
        """The folder of the text tower that the index carries, or None."""
        entry = self.manifest.get(TOWER)
        return None if entry is None else self.path / entry["folder"]

    def file(self, name):
        return self.path / self.files[name]["file"]

    def array(self, name, mmap=None):
        """The array of a file, checked against the manifest.

        Args:
            name: in the manifest.
            mmap: True, False, or None for that of the folder.

        Raises:
            IndexCorruptError: the file is not the array that the manifest describes.
        """
        path, entry = self.file(name), self.files[name]
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        # NumPy's own reader evaluates the header as Python; a comparison is safer.
        try:
            with path.open("rb") as file:
                header = _HEADER.match(file.read(_MAX_HEADER))
        except OSError as error:
            raise IndexCorruptError(f"{path} cannot be read: {error}") from None
        if (
            header is None
            or header["descr"] != dtype.str.encode()
            or header["shape"].replace(b" ", b"") != _shape_text(shape)
            or header.end() + math.prod(shape) * dtype.itemsize != entry["bytes"]
        ):
            raise IndexCorruptError(
                f"{path} is not the array that {MANIFEST} describes, {dtype} {shape}"
            )
        if not math.prod(shape):  # nothing to map
            return np.empty(shape, dtype)
        array = _mapped(path, dtype, header.end(), shape)
        # A plain view: indexing a np.memmap costs several times more.
        mmap = self.mmap if mmap is None else mmap
        large = entry["bytes"] > _READ_BYTES
        return np.asarray(array) if mmap and large else aligned(array)

    def text(self, name):
        """The bytes of a file: (bytes,) uint8."""
        if not self.files[name]["bytes"]:
            return np.empty(0, np.uint8)
        text = _mapped(self.file(name), np.uint8, 0, (self.files[name]["bytes"],))
        large = len(text) > _READ_BYTES
        return np.asarray(text) if self.mmap and large else np.array(text)

    def is_newest(self):
        """Whether the folder still has the manifest that was read."""
        try:
            return json.loads(_manifest_text(self.path)) == self.manifest
        except (OSError, ValueError):
            return False

    def verify(self):
        """Checks the sha256 sum of every file.

        Raises:
            IndexCorruptError: naming what was altered.
            ValueError: somebody has written to the folder since it was opened, and
                files that the manifest names are gone.
        """
        try:
            self.check_sums()
        except IndexCorruptError:
            if self.is_newest():
                raise
            raise ValueError(
                f"{self.path} was written to since this index was opened, and files "
                "that it needs are gone: refresh() first"
            ) from None

    def check_sums(self):
        """Raises IndexCorruptError naming the first file whose sha256 differs."""
        entries = [(self.file(name), entry) for name, entry in self.files.items()]
        if self.tower is not None:
            files = self.manifest[TOWER]["files"]
            entries += [(self.tower / name, files[name]) for name in files]
        for path, entry in entries:
            try:
                found = file_sha256(path)
            except OSError as error:
                raise IndexCorruptError(f"{path} cannot be read: {error}") from None
            if found != entry["sha256"]:
                raise IndexCorruptError(
                    f"{path} was altered: sha256 {found}, "
                    f"{MANIFEST} says {entry['sha256']}"
                )


def open_folder(path, read, mmap=True):
    """`read(folder)` of the folder at `path`, all of it as one manifest describes it.

    If a writer replaces the manifest and removes old files meanwhile, `read` is called
    again with the new one.

    Args:
        path: the folder.
        read: Folder -> result; may raise IndexCorruptError.
        mmap: as of the Folder.

    Raises:
        FileNotFoundError: no folder or no manifest there.
        IndexCorruptError: the files are not as they were written.
    """
    path = Path(path).absolute()  # it stays the same folder after `os.chdir`
    for opening in range(_OPENINGS):
        text = _manifest_text(path)
        try:
            return read(_checked_folder(path, text, mmap))
        except (IndexCorruptError, FileNotFoundError) as error:
            if opening < _OPENINGS - 1 and _manifest_text(path) != text:
                continue
            if isinstance(error, IndexCorruptError):
                raise
            raise IndexCorruptError(f"a file of {path} is gone: {error}") from None


def read_folder(path):
    """Opens a folder and checks its manifest and the sizes of its files.

    Raises:
        FileNotFoundError: no folder or no manifest there.
        IndexCorruptError: the files are not as they were written.
    """
    return open_folder(path, lambda folder: folder)


def manifest_text(manifest):
    """A manifest as its file has it."""
    return json.dumps(manifest, indent=1).encode()


def _mapped(path, dtype, offset, shape):
    try:
        return np.memmap(path, dtype, "r", offset, shape)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        message = "too many open files: compact() the index, or raise `ulimit -n`"
        raise OSError(error.errno, message, str(path)) from None


def _manifest_text(path):
    file = path / MANIFEST
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} holds no index: {file} does not exist"
        ) from None


def _checked_folder(path, text, mmap):
    file = path / MANIFEST
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IndexCorruptError(f"{file} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise IndexCorruptError(f"{file} does not describe an index")
    version = manifest.get("version")
    if version not in range(OLDEST, VERSION + 1):
        newer = isinstance(version, int) and version > VERSION
        advice = "a newer ehi wrote it" if newer else "build it again"
        raise IndexCorruptError(
            f"{file} has format version {version!r}, "
            f"this code reads version {OLDEST} to {VERSION}: {advice}"
        )
    files, generation = manifest.get("files"), manifest.get("generation")
    if not isinstance(files, dict) or not isinstance(generation, int):
        raise IndexCorruptError(f"{file} lacks the files or the generation")
    for name, entry in files.items():
        _check_entry(path, name, entry)
    _check_tower(path, manifest.get(TOWER))
    obsolete = manifest.get("obsolete", [])
    if not isinstance(obsolete, list):
        raise IndexCorruptError(f"{file} lists no obsolete files")
    for name in obsolete:
        check_file_name(file, name)
        if (path / name).is_dir():
            raise IndexCorruptError(f"{file} lists the folder {name!r} as obsolete")
    segments = path / "segments"
    if segments.is_symlink():  # a writer would remove files behind it
        raise IndexCorruptError(f"{segments} is a link, which no writer of ehi makes")
    return Folder(path, manifest, mmap)


def _shape_text(shape):
    return repr(shape).replace(" ", "").strip("()").encode()


def _check_entry(folder, name, entry):
    """Refuses entries that name other folders or other types, or have wrong sizes."""
    manifest = folder / MANIFEST
    if not (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
        and _NAME.fullmatch(name)
    ):
        raise IndexCorruptError(f"{manifest} has no usable entry for {name!r}")
    check_file_name(manifest, entry["file"])
    if "shape" in entry and not (
        entry.get("dtype") in _DTYPES
        and isinstance(entry["shape"], list)
        and all(isinstance(n, int) and 0 <= n < 2**48 for n in entry["shape"])
        and math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize
        < entry["bytes"]
    ):
        raise IndexCorruptError(
            f"{manifest} gives {name} the impossible shape {entry['shape']} "
            f"of {entry.get('dtype')!r}"
        )
    _check_size(folder / entry["file"], entry)


def _check_tower(folder, entry):
    """Refuses a tower in another folder, or with files that are not as written."""
    if entry is None:
        return
    manifest = folder / MANIFEST
    entry = entry if isinstance(entry, dict) else {}
    name, files = entry.get("folder"), entry.get("files")
    plain = isinstance(name, str) and TOWER_FOLDER.fullmatch(name)
    if (
        not plain
        or not isinstance(files, dict)
        or not all(
            TOWER_FILE.fullmatch(file)
            and isinstance(stored, dict)
            and isinstance(stored.get("sha256"), str)
            and isinstance(stored.get("bytes"), int)
            for file, stored in files.items()
        )
    ):
        raise IndexCorruptError(f"{manifest} has no usable entry for its tower")
    if (folder / name).is_symlink():  # a writer would remove files behind it
        raise IndexCorruptError(f"{folder / name} is a link, which no writer makes")
    for file, stored in files.items():
        _check_size(folder / name / file, stored)


def _check_size(path, entry):
    if not path.is_file():
        raise IndexCorruptError(f"{path} is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise IndexCorruptError(
            f"{path} has {size} bytes, {MANIFEST} says {entry['bytes']}: "
            "truncated or altered"
        )


def check_file_name(manifest, name):
    """Refuses names that could lead out of the folder or to the manifest."""
    plain = isinstance(name, str) and _FILE.fullmatch(name)
    if not plain or name == MANIFEST:
        raise IndexCorruptError(
            f"{manifest} names the file {name!r}, which is not a plain name"
        )


@dataclass(frozen=True)
class Stream:
    """An array that is written block by block and is never whole in memory.

    Attributes:
        dtype: name of the values' type.
        shape: of the whole array.
        blocks: arrays that follow each other along its first axis.
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
        parts: iterable of bytes or of contiguous arrays.

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
    """A file that computes the sha256 of the bytes written to it."""

    def __init__(self, file):
        self.file = file
        self.sum = hashlib.sha256()

    def write(self, data):
        self.sum.update(data)
        return self.file.write(data)


@contextlib.contextmanager
def writer_lock(folder):
    """Holds the writer's lock of an index folder.

    The lock belongs to the opened folder, so it ends with the process in any case.

    Raises:
        IndexLockedError: another process or thread holds it.
    """
    import fcntl  # Windows lacks it; an index can still be read there

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
