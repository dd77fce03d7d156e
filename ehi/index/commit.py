"""Writing an index folder: a crash at any moment leaves the old or the new one.

New files get names that no manifest mentions yet, and are flushed. Then the manifest
that names them is renamed over the old one. Only then are old files removed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.files import cache_folder, file_sha256, new_folder, sync_folder
from ehi.index.check import IndexCorruptError
from ehi.index.folder import (
    FORMAT,
    MANIFEST,
    PLAIN,
    TOWER,
    TOWER_FILE,
    TOWER_FOLDER,
    VERSION,
    manifest_text,
    read_folder,
    write_array,
    write_file,
    writer_lock,
)

# Files of a tower that it may need to read texts, beside those of its modules.
_TOWER_SUFFIXES = (".json", ".txt", ".safetensors")
# A tower in an index folder, or one that `new_folder` has not finished.
_ANY_TOWER = re.compile(rf"{TOWER_FOLDER.pattern}|\.{TOWER_FOLDER.pattern}\.[0-9a-f]+")


@dataclass(frozen=True)
class TowerFiles:
    """The files of a text tower, to be carried by an index.

    Attributes:
        folder: where they are.
        link: whether an index on the same disk may share them by hard links. Nobody may
            then write to them: as in the cache, or in another index.
    """

    folder: Path
    link: bool = False

    @classmethod
    def at(cls, folder):
        """Those in a folder, shared if it is in the cache (`EHI_CACHE`)."""
        folder = Path(folder).resolve()
        return cls(folder, link=cache_folder().resolve() in folder.parents)

    def names(self):
        """What search needs of the folder, relative to it: no other weights, no code.

        They are the files with settings, tokens and tensors, and those in the folders
        that modules.json names.
        """
        modules = []
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            listed = json.loads((self.folder / "modules.json").read_bytes())
            modules = [str(module.get("path")) for module in listed]
        found = []
        for path in self.folder.iterdir():
            if path.name in modules and path.is_dir():
                found += path.iterdir()
            found.append(path)
        names = [
            path.relative_to(self.folder).as_posix()
            for path in sorted(found)
            if path.is_file()
            and (path.suffix in _TOWER_SUFFIXES or path.name.startswith("LICENSE"))
        ]
        return [name for name in names if TOWER_FILE.fullmatch(name)]


def write_folder(path, header, arrays, texts, replaces=None, tower=None):
    """Writes a whole index, into a new folder or over an old index.

    Args:
        path: the folder, made if needed. An empty one keeps its permissions.
        header: JSON entries of the manifest.
        arrays: name -> array or Stream.
        texts: name -> iterable of bytes.
        replaces: the Folder at `path` that the arrays were made from, or None.
        tower: TowerFiles that the index carries, or None.

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
            _write(building, 1, header, arrays, texts, {}, [], outcome, tower)
        return
    check_replaceable(path)
    with writer_lock(path):
        old = read_folder(path)
        if replaces is not None and old.manifest != replaces.manifest:
            raise ValueError(
                f"{path} was written to since this index was opened: refresh() it, "
                "or what others did would be undone"
            )
        replace_files(old, header, arrays, texts, tower=tower)


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


def replace_files(old, header, arrays, texts, keep=(), tower=None):
    """Writes the next generation of a folder; the caller holds the writer's lock.

    Args:
        old: the Folder as it is now.
        header, arrays, texts, tower: as of `write_folder`. A header that has the entry
            of the old tower keeps it.
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
    _write(old.path, generation, header, arrays, texts, kept, gone, outcome, tower)
    _remove(old.path, gone)
    _remove_towers(old.path, read_folder(old.path).tower)


def _write(folder, generation, header, arrays, texts, kept, gone, outcome, tower):
    """Writes files and the manifest; an error message ends with `outcome`."""
    files, written, there = dict(kept), [], set(folder.iterdir())
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
        if tower is not None:
            header = {**header, TOWER: _place_tower(folder, tower)}
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
            "version": VERSION if {"metadata", TOWER} & header.keys() else PLAIN,
            "generation": generation,
            **header,
            "obsolete": gone,
            "files": files,
        }
        written.append(new)
        write_file(new, [manifest_text(manifest)])
        for parent in {path.parent for path in written}:
            sync_folder(parent)
    except BaseException as error:
        _remove(folder, [file.relative_to(folder) for file in written])
        for path in set(folder.iterdir()) - there:
            if TOWER_FOLDER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            message = f"{error.strerror or error}; {outcome}"
            raise OSError(error.errno, message) from error
        raise
    # From here on the new files are the index and must stay.
    os.replace(new, folder / MANIFEST)
    sync_folder(folder)


def _place_tower(folder, tower):
    """Puts a tower into an index folder, whole or not at all; returns its entry."""
    files = {}
    for name in tower.names():
        path = tower.folder / name
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    described = json.dumps(files, sort_keys=True).encode()
    inside = folder / f"tower-{hashlib.sha256(described).hexdigest()[:8]}"
    with new_folder(inside, exists="keep") as made:
        for name in files:
            source, target = (tower.folder / name).resolve(), made / name
            target.parent.mkdir(exist_ok=True)
            if tower.link:
                # Another disk, or another owner: a copy does as well.
                with contextlib.suppress(OSError):
                    os.link(source, target)
            if not target.exists():
                shutil.copyfile(source, target)
    return {"folder": inside.name, "files": files}


def _remove_towers(folder, kept):
    """Removes towers but one, and what a killed writer has left of them."""
    for path in folder.iterdir():
        ours = _ANY_TOWER.fullmatch(path.name) and not path.is_symlink()
        if ours and path != kept:
            shutil.rmtree(path, ignore_errors=True)


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
