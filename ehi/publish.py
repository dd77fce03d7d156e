"""Index folders to and from the Hugging Face hub, or any address that fsspec knows.

    ehi.push("runs/pydocs/index", "hf://me/pydocs", licence="apache-2.0")
    ehi.pull("hf://me/pydocs", "pydocs")

    python -m ehi.publish push runs/pydocs/index hf://me/pydocs --licence=apache-2.0
    python -m ehi.publish pull hf://me/pydocs pydocs

What is pushed is the folder as one manifest describes it: no temporary file, and none
that a writer has dropped. What is pulled is checked before it gets its name. JAX is not
needed.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from ehi.files import new_file, new_folder
from ehi.index import IndexCorruptError, open_index
from ehi.index.commit import is_free
from ehi.index.folder import (
    MANIFEST,
    TOWER,
    TOWER_FILE,
    TOWER_FOLDER,
    check_file_name,
    open_folder,
)
from ehi.model_card import model_card

CARD = "README.md"
HUB = "hf"
# Named in messages; fsspec knows more.
SCHEMES = ("hf", "file", "memory", "s3", "gs", "az", "sftp", "https")
_HUB_ADDRESS = re.compile(
    r"hf://(?P<kind>models/|datasets/)?"
    r"(?P<name>[\w.\-]+/[\w.\-]+?)(@(?P<revision>[\w.\-/]+))?/?"
)
_ATTEMPTS = 3  # a pull starts again if the address was written to meanwhile
_NEEDS = "needs {0}: python -m pip install 'ehi[hub]'"


def push(
    path: str | Path,
    address: str,
    *,
    licence: str | None = None,
    description: str = "",
    private: bool = False,
) -> None:
    """Write an index folder to an address, with a model card made from its manifest.

    An index that is there already is replaced: on the hub by a commit, elsewhere so
    that a reader finds the old or the new one. Others may write to the folder
    meanwhile. Documents that were deleted go along until `Index.compact`.

    Args:
      path: the index folder.
      address: 'hf://owner/name' or 'hf://datasets/owner/name', which is made if needed;
        or an address of fsspec, such as 's3://bucket/name' or 'file:///shared/name'.
      licence: of what is published, such as 'apache-2.0'; it is yours to choose.
      description: markdown that the card begins with.
      private: whether a repository that is made is private.

    Raises:
      FileNotFoundError: `path` holds no index.
      IndexCorruptError: a file of it was altered.
      ValueError: not an address.
      FileExistsError: the address holds something else than an index.
      PermissionError, ConnectionError: the address cannot be written to.

    >>> import tempfile, numpy as np, ehi
    >>> from ehi.index import build_index, open_index, save_index
    >>> path = tempfile.mkdtemp()
    >>> save_index(build_index(np.eye(3), [7, 8, 9], tree=None), f"{path}/index")
    >>> ehi.push(f"{path}/index", "memory://three", licence="mit")
    >>> index = open_index(ehi.pull("memory://three", f"{path}/pulled"))
    >>> index.search(np.eye(3)[:1], k=1).ids.tolist()
    [[7]]
    """
    place = _place(address)
    path = Path(path).absolute()
    # Beside the index, files are linked instead of copied.
    beside = path.parent if os.access(path.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".push-", dir=beside) as scratch:
        folder = Path(scratch) / "index"
        with _shown_as(folder, path):
            open_folder(path, lambda found: _copy(found, folder))
            index = open_index(folder, verify=True)
        card = model_card(index, address, licence=licence, description=description)
        (folder / CARD).write_text(card, encoding="utf-8")
        place.write(folder, private)


def pull(address: str, path: str | Path) -> Path:
    """Fetch an index from an address and check every sha256 sum of it.

    An error or a crash leaves nothing under `path`. Only files that the manifest names
    are fetched.

    Args:
      address: as of `push`; 'hf://owner/name@revision' names a commit, tag or branch.
      path: the folder to make.

    Returns:
      `path`.

    Raises:
      FileExistsError: `path` is there and is not an empty folder.
      FileNotFoundError: no index at the address.
      IndexCorruptError: a file is missing or altered; the message names it.
      ValueError: not an address.
      PermissionError, ConnectionError: the address cannot be read.
    """
    place, path = _place(address), Path(path)
    if not is_free(path):
        raise FileExistsError(f"{path} is there already: name a folder that is not")
    with new_folder(path) as beside:
        for attempt in range(_ATTEMPTS):
            text = place.manifest()
            try:
                with _shown_as(beside, address):
                    _fetch(place, text, beside)
                break
            except (IndexCorruptError, FileNotFoundError):
                if attempt == _ATTEMPTS - 1 or place.manifest() == text:
                    raise
                for file in beside.iterdir():
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
    return path


def _fetch(place, text, folder):
    """Fill a folder with what a manifest names, and check it."""
    (folder / MANIFEST).write_bytes(text)
    place.fetch(list(_files_of(text, folder / MANIFEST)), folder)
    open_index(folder, verify=True).check_addresses()


def _files_of(text, file):
    """Name -> sha256 of the files of a manifest, none of which leads out of a folder.

    Those of a text tower have the name of its folder in front.
    """
    try:
        manifest = json.loads(text)
        found = {e["file"]: e["sha256"] for e in manifest["files"].values()}
        tower = manifest.get(TOWER) or {"folder": None, "files": {}}
        folder, inside = tower["folder"], tower["files"]
        carried = {f"{folder}/{n}": e["sha256"] for n, e in inside.items()}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise IndexCorruptError(f"{file} does not describe an index") from None
    for name in found:
        check_file_name(file, name)
    for name in inside:
        if not TOWER_FOLDER.fullmatch(str(folder)) or not TOWER_FILE.fullmatch(name):
            raise IndexCorruptError(
                f"{file} names the file {folder}/{name!r}, which is not a plain name"
            )
    return found | carried


def _copy(found, folder):
    """The files of a `Folder` and its manifest, in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt before
    folder.mkdir()
    _write_manifest(folder, found.manifest)
    for name in _files_of((folder / MANIFEST).read_bytes(), found.path / MANIFEST):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = (found.path / name).resolve()
        try:  # no writer changes a file under its name, so a link is a copy
            os.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, target)


