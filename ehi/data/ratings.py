"""Files of ratings: where they are, and what is in them.

MovieLens        ratings.dat   user::item::rating::timestamp
                 movies.dat    item::title::genre|genre
Amazon reviews   ratings.csv   user,item,rating,timestamp
                 metadata.jsonl   {"asin": ..., "title": ..., "categories": [...]}
"""

import hashlib
import importlib.resources
import json
import zipfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

from ehi.data import download
from ehi.data.tfds_builder import Document, RetrievalBuilder

# Name -> folder or zip of that name in EHI_DATA.
NAMES = {"movielens-1m": "ml-1m", "amazon-books": "amazon-books"}


@dataclass(frozen=True)
class Ratings:
    """Columns of equal length (R,), in any order.

    Args:
        users, items: rows of some tables of users and of items.
        stars: how much the user liked the item.
        times: when the user said so.
    """

    users: np.ndarray
    items: np.ndarray
    stars: np.ndarray
    times: np.ndarray


def find(name: str, cache: Path):
    """Folder of the ratings called `name`, and its short name; None if it is no such.

    Args:
        name: one of `NAMES`, or the path of a folder or zip in either layout.
        cache: where MovieLens is downloaded to if no folder of EHI_DATA has it.

    Raises:
        ValueError: the data set is only to be had as local files, which are missing.
        ConnectionError: MovieLens cannot be downloaded.
    """
    path, short = Path(name).expanduser(), name
    if name in NAMES:
        path = download.search_folders(NAMES[name])
    if path is None and name == "movielens-1m":
        path = download.download(*_movielens_address(), cache / "zips" / "ml-1m.zip")
    if path is None:
        raise ValueError(
            f"{name} is not downloaded for you: put a folder {NAMES[name]!r} with "
            "ratings.csv and metadata.jsonl into a folder that EHI_DATA lists"
        )
    tops = []
    if path.is_dir():
        tops, short = [path], short if name in NAMES else path.resolve().name
    elif path.is_file() and zipfile.is_zipfile(path):
        tops = [zipfile.Path(path), *zipfile.Path(path).iterdir()]
        short = short if name in NAMES else path.stem
    for top in tops:
        if any((top / ratings).exists() for ratings in LAYOUTS):
            return top, short
    if name in NAMES:
        raise ValueError(f"{path} holds none of {', '.join(LAYOUTS)}")
    return None


def _movielens_address() -> tuple[str, str]:
    """Address and sha256 of the zip, from tfds's own list.

    Its builder `movielens` is of no use here: its parser needs TensorFlow.
    """
    package = importlib.resources.files("tensorflow_datasets")
    listed = checksums.load_url_infos(package / "url_checksums" / "movielens.txt")
    return next((u, i.checksum) for u, i in listed.items() if u.endswith("/ml-1m.zip"))


def source_sha256(root) -> str:
    """sha256 over the names and contents of the files of ratings and of items."""
    ratings, layout = layout_of(root)
    digest = hashlib.sha256()
    for path in (ratings, root / layout.items):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def read_items(root) -> dict[str, Document]:
    """Item id -> title and genres; items without a title are left out.

    Raises:
        ValueError: a malformed line, or no item at all.
    """
    items, (_, layout) = {}, layout_of(root)
    path = root / layout.items
    for where, line in _lines(path, layout.encoding):
        try:
            id, title, genres = layout.parse(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{where}: expected {layout.expected}, got {line!r} ({error!r})"
            ) from None
        if title:
            items.setdefault(id, Document(id, title, ", ".join(genres)))
    if not items:
        raise ValueError(f"{path} holds no item with a title")
    return items


def read_ratings(root, items: dict[str, Document]) -> tuple[Ratings, list[str]]:
    """Ratings of known items, and the ids of their users.

    Raises:
        ValueError: a malformed line, or no rating of a known item.
    """
    (path, layout), users = layout_of(root), {}
    item_rows = {id: row for row, id in enumerate(items)}
    columns = array("q"), array("q"), array("d"), array("q")
    for where, line in _lines(path, layout.encoding):
        try:
            user, item, stars, time = line.split(layout.separator)
            values = float(stars), int(time)
        except ValueError:
            if where.endswith(" line 1") and "rating" in line:
                continue  # names of the columns
            raise ValueError(
                f"{where}: expected user, item, rating and timestamp with "
                f"{layout.separator!r} between them, got {line!r}"
            ) from None
        if item in item_rows:
            row = users.setdefault(user, len(users)), item_rows[item], *values
            for column, value in zip(columns, row, strict=True):
                column.append(value)
    if not users:
        raise ValueError(
            f"{path} has no rating of an item of {layout.items}; its columns must be "
            "user, item, rating, timestamp"
        )
    return Ratings(*(np.array(column) for column in columns)), list(users)


def _movie(line: str) -> tuple[str, str, list[str]]:
    id, title, genres = line.split("::")
    return id, title.strip(), genres.split("|")


