"""Files: written whole or not at all, the cache folder, sha256 sums.

Only the standard library and NumPy, so that every part of `ehi` may import it.

A new file or folder is written beside its place, flushed, and then renamed. Readers,
and a crash, see the old one or the new one. Permissions are those that the umask gives,
as for any file that `open` makes.
"""

import contextlib
import hashlib
import io
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np


def atomic_write(path: str | Path, data: bytes) -> None:
    """Writes a file whole.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> atomic_write(folder / "new" / "file", b"text")  # makes the folder as well
    >>> (folder / "new" / "file").read_bytes()
    b'text'
    """
    with new_file(path) as beside:
        beside.write_bytes(data)


def atomic_write_npy(path: str | Path, array: np.ndarray) -> None:
    """`np.save`, whole."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    atomic_write(path, buffer.getvalue())


def atomic_write_npz(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """`np.savez`, whole; the arrays may be larger than the memory left."""
    with new_file(path) as beside, beside.open("wb") as file:
        np.savez(file, **arrays)


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yields the name of a file to write, which becomes `path` when the block ends.

    An error leaves `path` as it was. If `path` is a link, the file behind it is
    replaced.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _name_beside(path)
    try:
        yield beside
        _flush(beside)
        os.replace(beside, path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | Path, exists: str = "refuse") -> Iterator[Path]:
    """Yields an empty folder to fill, which becomes `path` when the block ends.

    An error leaves `path` as it was.

    Args:
        path: where the folder is to be.
        exists: what happens if something is there when the block ends: 'refuse'
            raises an OSError; 'keep' keeps that and drops the new folder, for folders
            that two processes make alike; 'replace' puts the new folder in its place.
    """
    if exists not in ("refuse", "keep", "replace"):
        raise ValueError(
            f"exists must be 'refuse', 'keep' or 'replace', got {exists!r}"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _name_beside(path)
    beside.mkdir()
    try:
        yield beside
        for file in beside.rglob("*"):
            _flush(file)
        _flush(beside)
        if exists == "replace" and path.exists():
            _swap_in(beside, path)
        else:
            try:
                os.replace(beside, path)
            except OSError:
                if exists != "keep" or not path.exists():
                    raise
        sync_folder(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _swap_in(beside: Path, path: Path) -> None:
    old = _name_beside(path)
    os.replace(path, old)
    try:
        os.replace(beside, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _name_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def sync_folder(path: str | Path) -> None:
    """Flushes a folder: names made, replaced or removed in it survive a crash."""
    _flush(path)


def _flush(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder(chosen: str | os.PathLike | None = None) -> Path:
    """`chosen`, else the environment variable EHI_CACHE, else ~/.cache/ehi.

    Raises:
        FileNotFoundError: it is in a home folder that does not exist.
        NotADirectoryError: it is a file.
    """
    folder = Path(chosen or os.environ.get("EHI_CACHE") or "~/.cache/ehi")
    try:
        folder = folder.expanduser().absolute()  # a later chdir does not matter
    except RuntimeError:
        raise FileNotFoundError(
            f"{folder} names a home folder that does not exist: set the environment "
            "variable EHI_CACHE to a folder for downloads"
        ) from None
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"the cache {folder} is a file: set the environment variable EHI_CACHE to "
            "a folder"
        )
    return folder


def file_sha256(path: Path | zipfile.Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Iterable[Path | zipfile.Path]) -> str:
    """sha256 over the names and contents of files, in their order."""
    found = hashlib.sha256()
    for path in paths:
        found.update(f"{path.name} {file_sha256(path)}\n".encode())
    return found.hexdigest()


def arrays_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 over the names, dtypes, shapes and values of arrays.

    >>> one, two = np.zeros(3), np.ones((2, 2))
    >>> arrays_sha256({"a": one, "b": two}) == arrays_sha256({"b": two, "a": one})
    True
    """
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return found.hexdigest()
