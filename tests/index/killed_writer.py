"""A writer that reports every operation it was promised, until it is killed.

python killed_writer.py FOLDER SEED WIDTH: one line to stdout before an operation and
one after it, as JSON. The parent kills it at a random moment.
"""

import json
import os
import random
import sys

import numpy as np

from ehi.index import open_index, save_index


def say(**line):
    os.write(1, (json.dumps(line) + "\n").encode())


def vector_of(version, width):
    """The embedding of a version of a document: what is found says which it is."""
    return np.random.default_rng(version).standard_normal(width).astype(np.float32)


def main(path, seed, width):
    rng = random.Random(seed)
    index = open_index(path)
    alive = set(index.contents.external_ids(np.arange(index.contents.num_rows)))
    if index.contents.deleted is not None:
        rows = np.flatnonzero(~index.contents.deleted)
        alive = set(index.contents.external_ids(rows))
    alive = {int(name) for name in alive}
    version = 10**6 * (seed + 1)
    say(ready=True)
    while True:
        step = rng.choice(["add", "delete", "update", "compact", "save"])
        ids, versions = [], []
        if step == "add":
            ids = rng.sample([i for i in range(400) if i not in alive], 5)
        elif step in ("delete", "update") and len(alive) > 30:
            ids = rng.sample(sorted(alive), 5)
        elif step in ("delete", "update"):
            continue
        if step in ("add", "update"):
            versions = list(range(version, version + len(ids)))
            version += len(ids)
        say(begin=step, ids=ids, versions=versions)
        vectors = [vector_of(v, width) for v in versions]
        if step == "add":
            index.add(np.stack(vectors), ids)
            alive |= set(ids)
        elif step == "delete":
            index.delete(ids)
            alive -= set(ids)
        elif step == "update":
            index.update(np.stack(vectors), ids)
        elif step == "compact":
            index.compact()
        else:
            save_index(index, path)
            index = open_index(path)
        say(end=step)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
