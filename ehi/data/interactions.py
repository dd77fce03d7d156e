"""tfds builder of ratings: what a user liked last -> the item that they liked next.

A query is the titles of the last `HISTORY` items that a user rated at least `LIKED`
before the one that is asked for; a document is the title and the genres of an item. The
last item of a user is asked for in 'test', the one before in 'dev', all earlier ones
but the first in 'train'. So test asks for documents that train asks for too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tensorflow_datasets as tfds

from ehi.data.prepared import Document, RetrievalBuilder
from ehi.data.ratings import Ratings, read_items, read_ratings

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
