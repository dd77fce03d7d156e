"""Files of vectors: .npy and its shards, ann-benchmarks HDF5, parquet.

Nothing is held in memory: .npy files are memory-mapped, and so is an HDF5 data set that
lies in one piece. Compressed HDF5 and parquet are streamed once to a .npy file in the
cache.
"""

import errno
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.data.rows import JoinedRows, Rows
from ehi.files import cache_folder, file_sha256, new_file

CHUNK_BYTES = 2**26  # of vectors that are in memory at once
DTYPES = ("float32", "float16")
SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.npy")
# Columns of a parquet file that hold vectors and ids, if they are not named.
VECTOR_COLUMNS = ("vector", "embedding", "embeddings", "vectors", "emb", "values")
ID_COLUMNS = ("id", "_id", "ids", "doc_id", "docid")
# ann-benchmarks' names of a distance -> ours.
DISTANCES = {"angular": "cosine", "euclidean": "l2", "ip": "ip", "dot": "ip"}
HDF5 = (".hdf5", ".h5")


Vectors = np.ndarray | Rows  # (N, T): a memory map, or several that are read as one


@dataclass(frozen=True)
class Container:
    """What a path holds; `ehi.data.vectors.dataset` makes a data set of it.

    Attributes:
      documents: (N, T) float32 or float16.
      document_file: names the documents in messages.
      queries: (Q, T), or None.
      query_file: names the queries in messages.
      doc_ids, query_ids: ids, or None for row numbers.
      metric: that the file states, or ''.
      folder: folder with qrels, or None.
    """

    documents: Vectors
    document_file: str
    queries: Vectors | None = None
    query_file: str = ""
    doc_ids: list[str] | None = None
    query_ids: list[str] | None = None
    metric: str = ""
    folder: Path | None = None


