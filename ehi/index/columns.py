"""Values that an index keeps for each document: ids, what to show, and metadata.

Each kind is a few arrays, so that it can be mapped into memory and is read only where a
search needs it.
"""

import bisect
import functools
import itertools
import json
from array import array
from dataclasses import dataclass

import numpy as np

from ehi.index.check import IndexCorruptError


@dataclass(frozen=True)
class StringIds:
    """String ids as one block of UTF-8: id i is text[offsets[i]:offsets[i + 1]].

    Attributes:
        offsets: (N + 1,) int64.
        text: (bytes,) uint8.
    """

    offsets: np.ndarray
    text: np.ndarray

    @classmethod
    def of(cls, strings, what="an id"):
        try:
            encoded = [string.encode() for string in strings]
        except UnicodeEncodeError as error:
            raise ValueError(f"{what} is not valid Unicode: {error}") from None
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(string) for string in encoded], out=offsets[1:])
        return cls(offsets, np.frombuffer(b"".join(encoded), np.uint8))

    def __len__(self):
        return len(self.offsets) - 1

    def take(self, rows):
        """Object array of the ids of `rows`; None for negative rows."""
        ids = np.full(rows.shape, None, object)
        starts = self.offsets[np.maximum(rows, 0)].ravel()
        stops = self.offsets[np.maximum(rows, 0) + 1].ravel()
        for position in np.flatnonzero(rows >= 0):
            text = self.text[starts[position] : stops[position]]
            try:
                ids.flat[position] = text.tobytes().decode()
            except UnicodeDecodeError as error:
                raise IndexCorruptError(f"an id is not UTF-8: {error}") from None
        return ids

    def tolist(self):
        return self.take(np.arange(len(self))).tolist()

    def row_of_string(self):
        """id in UTF-8 -> row, of all ids."""
        text, offsets = self.text.tobytes(), self.offsets.tolist()
        return {
            text[a:b]: row for row, (a, b) in enumerate(itertools.pairwise(offsets))
        }

    def keep(self, mask):
        """Lengths and bytes of the ids that a mask (N,) keeps."""
        lengths = np.diff(self.offsets)
        return lengths[mask], self.text[np.repeat(mask, lengths)]


@dataclass(frozen=True)
class StoredDocuments:
    """A JSON line to show for each document, by row, parsed when asked for.

    Attributes:
        text: (bytes,) uint8, usually a memory-mapped file.
    """

    text: np.ndarray

    @classmethod
    def of(cls, values):
        try:
            lines = [
                json.dumps(value, allow_nan=False).encode() + b"\n" for value in values
            ]
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"documents to show must be JSON: {error}") from None
        return cls(np.frombuffer(b"".join(lines), np.uint8))

    @functools.cached_property
    def _line_ends(self):
        return np.flatnonzero(self.text == ord("\n"))

    def __len__(self):
        return len(self._line_ends)

    def __getitem__(self, row):
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is outside the {len(self)} stored documents")
        start = self._line_ends[row - 1] + 1 if row else 0
        return json.loads(self.text[start : self._line_ends[row]].tobytes())

    def keep(self, mask):
        """Bytes of the lines that a mask (N,) keeps."""
        lengths = np.diff(self._line_ends, prepend=-1)
        return self.text[np.repeat(mask, lengths)]


TEXT, NUMBER, TRUTH = "text", "number", "bool"
KINDS = (TEXT, NUMBER, TRUTH)
# What stands for a missing value.
NO_INTEGER, NO_TEXT, NO_TRUTH = -(2**63), 2**32 - 1, 2


@dataclass(frozen=True)
class Column:
    """One field of all documents of a segment. A document may lack it.

    Attributes:
        kind: 'text', 'number' or 'bool'.
        values: (N,) by row. Numbers are int64 or float64, missing ones `NO_INTEGER` or
            NaN; a bool is uint8, 0 or 1, missing `NO_TRUTH`; a text is uint32, its
            place in `distinct`, missing `NO_TEXT`.
        distinct: the different texts, ascending as UTF-8; None for other kinds.
    """

    kind: str
    values: np.ndarray
    distinct: StringIds | None = None

    @property
    def known(self):
        """Which documents have a value: (N,) bool."""
        if self.values.dtype.kind == "f":
            return ~np.isnan(self.values)
        missing = {TEXT: NO_TEXT, NUMBER: NO_INTEGER, TRUTH: NO_TRUTH}
        return self.values != missing[self.kind]

    def value(self, row):
        """The value of a document, or None."""
        stored = self.values[row].item()
        if self.kind == TEXT:
            rows = np.array([-1 if stored == NO_TEXT else stored])
            return self.distinct.take(rows)[0]
        if isinstance(stored, float):  # -2**63 among others is a value
            return None if stored != stored else stored
        if stored in (NO_INTEGER, NO_TRUTH if self.kind == TRUTH else None):
            return None
        return bool(stored) if self.kind == TRUTH else stored

    def place(self, text, after=False):
        """How many of the distinct texts are smaller; `after`: or equal."""
        offsets, words = self.distinct.offsets, self.distinct.text
        find = bisect.bisect_right if after else bisect.bisect_left
        return find(
            range(len(self.distinct)), text.encode(),
            key=lambda i: words[offsets[i] : offsets[i + 1]].tobytes(),
        )  # fmt: skip

    def arrays(self):
        """name -> array, as a folder stores them."""
        if self.distinct is None:
            return {"values": self.values}
        texts = {"offsets": self.distinct.offsets, "text": self.distinct.text}
        return {"values": self.values, **texts}

    def check(self, name):
        """Checks that no value points outside the texts, and that these ascend.

        Raises:
            IndexCorruptError: naming the field.
        """
        if self.kind != TEXT:
            if self.kind == TRUTH and (self.values > NO_TRUTH).any():
                raise IndexCorruptError(f"metadata {name!r} holds no bool")
            return
        offsets = self.distinct.offsets
        if (offsets[1:] < offsets[:-1]).any():
            raise IndexCorruptError(f"the texts of metadata {name!r} overlap")
        texts = list(self.distinct.row_of_string())
        if len(texts) < len(offsets) - 1 or texts != sorted(texts):
            raise IndexCorruptError(f"the texts of metadata {name!r} are not sorted")
        if (self.values[self.known] >= len(texts)).any():
            raise IndexCorruptError(f"metadata {name!r} points outside its texts")