def _write_manifest(folder, manifest):
    (folder / MANIFEST).write_bytes(json.dumps(manifest, indent=1).encode())


@contextlib.contextmanager
def _shown_as(folder, shown):
    """Errors of the index name the place that the user knows, not the temporary one."""
    try:
        yield
    except IndexCorruptError as error:
        text = str(error).replace(str(Path(folder).absolute()), str(shown).rstrip("/"))
        raise IndexCorruptError(text) from None


def _place(address):
    """The `_Hub` or `_Store` of an address.

    Raises:
      ValueError: no scheme that is known.
      ImportError: a package is missing.
    """
    scheme, separator, rest = str(address).partition("://")
    if separator and scheme == HUB:
        return _Hub(str(address))
    try:
        import fsspec
    except ImportError:
        raise ImportError(f"{address} " + _NEEDS.format("fsspec")) from None
    if not separator or not rest or scheme not in fsspec.available_protocols():
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(
            f"{str(address)!r} is no address: it begins with one of {known} or with "
            "another scheme of fsspec, and a path follows"
        )
    return _Store(str(address))


class _Store:
    """An address of fsspec. No file there changes under its name while it is read."""

    def __init__(self, address):
        import fsspec

        self.address = address
        try:
            self.files, self.root = fsspec.url_to_fs(address)
        except ImportError as error:  # fsspec says which package it is
            raise ImportError(f"{address} cannot be opened: {error}") from None
        protocol = self.files.protocol
        self.local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def _path(self, name):
        return f"{self.root.rstrip('/')}/{name}"

    def manifest(self):
        with self._explained():
            try:
                return self.files.cat_file(self._path(MANIFEST))
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{self.address} holds no index: it has no {MANIFEST}"
                ) from None

    def fetch(self, names, folder):
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._explained():
                try:
                    self.files.get_file(self._path(name), str(target))
                except FileNotFoundError:
                    raise IndexCorruptError(f"{target} is missing") from None

    def write(self, folder, private):
        """Data first, then the manifest; what the old one alone names goes last."""
        del private  # the store's own settings say who may read
        text = (folder / MANIFEST).read_bytes()
        manifest, names = json.loads(text), {name: name for name in _files_of(text, "")}
        with self._explained():
            old = _files_there(self, self._names)
            for entry in manifest["files"].values():
                name, sha256 = entry["file"], entry["sha256"]
                if old.get(name, sha256) != sha256:
                    names[name] = entry["file"] = _other_name(name, sha256)
            for source, name in names.items():
                self._put(folder / source, name)
            _write_manifest(folder, manifest)
            self._put(folder / CARD, CARD)
            self._put(folder / MANIFEST, MANIFEST)
            for name in old.keys() - set(names.values()):
                with contextlib.suppress(FileNotFoundError):
                    self.files.rm_file(self._path(name))

    def _put(self, source, name):
        target = self._path(name)
        if self.local:  # fsspec would write into the file that a reader has open
            with new_file(target) as beside:
                shutil.copyfile(source, beside)
            return
        self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.files.put_file(str(source), target)

    def _names(self):
        self.files.invalidate_cache()
        return self.files.find(self.root, maxdepth=2)

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except PermissionError as error:
            raise PermissionError(f"{self.address} refuses you: {error}") from None
        except ConnectionError as error:
            raise ConnectionError(f"{self.address} is not reached: {error}") from None
        except (OSError, ValueError):
            raise
        except Exception as error:  # a driver has errors of its own
            raise ConnectionError(f"{self.address} failed: {error!r}") from error


