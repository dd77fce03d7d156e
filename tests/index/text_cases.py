"""Tiny checkpoints, indexes that name them, and their embeddings computed by JAX."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ehi.index import build_index
from ehi.index.text.encoder import find_tokenizer, open_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = ["bert_tiny", "distilbert_tiny", "minilm_tiny", "roberta_tiny", "star_tiny"]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# The tiny vocabularies have letters and punctuation.
TEXTS = ["a b c", "", "hello, world!", "z", " ".join("abcdefghijk" * 9), "q r s", "a b"]
QUESTIONS = [
    "How do I parse an ISO 8601 date string into a datetime object?",
    "Aspirin lowers the risk of colorectal cancer",
    "naïve café, 東京 and a 🦜 walk into a bar",
    "",
    "split a path into root and extension " * 12,
]


def make_index(tower, *, query_length=12, head=None, width=32, **identity):
    vectors = np.random.default_rng(0).normal(size=(20, width)).astype(np.float32)
    encoder = {"tower": str(tower), "query_length": query_length} | identity
    return build_index(vectors, range(20), tree=None, encoder=encoder, query_head=head)


def random_head(in_width, out_width, hidden):
    rng = np.random.default_rng(1)
    shapes = {
        "projection": (in_width, out_width),
        "w_in": (in_width, hidden),
        "b_in": (hidden,),
        "w_out": (hidden, out_width),
    }
    return {
        name: rng.normal(size=shape).astype(np.float32) / 4
        for name, shape in shapes.items()
    }


def jax_embeddings(folder, texts, length, head=None):
    """Embeddings as in training: padded tokens, `Tower` and `Head`."""
    jax = pytest.importorskip("jax")
    from flax import nnx

    from ehi.model import pretrained
    from ehi.model.head import Head
    from ehi.model.tower import unit_rows

    tokenizer = open_tokenizer(find_tokenizer(folder))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encodings = tokenizer.encode_batch(texts)
    ids = np.array([encoding.ids for encoding in encodings])
    mask = np.array([encoding.attention_mask for encoding in encodings], bool)
    tower = pretrained.load_tower(pretrained.resolve(folder))
    x = jax.jit(lambda tower, ids, mask: tower(ids, mask))(tower, ids, mask)
    if head is None:
        return np.asarray(unit_rows(x))  # the tower may or may not normalise
    module = Head(*head["projection"].shape, hidden=len(head["b_in"]), rngs=nnx.Rngs(0))
    for name, value in head.items():
        getattr(module, name)[...] = value
    return np.asarray(module(x))


def copy_of(name, folder):
    """A copy of a tiny checkpoint that a test may change."""
    return Path(shutil.copytree(FIXTURES / name, folder / name))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")