@dataclass(frozen=True)
class Metadata:
    """The fields of a segment's documents, by which a search may filter.

    >>> kept = Metadata.of([{"lang": "en", "year": 2021}, {"lang": "de"}])
    >>> kept.fields, kept[1]
    ({'lang': 'text', 'year': 'number'}, {'lang': 'de'})

    Attributes:
        columns: field -> Column.
        num: N; there may be no column.
    """

    columns: dict[str, Column]
    num: int

    @classmethod
    def of(cls, values, fields=None):
        """The metadata of N documents.

        Args:
            values: N dicts, field -> text, number, bool, or None if it is missing.
            fields: field -> kind, the only ones allowed; None for those that are there.

        Raises:
            ValueError: a value of another kind, or a field that is not allowed.
        """
        collected = Collected(fields)
        for value in values:
            collected.add(value)
        return collected.metadata()

    @property
    def fields(self):
        return {name: column.kind for name, column in self.columns.items()}

    def __len__(self):
        return self.num

    def __getitem__(self, row):
        found = {name: column.value(row) for name, column in self.columns.items()}
        return {name: value for name, value in found.items() if value is not None}

    def __iter__(self):
        return (self[row] for row in range(len(self)))

    def arrays(self):
        """name -> array, as a folder stores them."""
        return {
            f"metadata.{number}.{name}": array
            for number, column in enumerate(self.columns.values())
            for name, array in column.arrays().items()
        }

    @classmethod
    def from_arrays(cls, fields, arrays, num):
        """What `arrays` gives, put together again.

        Raises:
            ValueError: an array has another shape or dtype, or is missing.
        """
        columns = {}
        for number, (name, kind) in enumerate(fields.items()):
            start = f"metadata.{number}"
            values, distinct = arrays[f"{start}.values"], None
            dtypes = {TEXT: ("uint32",), NUMBER: ("int64", "float64")}
            if values.shape != (num,) or values.dtype.name not in dtypes.get(
                kind, ("uint8",)
            ):
                raise ValueError(f"{start}.values is {values.dtype} {values.shape}")
            if kind == TEXT:
                distinct = StringIds(
                    arrays[f"{start}.offsets"], arrays[f"{start}.text"]
                )
                shapes = distinct.offsets.ndim, distinct.text.shape
                if shapes != (1, (distinct.offsets[-1],)) or distinct.offsets[0]:
                    raise ValueError(f"{start}.offsets does not fit {start}.text")
            columns[name] = Column(kind, values, distinct)
        return cls(columns, num)

    def check(self):
        """Checks every column: see `Column`."""
        for name, column in self.columns.items():
            column.check(name)

    @classmethod
    def merged(cls, parts):
        """The metadata of several segments as one.

        Memory: the values, and the distinct texts.

        Args:
            parts: (Metadata, mask (N,) of the documents to keep) of each; all have the
                same fields.
        """
        columns = {
            name: _merged([(part.columns[name], mask) for part, mask in parts])
            for name in parts[0][0].columns
        }
        return cls(columns, sum(int(mask.sum()) for _, mask in parts))


def _merged(parts):
    """One column of the documents that the masks keep; texts of no document go."""
    kind, values = parts[0][0].kind, [column.values[mask] for column, mask in parts]
    if kind != TEXT:
        if len({part.dtype for part in values}) > 1:  # whole numbers and others
            values = [
                np.where(part == NO_INTEGER, np.nan, part) if part.dtype.kind == "i"
                else part
                for part in values
            ]  # fmt: skip
        return Column(kind, np.concatenate(values))
    texts = []
    for (column, _), codes in zip(parts, values, strict=True):
        used = np.unique(codes)
        used = used[used != NO_TEXT].astype(np.int64)
        texts.append((used, column.distinct.take(used).tolist()))
    codes, distinct = _numbered(sorted({text for _, some in texts for text in some}))
    moved = []
    for (used, some), old in zip(texts, values, strict=True):
        new = np.fromiter((codes[text] for text in some), np.uint32, len(some))
        new = np.append(new, np.uint32(NO_TEXT))  # the place of missing texts
        moved.append(new[np.searchsorted(used, old)])
    return Column(TEXT, np.concatenate(moved), distinct)


