"""Writing an index folder: a crash at any moment leaves the old or the new one.

New files get names that no manifest mentions yet, and are flushed. Then the manifest
that names them is renamed over the old one. Only then are old files removed.
"""

import contextlib
import json
import os
import stat
from pathlib import Path

import numpy as np

from ehi.files import new_folder, sync_folder
from ehi.index.check import IndexCorruptError
from ehi.index.folder import (
    FORMAT,
    MANIFEST,
    PLAIN,
    VERSION,
    read_folder,
    write_array,
    write_file,
    writer_lock,
)


def write_folder(path, header, arrays, texts, replaces=None):
    """Writes a whole index, into a new folder or over an old index.

    Args:
        path: the folder, made if needed. An empty one keeps its permissions.
        header: JSON entries of the manifest.
        arrays: name -> array or Stream.
        texts: name -> iterable of bytes.
        replaces: the Folder at `path` that the arrays were made from, or None.

    Raises:
        ValueError: the folder has changed since `replaces` was read.
        FileExistsError: `path` is there and is not an index of this version.
        IndexLockedError: somebody else is writing to it.
        OSError: it cannot be written; what was there is unchanged.
    """
    path = Path(path).resolve()  # a link to an empty folder stays a link
    if is_free(path):
        if path == Path.cwd():  # the process would stay in the folder that is replaced
            raise FileExistsError(f"{path} is the current folder: name one in it")
        mode = path.stat().st_mode if path.exists() else None
        with new_folder(path) as building:
            if mode is not None:  # who may read an empty folder may read the index
                building.chmod(stat.S_IMODE(mode) | stat.S_IRWXU)
            outcome = f"{path} was not written"
            _write(building, 1, header, arrays, texts, {}, [], outcome)
        return
    check_replaceable(path)
    with writer_lock(path):
        old = read_folder(path)
        if replaces is not None and old.manifest != replaces.manifest:
            raise ValueError(
                f"{path} was written to since this index was opened: refresh() it, "
                "or what others did would be undone"
            )
        replace_files(old, header, arrays, texts)


def is_free(path):
    """Whether a path does not exist or is an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def check_replaceable(path):
    """Refuses a path that holds anything but an index.

    Raises:
        FileExistsError: as of `write_folder`.
    """
    if is_free(path):
        return
    try:
        read_folder(path)
    except (FileNotFoundError, IndexCorruptError) as error:
        raise FileExistsError(
            f"{path} exists and is not an index that can be replaced: {error}"
        ) from None


def replace_files(old, header, arrays, texts, keep=()):
    """Writes the next generation of a folder; the caller holds the writer's lock.

    Args:
        old: the Folder as it is now.
        header, arrays, texts: as of `write_folder`.
        keep: names of files that stay as they are.

    Raises:
        OSError: it cannot be written; the index is unchanged.
    """
    kept = {name: old.files[name] for name in keep}
    gone = [entry["file"] for name, entry in old.files.items() if name not in kept]
    # An earlier writer may have been stopped before it removed its old files.
    used = {entry["file"] for entry in old.files.values()}
    left = [file for file in old.manifest.get("obsolete", []) if file not in used]
    _remove(old.path, left)
    generation = old.manifest["generation"] + 1
    strays = _strays(old.path, generation)
    _remove(old.path, [file for file in strays if file not in used])
    outcome = f"{old.path} is as it was"
    _write(old.path, generation, header, arrays, texts, kept, gone, outcome)
    _remove(old.path, gone)


def _write(folder, generation, header, arrays, texts, kept, gone, outcome):
    """Writes files and the manifest; an error message ends with `outcome`."""
    files, written = dict(kept), []
    new = folder / f"{MANIFEST}.new"

    def place(name, suffix):
        file = _file_name(name, generation, suffix)
        path = folder / file
        if path.parent != folder and not path.parent.exists():
            path.parent.mkdir()
        if path.exists():  # a reader may have mapped it: it must not be written to
            raise IndexCorruptError(
                f"{path} is in use already, so generation {generation - 1} is not the "
                f"newest, as {MANIFEST} says"
            )
        written.append(path)
        return file, path

    try:
        for name, array in arrays.items():
            file, path = place(name, ".npy")
            if isinstance(array, np.ndarray):
                array = np.asarray(array, order="C")
            files[name] = {**write_array(path, array), "file": file}
        for name, parts in texts.items():
            file, path = place(name, ".jsonl")
            files[name] = {**write_file(path, parts), "file": file}
        manifest = {
            "format": FORMAT,
            "version": VERSION if "metadata" in header else PLAIN,
            "generation": generation,
            **header,
            "obsolete": gone,
            "files": files,
        }
        written.append(new)
        write_file(new, [json.dumps(manifest, indent=1).encode()])
        for parent in {path.parent for path in written}:
            sync_folder(parent)
    except BaseException as error:
        _remove(folder, [file.relative_to(folder) for file in written])
        if isinstance(error, OSError):
            message = f"{error.strerror or error}; {outcome}"
            raise OSError(error.errno, message) from error
        raise
    # From here on the new files are the index and must stay.
    os.replace(new, folder / MANIFEST)
    sync_folder(folder)


def _file_name(name, generation, suffix):
    """The file of an array. No two generations share a name."""
    if name.startswith("segments."):  # the name contains the generation
        return f"segments/{name.removeprefix('segments.')}{suffix}"
    mark = "" if generation == 1 else f".g{generation}"
    return f"{name}{mark}{suffix}"


def _strays(folder, generation):
    """Files of a generation that a killed writer has left behind."""
    patterns = (f"*.g{generation}.npy", f"*.g{generation}.jsonl")
    patterns += (f"segments/{generation}.*.npy", f"segments/{generation}.*.jsonl")
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return [path.relative_to(folder).as_posix() for path in found]


def _remove(folder, files):
    for file in files:
        (folder / file).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or missing
        (folder / "segments").rmdir()