def chunks(rows: Vectors, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and the rows, in float32, of parts that fit into memory."""
    step = max(1, CHUNK_BYTES // (4 * max(rows.shape[1], 1)))
    for first in range(start, len(rows), step):
        yield first, np.asarray(rows[first : first + step], np.float32)


def open_container(path: Path) -> Container:
    """Open a folder of .npy files, an ann-benchmarks HDF5 file, or a parquet file.

    Raises:
      FileNotFoundError: the folder has no documents.
      ValueError: a file is none of these, or malformed; one sentence names it.
      ImportError: h5py or pyarrow is missing.
    """
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() in HDF5:
        return _open_hdf5(path)
    if path.suffix.lower() == ".parquet":
        documents, ids = _open_parquet([path])
        return Container(documents, path.name, doc_ids=ids)
    if path.suffix.lower() == ".npy":
        return Container(_load(path), path.name)
    raise ValueError(
        f"{path} holds no vectors: expected a folder with documents.npy, a .npy, "
        ".parquet or ann-benchmarks .hdf5 file"
    )


def holds_vectors(path: Path) -> bool:
    """Whether a path is one that `open_container` reads."""
    if path.is_dir():
        names = [file.name for file in path.iterdir()]
        return any(re.match(r"documents[.-].*(npy|parquet)$", name) for name in names)
    return path.suffix.lower() in (*HDF5, ".npy", ".parquet")


def _open_folder(path: Path) -> Container:
    documents, doc_ids, file = _find(path, "documents")
    if documents is None:
        raise FileNotFoundError(
            f"{path} has no documents.npy, no documents-00000-of-0000N.npy and no "
            "documents.parquet"
        )
    queries, query_ids, query_file = _find(path, "queries")
    return Container(
        documents, file, queries, query_file,
        doc_ids=_read_ids(path / "ids.txt", len(documents)) or doc_ids,
        query_ids=(
            None
            if queries is None
            else _read_ids(path / "query_ids.txt", len(queries)) or query_ids
        ),
        folder=path,
    )  # fmt: skip


def _find(folder: Path, name: str) -> tuple[Vectors | None, list[str] | None, str]:
    """Vectors, ids and file name of `name` in a folder; None if it is not there."""
    whole = folder / f"{name}.npy"
    shards = [
        file
        for file in sorted(folder.glob(f"{name}-*.npy"))
        if SHARD.fullmatch(file.name)
    ]
    if whole.exists() and shards:
        raise ValueError(
            f"{folder} has both {whole.name} and {shards[0].name}: keep one"
        )
    if whole.exists():
        return _load(whole), None, whole.name
    if shards:
        return _load_shards(folder, name, shards), None, f"{name}-*.npy"
    tables = sorted(folder.glob(f"{name}*.parquet"))
    if tables:
        return *_open_parquet(tables), f"{name}*.parquet"
    return None, None, ""


def _load(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no whole .npy file ({error})") from None
    if not isinstance(array, np.ndarray):  # an .npz
        raise ValueError(f"{path} is an .npz archive: save one array with np.save")
    check_rows(array, str(path))
    return array


def check_rows(array: np.ndarray, where: str) -> None:
    """Refuse an array that is not one of vectors."""
    dtype, shape = getattr(array, "dtype", None), getattr(array, "shape", ())
    if len(shape) != 2 or dtype not in DTYPES:
        raise ValueError(
            f"{where} holds {dtype or type(array).__name__} of shape {shape}: vectors "
            "must be float32 or float16 of shape (rows, width)"
        )


def _load_shards(folder: Path, name: str, files: list[Path]) -> JoinedRows:
    totals = {int(SHARD.fullmatch(file.name)[3]) for file in files}
    if len(totals) > 1:
        raise ValueError(
            f"the shards of {name} in {folder} are of {sorted(totals)} shards: keep "
            "those of one number"
        )
    (total,) = totals
    there = {int(SHARD.fullmatch(file.name)[2]): file for file in files}
    if wrong := sorted(set(there) - set(range(total))):
        raise ValueError(
            f"{there[wrong[0]]} is out of order: shards are numbered from 0 to "
            f"{total - 1}"
        )
    if missing := sorted(set(range(total)) - set(there)):
        raise FileNotFoundError(
            f"shard {missing[0]} of {total} of {name} is missing in {folder}: there is "
            f"no {name}-{missing[0]:05}-of-{total:05}.npy"
        )
    parts = [_load(there[number]) for number in range(total)]
    for number, part in enumerate(parts):
        if part.shape[1] != parts[0].shape[1] or part.dtype != parts[0].dtype:
            raise ValueError(
                f"{there[number]} holds {part.dtype} of width {part.shape[1]}, the "
                f"first shard {parts[0].dtype} of width {parts[0].shape[1]}"
            )
    return JoinedRows(parts)


def _read_ids(path: Path, rows: int) -> list[str] | None:
    if not path.exists():
        return None
    try:
        ids = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error})") from None
    return checked_ids(ids, rows, str(path))


def checked_ids(ids: list[str], rows: int, where: str) -> list[str]:
    """The ids as strings, if there is one for each row and all are different."""
    ids = [str(id) for id in ids]
    if len(ids) != rows:
        raise ValueError(f"{where} has {len(ids):,} ids for {rows:,} vectors")
    first: dict[str, int] = {}
    for row, id in enumerate(ids):
        if not id.strip():
            raise ValueError(f"{where}: the id of row {row} is empty")
        if first.setdefault(id, row) != row:
            raise ValueError(
                f"{where}: rows {first[id]} and {row} have the same id {id!r}"
            )
    return ids


def _open_hdf5(path: Path) -> Container:
    try:
        import h5py
    except ImportError:
        raise ImportError(
            f"{path.name} needs h5py: python -m pip install 'ehi[vectors]'"
        ) from None
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is no HDF5 file ({error})") from None
    with file:
        for name in ("train", "test"):
            if name not in file:
                there = ", ".join(file) or "nothing"
                raise ValueError(
                    f"{path} has no data set {name!r}, as ann-benchmarks files have; "
                    f"it has {there}"
                )
        distance = str(file.attrs.get("distance", ""))
        if distance and distance not in DISTANCES:
            raise ValueError(
                f"{path} has the distance {distance!r}; allowed: "
                f"{', '.join(map(repr, DISTANCES))}"
            )
        documents, queries = (_hdf5_rows(path, file[n]) for n in ("train", "test"))
    metric = DISTANCES.get(distance, "")
    return Container(
        documents, f"{path.name}, train", queries, f"{path.name}, test", metric=metric
    )


def _hdf5_rows(path: Path, data) -> np.ndarray:
    """The rows of an HDF5 data set, memory-mapped."""
    where = f"{path}, {data.name}"
    if data.ndim != 2 or data.dtype.kind not in "fiu":
        raise ValueError(
            f"{where} holds {data.dtype} of shape {data.shape}: vectors must be "
            "numbers of shape (rows, width)"
        )
    if data.dtype.name in DTYPES and data.id.get_offset() is not None:
        at = {"offset": data.id.get_offset(), "shape": data.shape}
        return np.memmap(path, data.dtype, "r", **at)
    step = max(1, CHUNK_BYTES // (4 * data.shape[1]))
    parts = (data[s : s + step] for s in range(0, len(data), step))
    name = f"{file_sha256(path)[:32]}-{data.name.strip('/')}.npy"
    return streamed(name, parts, data.shape)


def _open_parquet(paths: list[Path]) -> tuple[np.ndarray, list[str] | None]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ImportError(
            f"{paths[0].name} needs pyarrow: python -m pip install 'ehi[vectors]'"
        ) from None
    try:
        files = [parquet.ParquetFile(path) for path in paths]
    except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"{paths[0]} is no parquet file ({error})") from None
    names = files[0].schema_arrow.names
    column = next((name for name in VECTOR_COLUMNS if name in names), None)
    if column is None:
        raise ValueError(
            f"{paths[0]} has no column of vectors: expected one of "
            f"{', '.join(VECTOR_COLUMNS)}, it has {', '.join(names)}"
        )
    rows = sum(file.metadata.num_rows for file in files)
    width = _parquet_width(paths, files, column)
    ids, id_column = None, next((name for name in ID_COLUMNS if name in names), None)
    if id_column is not None:
        read = [file.read([id_column])[id_column].to_pylist() for file in files]
        ids = checked_ids([i for part in read for i in part], rows, str(paths[0]))
    parts = _parquet_parts(paths, files, column, width)
    key = "-".join(file_sha256(path)[:32] for path in paths[:1])
    if len(paths) > 1:
        key += f"-{hash_of([file_sha256(path) for path in paths])}"
    return streamed(f"{key}-{column}.npy", parts, (rows, width)), ids


def hash_of(parts: Iterable[str]) -> str:
    """The first 16 digits of the sha256 of some texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _parquet_width(paths, files, column: str) -> int:
    for path, file in zip(paths, files, strict=True):
        for batch in file.iter_batches(1, columns=[column]):
            first = batch.column(0)[0].as_py()
            if not isinstance(first, list) or not first:
                raise ValueError(
                    f"{path}: row 0 of column {column!r} is {first!r:.40}, not a list "
                    "of numbers"
                )
            return len(first)
    raise ValueError(f"{paths[0]} has no rows")


def _parquet_parts(paths, files, column: str, width: int) -> Iterator[np.ndarray]:
    from pyarrow.compute import list_value_length

    for path, file in zip(paths, files, strict=True):
        row = 0
        for batch in file.iter_batches(8192, columns=[column]):
            values = batch.column(0)
            lengths = list_value_length(values).to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(~(lengths == width))  # a missing value is NaN
            if len(wrong):
                raise ValueError(
                    f"{path}: row {row + int(wrong[0])} of column {column!r} has not "
                    f"{width} numbers, as row 0 has"
                )
            flat = values.flatten().to_numpy(zero_copy_only=False)
            yield flat.reshape(len(values), width)
            row += len(values)


def streamed(name: str, parts: Iterable[np.ndarray], shape) -> np.ndarray:
    """A .npy file of float32 in the cache, written part by part, memory-mapped.

    Raises:
      OSError: the disk is full; what was written is removed.
    """
    path = cache_folder() / "vectors" / name
    if not path.is_file():
        try:
            with new_file(path) as beside, beside.open("wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    file.write(np.ascontiguousarray(part, "<f4").data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            needed = 4 * shape[0] * shape[1] / 2**30
            raise OSError(
                error.errno,
                f"the disk of {path.parent} is full: {name} needs {needed:.2f} GiB; "
                "set the environment variable EHI_CACHE to another folder",
            ) from None
    return _load(path)
