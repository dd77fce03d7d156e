"""A corpus encoded shard by shard: documents -> embeddings, leaves, codes, on disk.

Shard k of K holds the documents k N // K up to (k + 1) N // K. It is one folder, made
under another name and renamed when it is whole, `shard-00003-of-00016`:

    embeddings.npy    (n, D) float16
    leaves.npy        (n, s) uint32, best first, of these rounded embeddings
    codes.npy         (n, s, M') uint8 as an index stores them; of PQ leaves only
    shard.json        identity of parameters and corpus; shape and sha256 of each file

It is a function of its documents and the parameters, so any worker may make it, again
and at any time: on machines that round alike the files are the same, byte for byte.

Beside the model and what the corpus itself keeps in memory (its ids), bytes of a worker
are at most, with R = 4096 documents encoded at once,

    n (2 D + s (4 + M'))      the arrays of the shard
    + R (text + 8 L + 16 D)   texts, their tokens and embeddings
    + 2^28                    scores of routing, distances to codewords
    + activations of a batch: see `ehi.encode.encode`
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ehi.index.folder import (
    IndexLockedError,
    Stream,
    sync_folder,
    write_array,
    write_file,
    writer_lock,
)
from ehi.index.stream import Shard

LOG = logging.getLogger("ehi")

ROWS = 4096  # documents encoded at once
_MANIFEST = "shard.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, eq=False)
class EncodingJob:
    """What all shards of one corpus share.

    Attributes:
      folder: where the shards are written.
      num_shards: K, at most the number of documents.
      documents: sequence of objects with `content`, of which slices are read.
      ids: their names.
      encode: texts -> {name: array with a row for each}; a `DocumentEncoder`.
      identity: plain JSON that names parameters and documents; see `EncodingJob.marks`.
    """

    folder: Path
    num_shards: int
    documents: Sequence
    ids: Sequence
    encode: Callable
    identity: dict

    def __post_init__(self):
        if not 1 <= self.num_shards <= len(self.documents):
            raise ValueError(
                f"shards={self.num_shards}: allowed are 1 to {len(self.documents)}, "
                "the number of documents"
            )

    @property
    def marks(self) -> dict:
        """What every shard of this job says of itself; no other is taken for one."""
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
        """The file that says what a shard failed of, and the ids of its documents."""
        return self.path(number).with_suffix(".failed.txt")


def encode_shard(job: EncodingJob, number: int) -> None:
    """Encode a shard and write it; one that is there whole already is left alone."""
    rows, path = job.rows(number), job.path(number)
    if path.exists() and _is_whole(path):
        return
    parts = []
    for start in range(rows.start, rows.stop, ROWS):
        block = job.documents[start : min(start + ROWS, rows.stop)]
        parts.append(job.encode([document.content for document in block]))
    job.folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=job.folder))
    try:
        scratch.chmod(0o755)  # mkdtemp's folders are private
        with writer_lock(scratch):  # it is in use: see `unfinished_shards`
            _write(scratch, parts, {"shard": number, "identity": job.marks})
            if path.exists() and not _is_whole(path):
                shutil.rmtree(path)
            try:
                os.replace(scratch, path)
            except OSError:
                # Another worker, taken for dead, made the same files meanwhile.
                if not path.exists():
                    raise
        sync_folder(job.folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def attempt_shard(job: EncodingJob, number: int, retries: int = 2) -> str | None:
    """Encode a shard, again where it fails: what it failed of at last, or None.

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
            failed = f"{type(error).__name__}: {error}"
            LOG.warning("shard %d, attempt %d: %s", number, attempt, failed)
        else:
            job.failure(number).unlink(missing_ok=True)
            return None
    write_failure(job, number, failed)
    return failed


def write_failure(job: EncodingJob, number: int, error: str) -> None:
    """Write what a shard failed of, and the ids of its documents, one a line."""
    rows = job.rows(number)
    names = "\n".join(map(str, job.ids[rows.start : rows.stop]))
    job.failure(number).write_text(f"{error}\n\n{names}\n")


def encode_shards(job: EncodingJob, numbers: Sequence[int], retries: int = 2) -> dict:
    """The local engine: one shard after the other.

    Returns:
      number of each shard that failed -> what it failed of.
    """
    failed = {}
    total = sum(len(job.rows(number)) for number in numbers)
    with tqdm(total=total, desc="shards", unit=" documents", disable=None) as bar:
        for number in numbers:
            if (error := attempt_shard(job, number, retries)) is not None:
                failed[number] = error
            bar.update(len(job.rows(number)))
    return failed


def unfinished_shards(job: EncodingJob) -> list[int]:
    """Shards that are still to be encoded; what killed workers left is removed.

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
    job: EncodingJob, shown: Callable[[range], Iterable] | None = None
) -> list[Shard]:
    """The finished shards as `build_folder` takes them, which routes and codes again.

    Args:
      job: all of its shards must be there.
      shown: rows -> what to show of these documents, a JSON value each; or None.

    Raises:
      ValueError: a shard is missing, altered, or of another job.
    """
    found, shards = _found(job), []
    for number in range(job.num_shards):
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
            )
        )
    return shards


def _write(folder: Path, parts: list[dict], header: dict) -> None:
    """The arrays of a shard, block after block, and what describes them."""
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
    """Number -> folder of the shards that are there, if all are of this job."""
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
                f"{path} is the shard of {place}: keep one, under its name"
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
    """Whether all files of a shard are there, in their sizes."""
    files = _header(path)["files"].values()
    sizes = [(path / entry["file"], entry["bytes"]) for entry in files]
    return all(file.is_file() and file.stat().st_size == size for file, size in sizes)


def _check_sums(path: Path) -> None:
    for entry in _header(path)["files"].values():
        file = path / entry["file"]
        found = None
        if file.is_file():
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != entry["sha256"]:
            what = "is missing" if found is None else "was altered"
            raise ValueError(f"{file} {what}: remove {path} and encode it again")
