"""Find a data set: at a path, in the folders of EHI_DATA, or at a public address."""

import hashlib
import importlib.resources
import os
import posixpath
import re
import stat
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensorflow_datasets.core.download import checksums

from ehi.files import new_file
from ehi.progress import Progress

CORPUS = "corpus.jsonl"
READ = (".jsonl", ".tsv", ".dat", ".csv")  # endings of the files that are read
TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 20


def find_root(path: Path, part: str = ""):
    """Find the folder of corpus.jsonl in `path`: a `pathlib.Path` or `zipfile.Path`.

    A zip is read in place and never unpacked, so its entries cannot write anywhere.

    Args:
        path: a BEIR folder, or a zip with corpus.jsonl at its top or in one folder.
        part: folder in a collection of data sets, such as 'android' of cqadupstack.

    Raises:
        ValueError: `path` is no folder or zip, or holds no or several corpus.jsonl.
    """
    if path.is_dir():
        found = {
            file.parent.relative_to(path).as_posix(): file.parent
            for file in [*path.glob(CORPUS), *path.glob(f"*/{CORPUS}")]
            if file.exists()  # from Python 3.13 on, glob lists broken links too
        }
    elif zipfile.is_zipfile(path):
        archive = open_zip(path)
        names = [Path(name) for name in archive.namelist() if Path(name).name == CORPUS]
        found = {
            name.parent.as_posix(): zipfile.Path(archive, name.as_posix()).parent
            for name in names
        }
    else:
        tar = path.is_file() and tarfile.is_tarfile(path)
        advice = "; unpack the tar archive first" if tar else ""
        raise ValueError(f"{path} is neither a folder nor a zip file{advice}")
    found = {name: root for name, root in found.items() if not _is_hidden(name)}
    if "." in found and not part:
        return found["."]
    if part:
        found = {name: root for name, root in found.items() if Path(name).name == part}
    if len(found) != 1:
        choices = f": {', '.join(sorted(found))}" if found else ""
        if not found and path.is_dir() and (path / f"{CORPUS}.gz").exists():
            choices = f"; unpack {CORPUS}.gz first"
        raise ValueError(
            f"expected one {CORPUS} in {path / part if part else path}, "
            f"found {len(found)}{choices}"
        )
    return next(iter(found.values()))


def _is_hidden(name: str) -> bool:
    """Whether a folder is one that macOS, editors or notebooks keep for themselves."""
    parts = name.split("/")
    return any(p.startswith(".") and p != "." or p == "__MACOSX" for p in parts)


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip, and write the names of its entries as other programs read them.

    Windows programs may write `qrels\\test.tsv`, others `./qrels/test.tsv`.

    Raises:
        ValueError: a name leads out of the zip, or a file to read is encrypted or a
            link.
    """
    archive = zipfile.ZipFile(path)
    for entry in archive.infolist():
        name = entry.filename.replace("\\", "/")
        if re.match("/|[A-Za-z]:", name) or ".." in name.split("/"):
            raise ValueError(f"{path}: the name {entry.filename!r} leads out of it")
        if name.endswith(READ):
            if entry.flag_bits & 1:
                raise ValueError(f"{path}: {name!r} is encrypted; unpack the zip first")
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise ValueError(f"{path}: {name!r} is a link; unpack the zip first")
        slash = "/" if name.endswith("/") else ""
        # Reading an entry goes by `orig_filename`, which stays.
        entry.filename = posixpath.normpath(name) + slash
    archive.NameToInfo = {entry.filename: entry for entry in archive.filelist}
    return archive


@contextmanager
def explained_zip(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged or unusual zip into a ValueError that names it."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def search_folders(name: str) -> Path | None:
    """Find the folder or zip called `name` in the folders of EHI_DATA, or None."""
    for folder in os.environ.get("EHI_DATA", "").split(os.pathsep):
        if folder:
            top = expanded(folder, "EHI_DATA")
            for path in (top / name, top / f"{name}.zip"):
                if path.exists():
                    return path
    return None


def expanded(path: str, what: str) -> Path:
    """Absolute path, with the home folder for `~`.

    Raises:
        ValueError: the home folder is unknown; the message names `what`.
    """
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{what}: {path!r} has no home folder ({error})") from None


def public_sets() -> dict[str, tuple[str, str]]:
    """Public sets: name -> (address, sha256 of the zip), from the list of tfds."""
    package = importlib.resources.files("tensorflow_datasets")
    listed = checksums.load_url_infos(package / "datasets" / "beir" / "checksums.tsv")
    return {
        url.rsplit("/", 1)[-1].removesuffix(".zip"): (url, info.checksum)
        for url, info in listed.items()
    }


def download(url: str, sha256: str, path: Path) -> Path:
    """Download `url` to `path`, unless that file exists.

    Raises:
        ConnectionError: the address cannot be read.
        ValueError: the content does not have this `sha256`; no file is kept.
    """
    if path.exists():
        return path
    digest = hashlib.sha256()
    with new_file(path) as beside:
        with beside.open("wb") as file:
            _copy(url, file, digest)
        if digest.hexdigest() != sha256:
            raise ValueError(
                f"{url} has sha256 {digest.hexdigest()}, expected {sha256}"
            )
    return path


def _copy(url: str, file, digest) -> None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            size = int(response.headers.get("Content-Length") or 0) or None
            with Progress(f"download {url}", size, "bytes") as progress:
                while chunk := response.read(CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
                    progress.update(len(chunk))
    except OSError as error:
        raise ConnectionError(f"cannot download {url}: {error}") from error
