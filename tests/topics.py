"""A corpus of topics, and a config that trains every system on it in seconds."""

import json
from pathlib import Path

import numpy as np

from ehi.train.recipes import RECIPES
from experiments.configs import own

FIXTURES = Path(__file__).parent / "fixtures"
PHASES = tuple(RECIPES)

# The vocabulary of the tiny tower is letters: a topic is one, the rest is noise.
TOPICS, NOISE = "abcdefgh", "ijklmnopqrstuvwxyz"


def write_corpus(folder):
    """320 documents on 8 topics, 48 queries; train and test ask for other documents."""
    rng = np.random.default_rng(0)
    (folder / "qrels").mkdir(parents=True)

    def text(topic, words):
        drawn = rng.choice(list(NOISE), size=words)
        return " ".join(f"{TOPICS[topic]} {TOPICS[topic]} {word}" for word in drawn)

    with (folder / "corpus.jsonl").open("w") as file:
        for n in range(320):
            document = {"_id": f"d{n}", "title": text(n % 8, 1), "text": text(n % 8, 4)}
            document |= {"topic": TOPICS[n % 8], "metadata": {"n": n}}
            file.write(json.dumps(document) + "\n")
    with (folder / "queries.jsonl").open("w") as file:
        for n in range(48):
            file.write(json.dumps({"_id": f"q{n}", "text": text(n % 8, 3)}) + "\n")
    for split, queries in (("train", range(32)), ("test", range(32, 48))):
        lines = [f"q{n}\td{n}\t1" for n in queries]
        table = "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(table)
    return folder


def tiny(folder, **changes):
    """The config of `own.py` with a tiny tower and short phases, and the changes."""
    c = shrink(own.get_config())
    c.dataset = str(folder)
    c.budgets = ("flat", "flat-8x", "visit-50", "visit-50-8x")
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def shrink(c):
    """Any config with a tiny tower and short phases."""
    c.tower.name = str(FIXTURES / "minilm_tiny")
    c.tower.query_length = c.tower.document_length = 16
    c.head.hidden = 8
    c.tree.hidden = 8
    c.tree.branching = 8
    c.leaves.num_codewords = 16
    for phase in (c[name] for name in PHASES):
        phase.steps, phase.batch_size, phase.pool = 6, 16, 64
        phase.log_every, phase.checkpoint_every = 2, 4
    return c
