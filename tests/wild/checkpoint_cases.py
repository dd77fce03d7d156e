"""Copies of tiny checkpoints to change, and their outputs by both stacks."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ehi.data.tokens import tokenise
from ehi.index.text.encoder import TextTokenizer, find_tokenizer
from ehi.index.text.tower import read_tower
from ehi.model.pretrained import load_tower, resolve

FIXTURES = Path(__file__).parents[1] / "fixtures"
# The vocabulary of the tiny towers is lower-case letters; '[UNK]' is anything else.
TEXTS = ["a b c", "hello", "z y x w v u t s r q p o n m l"]
LENGTH = 12


@jax.jit
def call(tower, ids, mask):
    return tower(ids, mask)


def by_numpy(folder, texts):
    tower = read_tower(folder)
    tokenizer = TextTokenizer(find_tokenizer(folder))
    tokenizer.cut_to(LENGTH)
    return tower(tokenizer(texts))


def by_jax(folder, texts):
    found = resolve(folder)
    tokens = tokenise(
        texts, tokenizer_file=found.tokenizer_file, max_length=LENGTH, cache_dir=None,
        name="texts",
    )  # fmt: skip
    ids, mask = tokens.pad(np.arange(len(texts)), LENGTH)
    return np.asarray(call(load_tower(found), ids, mask))


both_stacks = pytest.mark.parametrize("vectors", [by_numpy, by_jax])


def copy_of(name, folder):
    """A copy of a tiny checkpoint that a test may change."""
    return Path(shutil.copytree(FIXTURES / name, folder))


def edit_json(path, **changes):
    raw = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(raw | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


def edit_tokenizer(folder, change):
    raw = json.loads((folder / "tokenizer.json").read_text())
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def flat_parameters(tower):
    state = nnx.to_flat_state(nnx.state(tower, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in state}
