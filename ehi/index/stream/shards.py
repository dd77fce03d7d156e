"""Shards: they hold the documents of a new index, and are read block by block."""

import collections
import os
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np

from ehi.index.check import as_float32, is_float, misfits

_BLOCK_ROWS, _BLOCK_VALUES = 2**13, 2**22  # documents handled at once


@dataclass(frozen=True, eq=False)
class Shard:
    """Documents of a new index. They are read twice, a block at a time.

    Attributes:
        embeddings: (n, D) floats; or the path of a .npy file, which is not kept in
            memory; or a function without arguments that returns an iterable of blocks
            (any number, D), the same blocks at every call.
        ids: n integers >= 0 or strings, as an array or a sequence that can be sliced
            (a range takes no memory); or the path of a .npy file.
        name: a string or a number, or None. Documents are numbered in the order of the
            names, so the order of named shards does not change the index. Numbers count
            from 0 and none may be missing. Without names, documents are numbered in the
            order of the shards given.
        documents: n JSON values to show, or a function that returns an iterable of
            them, or None; read once.
        metadata: n dicts to filter by, as of `build_index`, or a function that returns
            an iterable of them, or None; read once.

    Example:
        >>> import tempfile
        >>> from ehi.index import build_folder, open_index
        >>> path = f"{tempfile.mkdtemp()}/index"
        >>> blocks = lambda: (np.eye(2) * sign for sign in (1, -1))
        >>> build_folder(path, [Shard(blocks, ["a", "b", "c", "d"])], tree=None)
        >>> open_index(path).search(np.array([[0.0, -1]]), k=1).ids.tolist()
        [['d']]
    """

    embeddings: object
    ids: object
    name: str | int | None = None
    documents: object = None
    metadata: object = None


@dataclass(frozen=True, eq=False)
class Source:
    """A Shard whose files are open, and the rows of its documents.

    Attributes:
        label: its name in messages.
        embeddings, ids: as of the Shard; a file is opened as _Rows.
        documents, metadata: as of the Shard.
        first_row: row of its first document in the index.
    """

    label: str
    embeddings: object
    ids: object
    documents: object
    metadata: object
    first_row: int

    def __len__(self):
        return len(self.ids)

    def blocks(self, rows):
        """Embeddings in their own dtype, at most `rows` of them at once."""
        wholes = [self.embeddings]
        if callable(self.embeddings):
            wholes = self.embeddings()
            if not isinstance(wholes, Iterable):
                raise ValueError(
                    f"the function of {self.label} must return an iterable of blocks, "
                    f"got {type(wholes).__name__}"
                )
            wholes = map(np.asarray, wholes)
        for whole in wholes:
            if len(whole.shape) != 2:
                raise ValueError(
                    f"{self.label} must hold blocks (any number, D) of embeddings, "
                    f"got the shape {whole.shape}"
                )
            for start in range(0, len(whole), rows):
                yield np.ascontiguousarray(whole[start : start + rows])


class _Rows:
    """Rows of a .npy file. It is mapped only while it is read, so no page stays."""

    def __init__(self, label, path):
        self.label, self.path = label, Path(path).absolute()
        rows = self._open()
        self.shape, self.dtype = rows.shape, rows.dtype

    def __len__(self):
        return self.shape[0] if self.shape else 0

    def __getitem__(self, part):
        rows = self._open()
        if (rows.shape, rows.dtype) != (self.shape, self.dtype):
            raise ValueError(f"{self.label} changed while it was read: {self.path}")
        return np.array(rows[part])

    def _open(self):
        try:
            rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.label} is missing: {self.path} does not exist"
            ) from None
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{self.label} cannot be read: {self.path}: {error}"
            ) from None
        if not isinstance(rows, np.ndarray):
            raise ValueError(f"{self.label} is not one array: {self.path}")
        return rows


def open_shards(shards):
    """The shards as _Sources, in the order of their names."""
    sources, first_row = [], 0
    for label, shard in _named(list(shards)):
        embeddings, ids = _embeddings(label, shard.embeddings), _ids(label, shard.ids)
        source = Source(
            label, embeddings, ids, shard.documents, shard.metadata, first_row
        )
        counts = {"embeddings": embeddings, "documents to show": shard.documents,
                  "metadata": shard.metadata}  # fmt: skip
        for what, values in counts.items():
            if hasattr(values, "__len__") and len(values) != len(ids):
                raise ValueError(f"{label} has {len(values)} {what} for {len(ids)} ids")
        sources.append(source)
        first_row += len(source)
    for name, what in (("documents", "documents to show"), ("metadata", "metadata")):
        have = [getattr(source, name) is not None for source in sources]
        if len(set(have)) > 1:
            label = sources[have.index(not have[0])].label
            has = "some" if have[0] else "no"
            raise ValueError(f"the first shard has {has} {what}, unlike {label}")
    return sources