def _files_there(place, names):
    """File name -> sha256 of the index that a place holds; {} if it is empty.

    Raises:
      FileExistsError: it holds something else, which a push would mix with the index.
    """
    try:
        text = place.manifest()
    except FileNotFoundError:
        if names():
            raise FileExistsError(
                f"{place.address} holds files that are no index: name another place"
            ) from None
        return {}
    return _files_of(text, f"{place.address}/{MANIFEST}")


def _other_name(file, sha256):
    """Another name of a file whose name is taken: 'a.npy' -> 'a.1f0c33d2.npy'."""
    stem, _, suffix = file.rpartition(".")
    return f"{stem}.{sha256[:8]}.{suffix}"


class _Hub:
    """A repository of the Hugging Face hub: each push is one commit."""

    def __init__(self, address):
        try:
            import huggingface_hub
        except ImportError:
            text = f"{address} " + _NEEDS.format("huggingface_hub")
            raise ImportError(text) from None
        parts = _HUB_ADDRESS.fullmatch(address)
        if parts is None:
            raise ValueError(
                f"{address!r} is no address of the hub, which is hf://owner/name or "
                "hf://datasets/owner/name, and may end in @revision"
            )
        self.address, self.api = address, huggingface_hub.HfApi()
        self.revision = parts["revision"]
        kind = (parts["kind"] or "models/").removesuffix("s/")
        self.repository = {"repo_id": parts["name"], "repo_type": kind}

    def manifest(self):
        """The newest one. `fetch` reads the same commit."""
        with self._explained(), tempfile.TemporaryDirectory() as scratch:
            info = self.api.repo_info(**self.repository, revision=self.revision)
            self.commit = info.sha
            found = self.api.hf_hub_download(
                **self.repository, filename=MANIFEST, revision=self.commit,
                local_dir=scratch,
            )  # fmt: skip
            return Path(found).read_bytes()

    def fetch(self, names, folder):
        with self._explained():
            self.api.snapshot_download(
                **self.repository, revision=self.commit, local_dir=folder,
                allow_patterns=names,
            )  # fmt: skip
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's own notes

    def write(self, folder, private):
        with self._explained():
            if self.revision is None:
                self.api.create_repo(**self.repository, private=private, exist_ok=True)
            old = _files_there(self, self._names)
            try:
                self.api.upload_folder(
                    **self.repository, folder_path=folder, revision=self.revision,
                    commit_message="An index of ehi", delete_patterns=list(old) or None,
                )  # fmt: skip
            except ValueError as error:  # such as a licence that the hub does not know
                reason = " ".join(str(error).split())
                raise ValueError(f"{self.address} was not written: {reason}") from None

    def _names(self):
        found = self.api.list_repo_files(**self.repository, revision=self.revision)
        return set(found) - {CARD, ".gitattributes"}  # the hub makes them

    @contextlib.contextmanager
    def _explained(self):
        """What the hub answered, in one sentence."""
        from huggingface_hub import errors

        try:
            yield
        except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
            raise self._refused(error) from None
        except errors.RevisionNotFoundError:
            raise FileNotFoundError(f"{self.address}: no such revision") from None
        except errors.LocalEntryNotFoundError as error:
            raise self._unreachable(error) from None
        except errors.EntryNotFoundError:
            raise FileNotFoundError(
                f"{self.address} holds no index: it has no {MANIFEST}"
            ) from None
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                raise self._refused(error) from None
            raise self._unreachable(error) from None
        except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
            raise self._unreachable(error) from None

    def _refused(self, error):
        from huggingface_hub import errors

        absent = isinstance(error, errors.RepositoryNotFoundError)
        if absent and not isinstance(error, errors.GatedRepoError):
            return FileNotFoundError(
                f"the hub shows no repository at {self.address}: the name is another, "
                "or it is private and `hf auth login` gives you access"
            )
        return PermissionError(
            f"the hub refuses you at {self.address}: `hf auth login` with a token that "
            "may do this"
        )

    def _unreachable(self, error):
        said = getattr(error, "server_message", None) or str(error)
        reason = said.strip().partition("\n")[0]
        return ConnectionError(f"the hub failed at {self.address}: {reason}")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m ehi.publish", description="Push and pull index folders."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pushing = commands.add_parser("push", help="write a folder to an address")
    pushing.add_argument("path")
    pushing.add_argument("address", help="hf://owner/name, s3://bucket/name, ...")
    pushing.add_argument("--licence", help="of what is published: apache-2.0, ...")
    pushing.add_argument("--description", default="", help="markdown for the card")
    pushing.add_argument("--private", action="store_true", help="if it is made")
    pulling = commands.add_parser("pull", help="make a folder from an address")
    pulling.add_argument("address")
    pulling.add_argument("path")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = vars(parse_arguments(arguments))
    command = {"push": push, "pull": pull}[options.pop("command")]
    try:
        command(**options)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"{error}") from None


if __name__ == "__main__":
    main()
