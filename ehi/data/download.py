"""Find a data set: at a path, in the folders of EHI_DATA, or at a public address."""

import hashlib
import importlib.resources
import os
import urllib.request
import zipfile
from pathlib import Path

from tensorflow_datasets.core.download import checksums

from ehi.files import new_file
from ehi.progress import Progress

CORPUS = "corpus.jsonl"
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
        }
    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        names = [Path(name) for name in archive.namelist() if Path(name).name == CORPUS]
        found = {
            name.parent.as_posix(): zipfile.Path(archive, name.as_posix()).parent
            for name in names
        }
    else:
        raise ValueError(f"{path} is neither a folder nor a zip file")
    if "." in found and not part:
        return found["."]
    if part:
        found = {name: root for name, root in found.items() if Path(name).name == part}
    if len(found) != 1:
        choices = f": {', '.join(sorted(found))}" if found else ""
        raise ValueError(
            f"expected one {CORPUS} in {path / part if part else path}, "
            f"found {len(found)}{choices}"
        )
    return next(iter(found.values()))


def search_folders(name: str) -> Path | None:
    """Find the folder or zip called `name` in the folders of EHI_DATA, or None."""
    for folder in os.environ.get("EHI_DATA", "").split(os.pathsep):
        if folder:
            for path in (Path(folder) / name, Path(folder) / f"{name}.zip"):
                if path.exists():
                    return path
    return None


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
