"""Synthetic collections in the formats of the paper configs, and their small runs."""

import json

import numpy as np
from topics import FIXTURES

LETTERS = "abcdefghijklmnopqrstuvwxyz"  # the vocabulary of the tiny towers


class Texts:
    """Texts on topics: a document repeats its two letters amid noise, queries ask."""

    def __init__(self, number, seed=0):
        self.rng = np.random.default_rng(seed)
        self.topics = self.rng.integers(26, size=(number, 2))

    def __len__(self):
        return len(self.topics)

    def text(self, row, words):
        own = [LETTERS[letter] for letter in self.topics[row]]
        noise = [LETTERS[letter] for letter in self.rng.integers(26, size=words)]
        return " ".join(f"{own[n % 2]} {word}" for n, word in enumerate(noise))

    def queries(self, split, number):
        """Id, text and answer of each query of a split."""
        rows = self.rng.permutation(len(self))[:number]
        return [(f"{split}{n}", self.text(row, 2), row) for n, row in enumerate(rows)]


def write_beir(folder, number, queries, splits=("train", "test")):
    """BEIR: SciFact, FiQA, NQ320k."""
    texts = Texts(number)
    (folder / "qrels").mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w") as file:
        for row in range(number):
            document = {"title": texts.text(row, 1), "text": texts.text(row, 5)}
            file.write(json.dumps({"_id": f"d{row}"} | document) + "\n")
    with (folder / "queries.jsonl").open("w") as file:
        for split in splits:
            asked = texts.queries(split, queries)
            for id, text, _ in asked:
                file.write(json.dumps({"_id": id, "text": text}) + "\n")
            judged = "".join(f"{id}\td{row}\t1\n" for id, _, row in asked)
            (folder / "qrels" / f"{split}.tsv").write_text(judged)
    return folder


def write_msmarco(folder, number, queries):
    """MS MARCO passages: collection, train and dev.small, and triples."""
    texts = Texts(number)
    folder.mkdir(parents=True)
    lines = (f"{row}\t{texts.text(row, 6)}\n" for row in range(number))
    (folder / "collection.tsv").write_text("".join(lines))
    for split in ("train", "dev.small"):
        asked = [(n, text, row) for n, (_, text, row) in enumerate(
            texts.queries(split, queries), start=0 if split == "train" else queries
        )]  # fmt: skip
        _write_asked(folder / f"queries.{split}.tsv", folder / f"qrels.{split}.tsv",
                     asked, "\t")  # fmt: skip
        if split == "train":
            draws = texts.rng.integers(number, size=(queries, 4))
            triples = (
                f"{id}\t{row}\t{negative}\n"
                for (id, _, row), some in zip(asked, draws, strict=True)
                for negative in some
            )
            (folder / "qidpidtriples.train.full.2.tsv").write_text("".join(triples))
    return folder


def write_msmarco_documents(folder, number, queries):
    """MS MARCO documents: the names and columns of their release."""
    texts = Texts(number)
    folder.mkdir(parents=True)
    with (folder / "msmarco-docs.tsv").open("w") as file:
        for row in range(number):
            title, body = texts.text(row, 1), texts.text(row, 8)
            file.write(f"D{row}\thttp://x/{row}\t{title}\t{body}\n")
    for split in ("train", "dev"):
        asked = [(f"{split}{n}", text, f"D{row}") for n, (_, text, row) in enumerate(
            texts.queries(split, queries)
        )]  # fmt: skip
        stem = f"msmarco-doc{split}"
        _write_asked(folder / f"{stem}-queries.tsv", folder / f"{stem}-qrels.tsv",
                     asked, " ")  # fmt: skip
    return folder


def _write_asked(queries, qrels, asked, separator):
    queries.write_text("".join(f"{id}\t{text}\n" for id, text, _ in asked))
    lines = (separator.join((str(id), "0", str(row), "1")) for id, _, row in asked)
    qrels.write_text("\n".join(lines) + "\n")


def write_ratings(folder, number, users, *, books=False):
    """MovieLens, or Amazon reviews: users like items of their letter."""
    texts = Texts(number)
    folder.mkdir(parents=True)
    with (folder / ("metadata.jsonl" if books else "movies.dat")).open("w") as file:
        for row in range(number):
            title, genre = texts.text(row, 2), LETTERS[texts.topics[row, 0]]
            item = {"asin": f"{row}", "title": title, "categories": [genre]}
            file.write(json.dumps(item) if books else f"{row}::{title}::{genre}")
            file.write("\n")
    separator = "," if books else "::"
    with (folder / ("ratings.csv" if books else "ratings.dat")).open("w") as file:
        for user in range(users):
            liked = np.flatnonzero(texts.topics[:, 0] == user % 26)
            for time, item in enumerate(texts.rng.permutation(liked)[:6]):
                fields = (user, item, 5.0 if books else 5, time)
                file.write(separator.join(map(str, fields)) + "\n")
    return folder


# Data set of a paper config -> how it is written, and its name in EHI_DATA.
WRITERS = {
    "beir/scifact": ("scifact", write_beir, {}),
    "beir/fiqa": ("fiqa", write_beir, {"splits": ("train", "dev", "test")}),
    "beir/nq320k": ("nq320k", write_beir, {}),
    "beir/msmarco": ("msmarco", write_msmarco, {}),
    "beir/msmarco-document": ("msmarco-document", write_msmarco_documents, {}),
    "movielens-1m": ("ml-1m", write_ratings, {}),
    "amazon-books": ("amazon-books", write_ratings, {"books": True}),
}


def write_data(c, folder, number=2000, queries=200):
    """Write the data set of a paper config into a folder for EHI_DATA, once."""
    name, write, options = WRITERS[c.dataset]
    if not (folder / name).exists():
        write(folder / name, number, queries, **options)


def small(c, *, steps=4, batch=16):
    """A paper config with a random tower of 2 layers, and sizes that fit it.

    Only sizes change: the tower, lengths, steps, batches, leaves, and budgets that the
    tower's 128 bytes can meet.
    """
    star = c.tower.name == "star"
    tower = "star_tiny" if star else "distilbert_tiny"
    c.tower.name = str(FIXTURES / tower)
    c.tower.query_length, c.tower.document_length = 8, 16
    for name in ("dense", "joint", "jpq", "poeem_warmup", "poeem"):
        phase = c[name]
        phase.steps = min(phase.steps, steps)
        phase.batch_size, phase.pool = batch, batch * (phase.pool // phase.batch_size)
        phase.chunk, phase.warmup = min(phase.chunk, 8), min(phase.warmup, 1)
        phase.refresh = min(phase.refresh, steps // 2)
        phase.top_k, phase.buffer = min(phase.top_k, 50), min(phase.buffer, 512)
        phase.log_every, phase.checkpoint_every = steps // 2, steps
    c.tree.branching = min(c.tree.branching, 16)
    quantised = [budget for budget in c.budgets if budget.endswith("x")]
    kept = [budget for budget in c.budgets if budget in ("flat", "visit-100")]
    small = [f"{budget.rpartition('-')[0]}-16x" for budget in quantised]
    c.budgets = tuple(kept + small)
    return c
