"""A folder of checked files: manifest.json names every file, its bytes and sha256.

Files are written under names that no manifest mentions yet and the manifest is
replaced last, so a crash leaves the old content or the new one.
"""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.index.atomic import sync_folder, write_file

FORMAT = "ehi-index"
VERSION = 1
MANIFEST = "manifest.json"
_DTYPES = ("float32", "float16", "int64", "uint32", "uint8")
_MAX_HEADER = 1024
# What NumPy writes before the values of plain C-ordered arrays, format 1.0.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(?P<descr>[^']*)', 'fortran_order': False, "
    rb"'shape': \((?P<shape>[0-9, ]*)\), \} *\n",
    re.DOTALL,
)
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


class IndexCorruptError(ValueError):
    """A file of an index is missing, truncated, altered or does not fit the rest."""


@dataclass(frozen=True)
class Folder:
    """An index folder whose manifest and file sizes have been checked.

    Attributes:
        path: the folder.
        manifest: the parsed manifest; 'files' maps names to their entries.
    """

    path: Path
    manifest: dict

    @property
    def files(self):
        return self.manifest["files"]

    @property
    def num_bytes(self):
        sizes = [entry["bytes"] for entry in self.files.values()]
        return sum(sizes) + (self.path / MANIFEST).stat().st_size

    def file(self, name):
        return self.path / self.files[name]["file"]

    def array(self, name, mmap):
        """The array of a file, refused where it is not what the manifest says."""
        path, entry = self.file(name), self.files[name]
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        # NumPy's own reader evaluates the header as Python; this only compares it.
        with path.open("rb") as file:
            header = _HEADER.match(file.read(_MAX_HEADER))
        if (
            header is None
            or header["descr"] != dtype.str.encode()
            or header["shape"].replace(b" ", b"") != _shape_text(shape)
            or header.end() + math.prod(shape) * dtype.itemsize != entry["bytes"]
        ):
            raise IndexCorruptError(
                f"{path} is not the array that {MANIFEST} describes, {dtype} {shape}"
            )
        array = np.memmap(path, dtype, "r", header.end(), shape)
        # A plain view: indexing a np.memmap costs several times more.
        return np.asarray(array) if mmap else np.array(array)

    def text(self, name, mmap):
        """The bytes of a file: (bytes,) uint8."""
        if not self.files[name]["bytes"]:
            raise IndexCorruptError(f"{self.file(name)} is empty")
        text = np.memmap(self.file(name), np.uint8, mode="r")
        return np.asarray(text) if mmap else np.array(text)

    def check_sums(self):
        """Raises IndexCorruptError naming the first file whose sha256 differs."""
        for name, entry in self.files.items():
            path = self.file(name)
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise IndexCorruptError(f"{path} cannot be read: {error}") from None
            if found != entry["sha256"]:
                raise IndexCorruptError(
                    f"{path} was altered: sha256 {found}, "
                    f"{MANIFEST} says {entry['sha256']}"
                )


def read_folder(path):
    """Opens a folder and checks its manifest and the sizes of its files.

    Raises:
        FileNotFoundError: no folder or no manifest there.
        IndexCorruptError: anything else that is not as written.
    """
    path = Path(path)
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no index: {file} does not exist")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IndexCorruptError(f"{file} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise IndexCorruptError(f"{file} does not describe an index")
    if manifest.get("version") != VERSION:
        raise IndexCorruptError(
            f"{file} has format version {manifest.get('version')!r}, "
            f"this code reads version {VERSION}"
        )
    files, generation = manifest.get("files"), manifest.get("generation")
    if not isinstance(files, dict) or not isinstance(generation, int):
        raise IndexCorruptError(f"{file} lacks the files or the generation")
    for name, entry in files.items():
        _check_entry(path, name, entry)
    return Folder(path, manifest)


def write_folder(path, header, arrays, lines):
    """Writes arrays, and documents as JSON lines, so that a crash loses nothing.

    A new folder is filled beside its place and renamed. In an existing index new files
    stand beside the old ones until the new manifest has replaced the old manifest.

    Args:
        path: the folder.
        header: JSON entries of the manifest.
        arrays: name -> array.
        lines: name -> iterable of JSON values, one a line.

    Raises:
        FileExistsError: `path` is there and is not an index of this version.
    """
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            building.chmod(0o755)  # mkdtemp's folders are private
            _write_generation(building, 1, header, arrays, lines)
            os.replace(building, path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        sync_folder(path.parent)
        return
    try:
        old = read_folder(path)
    except (FileNotFoundError, IndexCorruptError) as error:
        raise FileExistsError(
            f"{path} exists and is not an index that can be replaced: {error}"
        ) from None
    generation = old.manifest["generation"] + 1
    _write_generation(path, generation, header, arrays, lines)
    for name in old.files:
        old.file(name).unlink(missing_ok=True)


def _write_generation(folder, generation, header, arrays, lines):
    mark = "" if generation == 1 else f".{generation}"
    files, written = {}, []
    try:
        for name, array in arrays.items():
            array = np.asarray(array, order="C")
            written.append(folder / f"{name}{mark}.npy")
            files[name] = {
                **write_file(written[-1], [array]),
                "dtype": array.dtype.name,
                "shape": list(array.shape),
            }
        for name, values in lines.items():
            written.append(folder / f"{name}{mark}.jsonl")
            text = (json.dumps(value).encode() + b"\n" for value in values)
            files[name] = write_file(written[-1], text)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "generation": generation,
            **header,
            "files": files,
        }
        new = folder / f"{MANIFEST}.new"
        written.append(new)
        write_file(new, [json.dumps(manifest, indent=1).encode()])
        sync_folder(folder)
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        raise
    # From here on the new files are the index: nothing may remove them.
    os.replace(new, folder / MANIFEST)
    sync_folder(folder)


def _shape_text(shape):
    return repr(shape).replace(" ", "").strip("()").encode()


def _check_entry(folder, name, entry):
    """Refuses entries that name other folders, other types or other sizes."""
    manifest = folder / MANIFEST
    if not (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
        and _NAME.fullmatch(name)
    ):
        raise IndexCorruptError(f"{manifest} has no usable entry for {name!r}")
    if not _NAME.fullmatch(entry["file"]) or entry["file"] == MANIFEST:
        raise IndexCorruptError(
            f"{manifest} names the file {entry['file']!r}, which is not a plain name"
        )
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
    path = folder / entry["file"]
    if not path.is_file():
        raise IndexCorruptError(f"{path} is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise IndexCorruptError(
            f"{path} has {size} bytes, {MANIFEST} says {entry['bytes']}: "
            "truncated or altered"
        )
