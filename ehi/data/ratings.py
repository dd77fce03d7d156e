"""Data sets of ratings: after what a user liked, which item do they like next?

MovieLens        ratings.dat   user::item::rating::timestamp
                 movies.dat    item::title::genre|genre
Amazon reviews   ratings.csv   user,item,rating,timestamp
                 metadata.jsonl   {"asin": ..., "title": ..., "categories": [...]}

A document is the title and the genres of an item. A query asks for one item: its text
is the titles of the last `HISTORY` items that the user rated at least `LIKED` before
it. The last item of a user belongs to 'test', the one before it to 'dev', the others to
'train' (the first has no history and is left out). So 'test' also asks for documents
that 'train' asks for.
"""

import csv
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
from ehi.data.lines import numbered_lines, shortened
from ehi.data.tfds_builder import Document, RetrievalBuilder
from ehi.files import files_sha256

LIKED, HISTORY = 4.0, 10

# Name -> name of the folder or zip in EHI_DATA.
NAMES = {"movielens-1m": "ml-1m", "amazon-books": "amazon-books"}


def find(name: str, cache: Path):
    """Find the ratings called `name`: their folder and short name, or None.

    Args:
        name: one of `NAMES`, or the path of a folder or zip in either layout.
        cache: MovieLens is downloaded to here if no folder of EHI_DATA has it.

    Raises:
        ValueError: the data set cannot be downloaded, and its local files are missing.
        ConnectionError: MovieLens cannot be downloaded.
    """
    path, short = download.expanded(name, "the data set"), name
    if name in NAMES:
        path = download.search_folders(NAMES[name])
    if path is None and name == "movielens-1m":
        path = download.download(*_movielens_address(), cache / "zips" / "ml-1m.zip")
    if path is None:
        raise ValueError(
            f"{name} cannot be downloaded: put a folder {NAMES[name]!r} with "
            "ratings.csv and metadata.jsonl into a folder that EHI_DATA lists"
        )
    tops = []
    if path.is_dir():
        tops, short = [path], short if name in NAMES else path.resolve().name
    elif path.is_file() and zipfile.is_zipfile(path):
        with download.explained_zip(path):
            root = zipfile.Path(download.open_zip(path))
        tops = [root, *root.iterdir()]
        short = short if name in NAMES else path.stem
    for top in tops:
        rated = any((top / ratings).exists() for ratings in LAYOUTS)
        # Beside a corpus.jsonl, such a file is only a part of a BEIR folder.
        if rated and not (top / download.CORPUS).exists():
            return top, short
    if name in NAMES:
        raise ValueError(f"{path} holds none of {', '.join(LAYOUTS)}")
    return None


def _movielens_address() -> tuple[str, str]:
    """Address and sha256 of the zip, from the list of tfds.

    The tfds builder `movielens` cannot be used: its parser needs TensorFlow.
    """
    package = importlib.resources.files("tensorflow_datasets")
    listed = checksums.load_url_infos(package / "url_checksums" / "movielens.txt")
    return next((u, i.checksum) for u, i in listed.items() if u.endswith("/ml-1m.zip"))


def source_sha256(root) -> str:
    """sha256 of the names and contents of both files, ratings and items."""
    ratings, layout = layout_of(root)
    return files_sha256([ratings, root / layout.items])


class Layout(NamedTuple):
    """Format of a file of ratings and its file of items.

    Args:
        separator: between the fields of a rating.
        encoding: of both files.
        items: name of the file of items.
        expected: what its lines hold, for messages.
        parse: line of items -> id, title, genres.
    """

    separator: str
    encoding: str
    items: str
    expected: str
    parse: Callable


def _movie(line: str) -> tuple[str, str, list[str]]:
    id, title, genres = line.split("::")
    return id, title.strip(), genres.split("|")


