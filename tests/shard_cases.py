"""Encoding jobs of a few documents, for tests, their children and workers of Ray."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from flax import nnx
from tiny import WIDTH, make_model

from ehi.encode import shards
from ehi.encode.documents import DocumentEncoder
from ehi.encode.shards import EncodingJob
from ehi.model.tower import Tower

TESTS = Path(__file__).parent
NUM, SHARDS = 23, 4
DEADLY = (7, 21)


class Documents:
    """Letters of 1 to 9 words; slices of them are read as needed."""

    def __init__(self, num=NUM):
        rng = np.random.default_rng(0)
        self.texts = [
            " ".join(rng.choice(list("abcdefgh"), rng.integers(1, 10)))
            for _ in range(num)
        ]
        self.texts[7], self.texts[21] = "h g f e d c b a z z", "a b c d e f g h z z"

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, rows):
        return [SimpleNamespace(content=text) for text in self.texts[rows]]


def make_encoder(*, frozen=True):
    """A tiny model that nothing was fitted to, and its encoder."""
    tokenizer = TESTS / "fixtures" / "minilm_tiny" / "tokenizer.json"
    tower = None
    if frozen:
        tower = Tower(
            vocab_size=64, width=WIDTH, num_layers=1, num_heads=2, mlp_width=32,
            max_positions=16, type_vocab_size=2, rngs=nnx.Rngs(1),
        )  # fmt: skip
    graphdef, params = make_model(None, None, tower=not frozen, fitted=False)
    length = 16 if frozen else 12
    return (graphdef, params), DocumentEncoder(
        graphdef, params, tower=tower, tokenizer_file=tokenizer, length=length,
        num_documents=NUM, spill=2,
    )  # fmt: skip


def make_job(folder, encode=None, **changes):
    """A job of NUM documents in SHARDS shards; None makes the real encoder."""
    documents = Documents()
    if encode is None:
        _, encode = make_encoder()
    fields = {
        "folder": Path(folder),
        "num_shards": SHARDS,
        "documents": documents,
        "ids": [f"d{n}" for n in range(NUM)],
        "encode": encode,
        "identity": {"parameters": "abc", "corpus": "def"},
    }
    return EncodingJob(**fields | changes)


def slow_job(folder, seconds):
    """The real job, whose blocks of 4 documents take a while."""
    shards.ROWS = 4
    job = make_job(folder)

    def encode(texts):
        time.sleep(seconds)
        return job.encode(texts)

    return replace(job, encode=encode)


def lengths(texts):
    """Stand-in for an encoder."""
    sizes = np.array([[len(text)] for text in texts])
    return {
        "embeddings": np.tile(sizes, 3).astype(np.float16),
        "leaves": (sizes % 2).astype(np.uint32),
    }


def deadly_job(folder):
    """One document kills the process that encodes it, another one raises."""
    kills, raises = (Documents().texts[row] for row in DEADLY)

    def encode(texts):
        if kills in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        if raises in texts:
            raise RuntimeError("no such word")
        return lengths(texts)

    return make_job(folder, encode)


def say_pid_and_load(folder, seconds):
    """`slow_job` in a worker that can be killed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pid").write_text(str(os.getpid()))
    return slow_job(folder, seconds)


def bytes_of(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def read(job, number, name):
    return np.load(job.path(number) / f"{name}.npy")
