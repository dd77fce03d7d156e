"""A corpus encoded shard by shard: documents -> embeddings, leaves, codes, on disk.

Shard k of K holds the documents k N // K up to (k + 1) N // K. It is one folder such as
`shard-00003-of-00016`, which is made under another name and renamed when it is whole:

    embeddings.npy    (n, D) float16
    leaves.npy        (n, s) uint32, best first, of these rounded embeddings
    codes.npy         (n, s, M') uint8 as an index stores them; only with PQ leaves
    shard.json        identity of parameters and corpus; shape and sha256 of each file

A shard is a function of its documents and the parameters, so any worker may make it,
more than once and at any time. Machines that round alike make the same bytes.

A worker encodes R = 4096 documents at once. Beside the model and what the corpus itself
keeps in memory (its ids), it needs at most this many bytes:

    n (2 D + s (4 + M'))      the arrays of the shard
    + R (text + 8 L + 16 D)   texts, their tokens and embeddings
    + 2^28                    scores of routing, distances to codewords
    + activations of a batch: see `ehi.encode.encode`
"""

import contextlib
import errno
import functools
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ehi.files import atomic_write, file_sha256, sync_folder
from ehi.index.check import IndexLockedError
from ehi.index.folder import (
    Stream,
    write_array,
    write_file,
    writer_lock,
)
from ehi.index.stream import Shard
from ehi.progress import Progress, track

LOG = logging.getLogger("ehi")

ROWS = 4096  # documents encoded at once
_MANIFEST = "shard.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, eq=False)
class EncodingJob:
    """The corpus to encode, the encoder, and the folder for the shards.

    Attributes:
      folder: where the shards are written. It is made absolute, `~` is the home folder.
      num_shards: K, at most the number of documents.
      documents: sequence of objects with `content`; it is read in slices.
      ids: of the documents.
      encode: texts -> {name: array with a row for each text}; a `DocumentEncoder`.
      identity: plain JSON that identifies parameters and documents.
    """

    folder: Path
    num_shards: int
    documents: Sequence
    ids: Sequence
    encode: Callable
    identity: dict

    def __post_init__(self):
        # `Path.expanduser` raises for a user that is not known, a shell does not.
        folder = Path(os.path.expanduser(self.folder)).resolve()
        object.__setattr__(self, "folder", folder)
        if len(self.ids) != len(self.documents):
            raise ValueError(
                f"{len(self.ids)} ids for {len(self.documents)} documents: there must "
                "be one for each"
            )
        if not len(self.documents):
            raise ValueError("the corpus has no documents: there is nothing to encode")
        if not 1 <= self.num_shards <= len(self.documents):
            raise ValueError(
                f"shards={self.num_shards}: allowed are 1 to {len(self.documents)}, "
                "the number of documents"
            )

    @property
    def marks(self) -> dict:
        """Entries in each shard's manifest that identify this job."""
        sizes = {"num_shards": self.num_shards, "num_documents": len(self.documents)}
        return self.identity | sizes

    def rows(self, number: int) -> range:
        """The documents of a shard."""
        start, stop = (
            len(self.ids) * k // self.num_shards for k in (number, number + 1)
        )
        return range(start, stop)

    def path(self, number: int) -> Path:
        """The folder of a shard."""
        return self.folder / f"shard-{number:05d}-of-{self.num_shards:05d}"

    def failure(self, number: int) -> Path:
        """The file with the error of a failed shard and the ids of its documents."""
        return self.path(number).with_suffix(".failed.txt")


def encode_shard(job: EncodingJob, number: int) -> None:
    """Encode a shard and write it, unless it is there and whole."""
    rows, path = job.rows(number), job.path(number)
    if path.exists() and _is_whole(path):
        return
    parts = []
    for start in range(rows.start, rows.stop, ROWS):
        block = job.documents[start : min(start + ROWS, rows.stop)]
        parts.append(job.encode([document.content for document in block]))
        for name, made in parts[-1].items():
            if len(made) != len(block):
                raise ValueError(f"{len(made)} {name} for {len(block)} documents")
    job.folder.mkdir(parents=True, exist_ok=True)
    # Not `tempfile.mkdtemp`, whose folders are private whatever the umask says.
    scratch = job.folder / f".{path.name}.{secrets.token_hex(8)}"
    scratch.mkdir()
    try:
        with writer_lock(scratch):  # tells `unfinished_shards` that it is in use
            _write(scratch, parts, {"shard": number, "identity": job.marks})
            if path.exists() and not _is_whole(path):
                shutil.rmtree(path)
            try:
                os.replace(scratch, path)
            except OSError:
                # Another worker, which was taken for dead, has made the same files.
                if not path.exists():
                    raise
        sync_folder(job.folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def attempt_shard(job: EncodingJob, number: int, retries: int = 2) -> str | None:
    """Encode a shard, and try again if it fails. Return the last error, or None.

    Raises:
      OSError: the disk is full, which another attempt would not change.
    """
    for attempt in range(1, retries + 2):
        try:
            encode_shard(job, number)
        except Exception as error:
            if getattr(error, "errno", None) in _FULL:
                message = f"{os.strerror(error.errno)}; finished shards are kept"
                raise OSError(error.errno, message, str(job.folder)) from error
            # In one line: the ids of the documents follow in the file.
            failed = f"{type(error).__name__}: {' '.join(str(error).split())}"
            LOG.warning("shard %d, attempt %d: %s", number, attempt, failed)
        else:
            job.failure(number).unlink(missing_ok=True)
            return None
    write_failure(job, number, failed)
    return failed


def write_failure(job: EncodingJob, number: int, error: str) -> None:
    """Write the error of a shard and the ids of its documents, one a line."""
    rows = job.rows(number)
    names = "\n".join(map(str, job.ids[rows.start : rows.stop]))
    text = f"{error}\n\n{names}\n".encode(errors="backslashreplace")
    atomic_write(job.failure(number), text)


def encode_shards(job: EncodingJob, numbers: Sequence[int], retries: int = 2) -> dict:
    """The local engine: one shard after the other.

    Returns:
      number of each shard that failed -> its error.

    Raises:
      OSError: the folder cannot be written to, or the disk is full.
    """
    if numbers:
        check_folder(job)
    failed, finished = {}, 0
    total = sum(len(job.rows(number)) for number in numbers)
    with Progress("shards", total, "documents") as progress:

        def encode(texts):
            made = job.encode(texts)
            progress.update(len(texts))
            return made

        counting = replace(job, encode=encode)
        for number in numbers:
            if (error := attempt_shard(counting, number, retries)) is not None:
                failed[number] = error
            # Attempts that failed were counted, and shards that were there were not.
            finished += len(job.rows(number))
            progress.update(finished - progress.done)
    return failed


def check_folder(job: EncodingJob) -> None:
    """Make the folder of the shards, and a file in it that goes at once.

    Raises:
      OSError: that fails, so that no document has to be encoded to notice it.
    """
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=job.folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno)
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "it, or a folder it is in, is a file"
        message = f"no shards can be written to this folder: {reason}"
        raise OSError(error.errno, message, str(job.folder)) from None