def _book(line: str) -> tuple[str, str, list[str]]:
    record, genres = json.loads(line), []
    id, title = record["asin"], record.get("title") or ""
    for genre in record.get("categories") or record.get("category") or ():
        # The release of 2014 has lists of lists.
        genres += [genre] if isinstance(genre, str) else map(str, genre)
    if not isinstance(title, str):
        raise ValueError(f"title {title!r} is not a string")
    return str(id), " ".join(title.split()), list(dict.fromkeys(genres))


# Name of the file of ratings -> layout.
LAYOUTS = {
    "ratings.dat": Layout("::", "latin-1", "movies.dat", "item::title::genres", _movie),
    "ratings.csv": Layout(
        ",", "utf-8", "metadata.jsonl", "a JSON object with 'asin' and 'title'", _book
    ),
}


def layout_of(root):
    """Path of the file of ratings, and its layout.

    Raises:
        ValueError: the file of items is missing.
    """
    name = next(name for name in LAYOUTS if (root / name).exists())
    layout = LAYOUTS[name]
    if not (root / layout.items).exists():
        raise ValueError(f"{root} has {name}, but no {layout.items} beside it")
    return root / name, layout


def read_items(root) -> dict[str, Document]:
    """Item id -> title and genres. Items without a title are left out.

    Raises:
        ValueError: a line is malformed, or no item has a title.
    """
    items, (_, layout) = {}, layout_of(root)
    path = root / layout.items
    for where, line in numbered_lines(path, layout.encoding):
        try:
            id, title, genres = layout.parse(line)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{where}: expected {layout.expected}, got {shortened(line)} "
                f"({error!r})"
            ) from None
        if title:
            items.setdefault(id, Document(id, title, ", ".join(genres)))
    if not items:
        raise ValueError(f"{path} holds no item with a title")
    return items


@dataclass(frozen=True)
class Ratings:
    """Columns of equal length (R,), in any order.

    Args:
        users, items: rows in the tables of users and of items.
        stars: the rating.
        times: when it was given.
    """

    users: np.ndarray
    items: np.ndarray
    stars: np.ndarray
    times: np.ndarray


def read_ratings(root, items: dict[str, Document]) -> tuple[Ratings, list[str]]:
    """Ratings of the given items, and the ids of their users.

    Raises:
        ValueError: a line is malformed, or no given item is rated.
    """
    (path, layout), users = layout_of(root), {}
    item_rows = {id: row for row, id in enumerate(items)}
    columns = array("q"), array("q"), array("d"), array("q")
    for where, line in numbered_lines(path, layout.encoding):
        try:
            fields = line.split(layout.separator)
            if '"' in line and layout.separator == ",":
                (fields,) = csv.reader([line])
            user, item, stars, time = fields
            values = float(stars), int(time)
        except ValueError:
            if where.endswith(" line 1") and "rating" in line:
                continue  # a header
            raise ValueError(
                f"{where}: expected user, item, rating and timestamp with "
                f"{layout.separator!r} between them, got {shortened(line)}"
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


@dataclass(frozen=True)
class NextItems:
    """Examples (E,): each asks for one item that a user liked.

    Args:
        items: liked items, sorted by user and time.
        places: position in `items` of the item that the example asks for.
        starts: position where its history begins; the history ends before its place.
        users: user of the example.
        left: number of items that the user liked later: 0 is test, 1 is dev.
    """

    items: np.ndarray
    places: np.ndarray
    starts: np.ndarray
    users: np.ndarray
    left: np.ndarray


def next_items(ratings: Ratings) -> NextItems:
    """Make an example for each item that a user liked, except the first.

    Equal times keep the order of the ratings. If a user liked an item twice, only the
    first time counts: otherwise the query could name the item that it asks for.
    """
    liked = np.flatnonzero(ratings.stars >= LIKED)
    order = liked[np.lexsort((ratings.times[liked], ratings.users[liked]))]
    pairs = np.stack([ratings.users[order], ratings.items[order]])
    _, first = np.unique(pairs, axis=1, return_index=True)
    users, items = pairs[:, np.sort(first)]
    _, begin, count = np.unique(users, return_index=True, return_counts=True)
    begin, count = np.repeat(begin, count), np.repeat(count, count)  # by item
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
