"""Trained towers are saved as checkpoint folders, and read back."""

import os
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from ehi.model.pretrained import load_tower, resolve, save_tower

FIXTURES = Path(__file__).parent.parent / "fixtures"


TINY = ["bert_tiny", "distilbert_tiny", "minilm_tiny", "roberta_tiny", "star_tiny"]


@pytest.mark.parametrize("name", TINY)
def test_a_saved_tower_is_read_back_as_it_was(name, tmp_path):
    pretrained = resolve(FIXTURES / name)
    tower = load_tower(pretrained)
    flat = {
        "/".join(map(str, path)): np.asarray(value[...]) + 0.01
        for path, value in nnx.to_flat_state(nnx.state(tower, nnx.Param))
    }
    save_tower(pretrained, flat, tmp_path / "tower")
    save_tower(pretrained, flat, tmp_path / "tower")  # replaces
    again = resolve(tmp_path / "tower")
    assert again.sha256 != pretrained.sha256
    assert again.config == pretrained.config
    loaded = nnx.to_flat_state(nnx.state(load_tower(again), nnx.Param))
    assert len(loaded) == len(flat)
    for path, value in loaded:
        assert np.array_equal(value[...], flat["/".join(map(str, path))])


def test_a_tower_comes_back_where_another_cannot_replace_it(tmp_path, monkeypatch):
    pretrained = resolve(FIXTURES / "bert_tiny")
    flat = {
        "/".join(map(str, path)): np.asarray(value[...])
        for path, value in nnx.to_flat_state(nnx.state(load_tower(pretrained)))
    }
    save_tower(pretrained, flat, tmp_path / "tower")
    before, rename = resolve(tmp_path / "tower").sha256, os.replace
    moves = []

    def failing(source, target):
        moves.append(target)
        if len(moves) == 2:  # the old folder has been moved, the new one not yet
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        save_tower(pretrained, {n: v + 1 for n, v in flat.items()}, tmp_path / "tower")
    assert resolve(tmp_path / "tower").sha256 == before
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]


def test_an_untrained_tower_is_saved_as_it_came(tmp_path):
    # The same names, and the two positions that no token has.
    pretrained = resolve(FIXTURES / "star_tiny")
    flat = {
        "/".join(map(str, path)): np.asarray(value[...])
        for path, value in nnx.to_flat_state(nnx.state(load_tower(pretrained)))
    }
    save_tower(pretrained, flat, tmp_path / "tower")
    saved = load_file(tmp_path / "tower" / "model.safetensors")
    source = load_file(pretrained.folder / "model.safetensors")
    assert saved.keys() == source.keys()
    assert all(np.array_equal(saved[name], source[name]) for name in source)