def unfinished_shards(job: EncodingJob) -> list[int]:
    """Numbers of the shards that are not encoded yet; removes what killed workers left.

    Raises:
      ValueError: the folder holds shards of other parameters or documents.
    """
    for scratch in job.folder.glob(".shard-*"):
        living = contextlib.suppress(IndexLockedError, OSError)
        with living, writer_lock(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
    finished = {n for n, path in _found(job).items() if _is_whole(path)}
    return [number for number in range(job.num_shards) if number not in finished]


def index_shards(
    job: EncodingJob,
    shown: Callable[[range], Iterable] | None = None,
    metadata: Callable[[range], Iterable] | None = None,
) -> list[Shard]:
    """The finished shards in the form that `build_folder` takes.

    Only embeddings are passed on: `build_folder` routes and codes them again.

    Args:
      job: all of its shards must be finished.
      shown: rows -> a JSON value to show for each of these documents; or None.
      metadata: rows -> a dict to filter by for each of these documents; or None.

    Raises:
      ValueError: a shard is missing, altered, or of another job.
    """
    found, shards = _found(job), []
    for number in track(range(job.num_shards), "check shards", "shards"):
        if number not in found:
            raise ValueError(f"{job.path(number)} is missing: encode it first")
        _check_sums(found[number])
        rows = job.rows(number)
        shards.append(
            Shard(
                found[number] / "embeddings.npy",
                job.ids[rows.start : rows.stop],
                number,
                None if shown is None else functools.partial(shown, rows),
                None if metadata is None else functools.partial(metadata, rows),
            )
        )
    return shards


def _write(folder: Path, parts: list[dict], header: dict) -> None:
    """Write the arrays of a shard, block after block, then its manifest."""
    files = {}
    for name, first in parts[0].items():
        blocks = [part[name] for part in parts]
        shape = (sum(map(len, blocks)), *first.shape[1:])
        stream = Stream(first.dtype.name, shape, blocks)
        files[name] = write_array(folder / f"{name}.npy", stream)
    text = json.dumps(header | {"files": files}, indent=1)
    write_file(folder / _MANIFEST, [text.encode()])
    sync_folder(folder)


def _found(job: EncodingJob) -> dict[int, Path]:
    """Number -> folder of the shards that are there; refuses those of another job."""
    found, marks = {}, job.marks
    for path in sorted(job.folder.glob("shard-*/")):
        header = _header(path)
        theirs = header["identity"]
        names = sorted(theirs.keys() | marks.keys())
        other = [name for name in names if theirs.get(name) != marks.get(name)]
        if other:
            raise ValueError(
                f"{path} is of another job (other {', '.join(other)}): choose another "
                "folder, or remove it (nothing was changed)"
            )
        place = job.path(header["shard"])
        if path != place:
            raise ValueError(
                f"{path} is the shard of {place}: keep one of them, under this name"
            )
        found[header["shard"]] = path
    return found


def _header(path: Path) -> dict:
    try:
        header = json.loads((path / _MANIFEST).read_bytes())
        kinds = {"identity": dict, "shard": int, "files": dict}
        if all(isinstance(header[name], kind) for name, kind in kinds.items()):
            return header
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is not a shard, {_MANIFEST} cannot be read: remove it")


def _is_whole(path: Path) -> bool:
    """Whether all files of a shard are there with the right sizes."""
    files = _header(path)["files"].values()
    sizes = [(path / entry["file"], entry["bytes"]) for entry in files]
    return all(file.is_file() and file.stat().st_size == size for file, size in sizes)


def _check_sums(path: Path) -> None:
    for entry in _header(path)["files"].values():
        file = path / entry["file"]
        found = file_sha256(file) if file.is_file() else None
        if found != entry["sha256"]:
            what = "is missing" if found is None else "was altered"
            raise ValueError(f"{file} {what}: remove {path} and encode it again")
