"""A corpus that an experiment learns in seconds, and caches of its own."""

import json

import numpy as np
import pytest

# The vocabulary of the tiny tower is letters: a topic is one, the rest is noise.
TOPICS, NOISE = "abcdefgh", "ijklmnopqrstuvwxyz"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """320 documents on 8 topics, 48 queries; train and test ask for other documents."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data") / "topics"
    (folder / "qrels").mkdir(parents=True)

    def text(topic, words):
        drawn = rng.choice(list(NOISE), size=words)
        return " ".join(f"{TOPICS[topic]} {TOPICS[topic]} {word}" for word in drawn)

    with (folder / "corpus.jsonl").open("w") as file:
        for n in range(320):
            document = {"_id": f"d{n}", "title": text(n % 8, 1), "text": text(n % 8, 4)}
            file.write(json.dumps(document) + "\n")
    with (folder / "queries.jsonl").open("w") as file:
        for n in range(48):
            file.write(json.dumps({"_id": f"q{n}", "text": text(n % 8, 3)}) + "\n")
    for split, queries in (("train", range(32)), ("test", range(32, 48))):
        lines = [f"q{n}\td{n}\t1" for n in queries]
        table = "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(table)
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.getbasetemp() / "main-cache"
    monkeypatch.setenv("EHI_CACHE", str(cache))