def _book(line: str) -> tuple[str, str, list[str]]:
    record, genres = json.loads(line), []
    id, title = record["asin"], record.get("title") or ""
    for genre in record.get("categories") or record.get("category") or ():
        # Lists of lists in the release of 2014.
        genres += [genre] if isinstance(genre, str) else map(str, genre)
    if not isinstance(title, str):
        raise ValueError(f"title {title!r} is no string")
    return str(id), " ".join(title.split()), list(dict.fromkeys(genres))


class Layout(NamedTuple):
    """How ratings and items are written.

    Args:
        separator: between the fields of a rating.
        encoding: of both files.
        items: file of the items.
        expected: what a line of it holds, in words.
        parse: such a line -> id, title, genres.
    """

    separator: str
    encoding: str
    items: str
    expected: str
    parse: Callable


# By the file of the ratings.
LAYOUTS = {
    "ratings.dat": Layout("::", "latin-1", "movies.dat", "item::title::genres", _movie),
    "ratings.csv": Layout(
        ",", "utf-8", "metadata.jsonl", "a JSON object with 'asin' and 'title'", _book
    ),
}


def layout_of(root):
    """File of the ratings, and its layout.

    Raises:
        ValueError: the file of the items is missing.
    """
    name = next(name for name in LAYOUTS if (root / name).exists())
    layout = LAYOUTS[name]
    if not (root / layout.items).exists():
        raise ValueError(f"{root} has {name}, but no {layout.items} beside it")
    return root / name, layout


def _lines(path, encoding: str) -> Iterator[tuple[str, str]]:
    """Place and text of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not {encoding} ({error})") from None
            if text.strip():
                yield where, text


# MERGED ehi_data_interactions: tfds builder of ratings: what a user liked last -> the
# item that they liked next.
#
# A query is the titles of the last `HISTORY` items that a user rated at least `LIKED`
# before the one that is asked for; a document is the title and the genres of an item.
# The
# last item of a user is asked for in 'test', the one before in 'dev', all earlier ones
# but the first in 'train'. So test asks for documents that train asks for too.
#

LIKED, HISTORY = 4.0, 10


@dataclass(frozen=True)
class NextItems:
    """Examples (E,): the items that a user liked, one after the other.

    Args:
        items: liked items by user and time.
        places: of the item that an example asks for, in `items`.
        starts: of the example's history, which ends before its place.
        users: of each example.
        left: liked items of the user that come after it: 0 is test, 1 is dev.
    """

    items: np.ndarray
    places: np.ndarray
    starts: np.ndarray
    users: np.ndarray
    left: np.ndarray


def next_items(ratings: Ratings) -> NextItems:
    """One example for each item that a user liked, but the first.

    Equal times keep the order of the ratings; of an item that a user liked twice the
    first time counts, or its title would be in the query that asks for it.
    """
    liked = np.flatnonzero(ratings.stars >= LIKED)
    order = liked[np.lexsort((ratings.times[liked], ratings.users[liked]))]
    pairs = np.stack([ratings.users[order], ratings.items[order]])
    _, first = np.unique(pairs, axis=1, return_index=True)
    users, items = pairs[:, np.sort(first)]
    _, begin, count = np.unique(users, return_index=True, return_counts=True)
    begin, count = np.repeat(begin, count), np.repeat(count, count)  # of each item
    place = np.arange(len(items))
    asked = place > begin
    return NextItems(
        items=items,
        places=place[asked],
        starts=np.maximum(begin, place - HISTORY)[asked],
        users=users[asked],
        left=(begin + count - 1 - place)[asked],
    )


class Interactions(RetrievalBuilder):
    """tfds builder of a folder of ratings and items.

    Args:
        root: a `pathlib.Path` or `zipfile.Path` to the folder of the ratings.
    """

    VERSION = tfds.core.Version("1.0.0")

    def documents(self) -> Iterator[Document]:
        yield from self._items.values()

    def queries(self) -> Iterator[tuple[str, str]]:
        titles = [item.title for item in self._items.values()]
        found = self._examples
        for place, start, user in zip(
            found.places, found.starts, found.users, strict=True
        ):
            history = "; ".join(titles[item] for item in found.items[start:place])
            yield f"{self._user_ids[user]}-{place}", history

    def judgements(self) -> dict[str, np.ndarray]:
        found = self._examples
        query = np.arange(len(found.places))
        rows = np.stack([query, found.items[found.places], np.ones_like(query)], 1)
        splits = np.minimum(found.left, 2)
        return {
            split: rows[splits == number].astype(np.int64)
            for number, split in enumerate(("test", "dev", "train"))
        }

    @cached_property
    def _items(self) -> dict[str, Document]:
        return read_items(self.root)

    @cached_property
    def _examples(self) -> NextItems:
        ratings, self._user_ids = read_ratings(self.root, self._items)
        return next_items(ratings)
