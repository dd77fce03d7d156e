"""An index divided by document into several, and what these find merged again.

The whole index and its parts give the same answers: a document stands in one part with
all its copies, queries go to the same leaves of every part, and rows of the parts, one
after the other, are in the order of the whole, so that ties are broken as there. Scores
are equal but for rounding: a leaf cut into parts is multiplied in other shapes.
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from ehi.index.check import check_count, check_queries
from ehi.index.search import row_mask, search
from ehi.index.store import open_index, save_index
from ehi.index.topk import EMPTY, pack, unpack

SHARD = "shard"  # the entry of `Index.config` that says which part it is
_RERANK_VALUES = 2**22  # of stored vectors, read at once


def split_index(path, out_dir, shards):
    """Divides an index by document into folders with the same parameters and ids.

    Documents stay in their order: shard k of S has those numbered k N // S up to
    (k + 1) N // S, deleted ones not counted. Memory: that of `Index.compact`.

    Args:
        path: folder of the index, which stays as it is.
        out_dir: where `shard-00000-of-00004` and so on are written.
        shards: how many, 1 .. N.

    Returns:
        The folders, in order: list of Path.

    Raises:
        ValueError: more shards than documents.
        FileExistsError, OSError: as of `save_index`.
    """
    index, shards = open_index(path), check_count("shards", shards)
    contents = index.contents
    live = np.arange(contents.num_rows)
    if contents.deleted is not None:
        live = live[~contents.deleted]
    if shards > len(live):
        raise ValueError(f"{shards} shards of {len(live)} documents")
    sums = [entry["sha256"] for entry in contents.folder.files.values()]
    whole = hashlib.sha256("".join(sums).encode()).hexdigest()
    folders = []
    for number in range(shards):
        start, stop = (len(live) * k // shards for k in (number, number + 1))
        others = np.concatenate([live[:start], live[stop:]])
        shard = {"number": number, "count": shards, "of": whole}
        config = (index.config or {}) | {SHARD: shard}
        part = dataclasses.replace(
            index, config=config, contents=contents.without(others)
        )
        folder = Path(out_dir) / f"shard-{number:05d}-of-{shards:05d}"
        save_index(part, folder)
        folders.append(folder)
    return folders


def answer(index, queries, leaves, k, *, rerank=0, allow=None, deny=None, **settings):
    """What one shard finds, for `merge_answers`: name -> array.

    With `rerank`, that is as many candidates with both scores: which of them are
    scored again is known only when all shards have answered.

    Args:
        index: the Index of the shard.
        leaves: (N, b) where the queries go, of `route_queries`.
        queries, k, rerank, allow, deny, settings: as of `Index.search`.

    Returns:
        ids, scores, rows and visited, as in Hits, and 'rescored' (N, rerank) float32
        with `rerank`.

    Raises:
        ValueError: what `Index.search` refuses.
    """
    settings["mask"] = row_mask(index.contents, allow, deny)
    # Of no queries: refuses what an index refuses.
    search(index, index.contents, queries[:0], k, rerank=rerank, **settings)
    hits = search(
        index, index.contents, queries, rerank or k, leaves=leaves, **settings
    )
    names = ("scores", "rows", "visited")
    found = {name: getattr(hits, name) for name in names}
    found["ids"] = index.external_ids(hits.rows)
    if rerank:
        queries = check_queries(queries, index.width)
        found["rescored"] = np.empty(hits.rows.shape, np.float32)
        step = max(1, _RERANK_VALUES // (rerank * index.width))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            rows = np.maximum(hits.rows[part], 0)
            vectors = index.contents.rerank_vectors(rows)  # (n, r, D)
            scores = np.matmul(vectors, queries[part, :, None])[:, :, 0]
            found["rescored"][part] = scores
    return found


def merge_answers(answers, first_rows, k):
    """What all shards found together, best first, ties by row: fields of Hits.

    Args:
        answers: of `answer`, one a shard.
        first_rows: (shards,) where the rows of each start.
        k: results of a query.
    """
    rows = [
        np.where(found["rows"] < 0, -1, found["rows"] + first)
        for found, first in zip(answers, first_rows, strict=True)
    ]
    columns = {"rows": np.concatenate(rows, axis=1)}
    for name in ("ids", "scores", "rescored"):
        if name in answers[0]:
            columns[name] = np.concatenate([a[name] for a in answers], axis=1)
    candidates = answers[0]["rows"].shape[1]
    columns = _best(columns, columns["scores"], candidates)
    if "rescored" in columns:
        columns = _best(columns, columns.pop("rescored"), k)
    return columns | {"visited": sum(found["visited"] for found in answers)}


def _best(columns, scores, k):
    """The k best columns of every array (N, c) by score, then by row."""
    rows = columns["rows"]
    keys = np.where(rows < 0, EMPTY, pack(scores, np.maximum(rows, 0)))
    order = np.argsort(keys, axis=1)[:, :k]
    best = {
        name: np.take_along_axis(values, order, axis=1)
        for name, values in columns.items()
    }
    best["scores"] = unpack(np.take_along_axis(keys, order, axis=1))[0]
    return best