def _numbered(texts):
    """text -> its number, and all of them, which ascend, as StringIds."""
    stored = StringIds.of(texts, "a text of the metadata")
    return {text: number for number, text in enumerate(texts)}, stored


def metadata_of(values, num, fields=None):
    """`Metadata.of` for a known number of documents.

    Raises:
        ValueError: there are more or fewer values, or as of `Metadata.of`.
    """
    if isinstance(values, dict | str):
        raise ValueError(f"metadata must be one dict for each document, got {values!r}")
    whole = isinstance(values, Metadata) and fields is None
    kept = values if whole else Metadata.of(values, fields)
    if len(kept) != num:
        raise ValueError(f"{len(kept)} metadata for {num} documents")
    return kept


class Collected:
    """Metadata that grow by one document at a time.

    Memory: 4 or 8 bytes for each document and field, and the distinct texts.

    Args:
        fields: as of `Metadata.of`.
    """

    def __init__(self, fields=None):
        self.num, self.closed = 0, fields is not None
        self.columns = {name: _Growing(name, kind) for name, kind in
                        (fields or {}).items()}  # fmt: skip

    def add(self, record):
        """Adds the fields of the next document: a dict, or None for no field.

        Raises:
            ValueError: as of `Metadata.of`.
        """
        if record is not None and not isinstance(record, dict):
            raise ValueError(
                f"metadata of document {self.num} must be a dict, got {record!r}"
            )
        for name, value in (record or {}).items():
            value = value.item() if isinstance(value, np.generic) else value
            missing = isinstance(value, float) and value != value  # NaN
            if value is None or missing:
                continue
            if name not in self.columns:
                self._refuse_new(name)
                kind = _kind_of(name, value, self.num)
                self.columns[name] = _Growing(name, kind)
            self.columns[name].put(self.num, value)
        self.num += 1

    def _refuse_new(self, name):
        if self.closed:
            known = ", ".join(map(repr, self.columns)) or "none"
            raise ValueError(f"the index has no metadata {name!r}; it has {known}")
        if not isinstance(name, str) or not name:
            raise ValueError(f"a field of metadata is named by a text, got {name!r}")

    def metadata(self):
        """All documents so far as Metadata, fields by name."""
        names = self.columns if self.closed else sorted(self.columns)
        columns = {name: self.columns[name].column(self.num) for name in names}
        return Metadata(columns, self.num)


def _kind_of(name, value, row):
    """The kind of a value.

    Raises:
        ValueError: it is no text, number or bool.
    """
    if isinstance(value, bool):
        return TRUTH
    if isinstance(value, int | float):
        return NUMBER
    if isinstance(value, str):
        return TEXT
    raise ValueError(
        f"metadata {name!r} of document {row} must be a text, a number, or true or "
        f"false, got {value!r}"
    )


class _Growing:
    """A column that grows. Documents that are skipped lack the field."""

    def __init__(self, name, kind):
        self.name, self.kind, self.texts = name, kind, {}
        self.values = array({TEXT: "I", NUMBER: "q", TRUTH: "B"}[kind])

    def put(self, row, value):
        kind = _kind_of(self.name, value, row)
        if kind != self.kind:
            raise ValueError(
                f"metadata {self.name!r} of document {row} is {value!r}, a {kind}; "
                f"it is a {self.kind} in other documents"
            )
        if len(self.values) < row:
            self._fill(row)
        if kind == TEXT:
            value = self.texts.setdefault(value, len(self.texts))
        whole = self.values.typecode == "q"
        if whole and (isinstance(value, float) or not abs(value) < 2**63):
            numbers = _as_array(self.values)
            known = np.where(numbers == NO_INTEGER, np.nan, numbers)
            self.values = array("d", known.tobytes())
        try:
            self.values.append(value)
        except OverflowError:
            raise ValueError(
                f"metadata {self.name!r} of document {row} is too large a number"
            ) from None

    def _fill(self, num):
        """Marks documents as lacking the field until there are `num` of them."""
        missing = {"I": NO_TEXT, "q": NO_INTEGER, "B": NO_TRUTH, "d": np.nan}
        code = self.values.typecode
        self.values.extend(array(code, [missing[code]]) * (num - len(self.values)))

    def column(self, num):
        self._fill(num)
        values = _as_array(self.values)
        if self.kind != TEXT:
            return Column(self.kind, values)
        codes, distinct = _numbered(sorted(self.texts))
        order = np.array([*(codes[text] for text in self.texts), NO_TEXT], np.uint32)
        return Column(TEXT, order[np.minimum(values, len(self.texts))], distinct)


def _as_array(values):
    return np.frombuffer(values, values.typecode).copy()