def _embeddings(label, embeddings):
    """Embeddings of a Shard as an array, _Rows of a file, or the function."""
    if isinstance(embeddings, str | os.PathLike):
        return _Rows(label, embeddings)
    if callable(embeddings):
        return embeddings
    array = np.asarray(embeddings)
    if not array.ndim:
        raise ValueError(
            f"{label}: embeddings must be an array, the path of a .npy file, or a "
            f"function that returns blocks, got {type(embeddings).__name__}"
        )
    return array


def _ids(label, ids):
    """Ids of a Shard as a sequence that can be sliced."""
    if isinstance(ids, str | os.PathLike):
        return _Rows(label, ids)
    try:
        ids[0:0], len(ids)
    except (TypeError, KeyError):
        raise ValueError(
            f"{label}: ids must be an array, a sequence that can be sliced, or the "
            f"path of a .npy file, got {type(ids).__name__}"
        ) from None
    return ids


def _named(shards):
    """(label, shard) of every shard, in the order of the names."""
    for shard in shards:
        if not isinstance(shard, Shard):
            raise ValueError(f"shards must be Shards, got {type(shard).__name__}")
    names = [shard.name for shard in shards]
    if all(name is None for name in names):
        return [(f"shard {i}", shard) for i, shard in enumerate(shards)]
    numbers = all(isinstance(name, Integral) for name in names)
    if not numbers and not all(isinstance(name, str) for name in names):
        raise ValueError(
            "names of shards must be all strings or all numbers, or all None, "
            f"got {names[:10]}"
        )
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two shards have the name {twice[0]!r}")
    if numbers:
        gaps = (i for i, name in enumerate(sorted(names)) if name != i)
        missing = next(gaps, None)
        if missing is not None:
            raise ValueError(
                f"numbers of shards count from 0, and shard {missing} is missing: "
                f"got {len(names)} shards from {min(names)} to {max(names)}"
            )
    order = sorted(range(len(shards)), key=names.__getitem__)
    return [(f"shard {names[i]!r}", shards[i]) for i in order]


def width_and_dtype(sources):
    """Width and dtype of the first embeddings; every block must have the same."""
    for source in sources:
        if not len(source):
            continue
        like = source.embeddings
        if callable(like):
            like = next(iter(source.blocks(1)), np.zeros(0))
        if len(like.shape) != 2 or not like.shape[1] or not is_float(like):
            raise ValueError(
                f"{source.label} must hold floats of shape (n, D), "
                f"got {like.dtype} of shape {tuple(like.shape)}"
            )
        return like.shape[1], like.dtype
    raise ValueError(f"an empty corpus: no documents in {len(sources)} shards")


def block_rows(width):
    """Rows of this width that are handled at once."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_VALUES // width))


def readings(build, again=False):
    """(source, row in it, block) of all shards, which must be as long as their ids."""
    width = build.parameters.width

    def miscounted(source, start, found):
        if again:
            return ValueError(changed(source, start, len(source) - start))
        return ValueError(
            f"{source.label} has {found} embeddings for {len(source)} ids"
        )

    for source in build.sources:
        start = 0
        for raw in source.blocks(block_rows(width)):
            if (raw.shape[1], raw.dtype) != (width, build.dtype):
                raise ValueError(
                    f"{source.label} holds {raw.dtype} of width {raw.shape[1]}, "
                    f"the first shard {build.dtype} of width {width}"
                )
            if start + len(raw) > len(source):
                raise miscounted(source, start, "too many")
            yield source, start, raw
            start += len(raw)
        if start < len(source):
            raise miscounted(source, start, start)


def finite_block(build, source, start, raw):
    """A block as float32, if it is finite, also as float16 where that is stored.

    Rows must be unit vectors where the score needs them.
    """
    block = as_float32(raw)
    score = build.parameters.score if build.parameters.has_factors else None
    bad, what = misfits(block, build.half, unit_for=score)
    if len(bad):
        raise ValueError(f"{source.label} holds {what} in row {start + bad[0]}")
    return block


def changed(source, start, num):
    """The message about rows that differ when they are read again."""
    return (
        f"{source.label} changed while the index was built: rows {start} to "
        f"{start + num - 1} differ between the first and the second reading"
    )
