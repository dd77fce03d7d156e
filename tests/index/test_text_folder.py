"""Which folder the tower of an index comes from; errors name the file."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from text_cases import (
    FIXTURES,
    MINILM,
    TEXTS,
    copy_of,
    edit_json,
    edit_tensors,
    make_index,
    random_head,
)

import ehi
from ehi.index import build_index, open_index, save_index
from ehi.index.check import INSTALL
from ehi.index.text.checkpoint import weights_sha256
from ehi.index.text.encoder import KNOWN_SHA256, TowerNotFoundError, load_text_encoder
from ehi.index.text.tower import read_tower


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny checkpoint that a test may change."""
    return copy_of("bert_tiny", tmp_path)


def test_tower_named_relative_to_the_index_moves_with_it(folder, tmp_path):
    index = make_index("../bert_tiny", tower_sha256=weights_sha256(folder))
    save_index(index, tmp_path / "index")
    expected = load_text_encoder(open_index(tmp_path / "index"))(TEXTS)
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "index").rename(moved / "index")
    folder.rename(moved / "bert_tiny")
    found = load_text_encoder(open_index(moved / "index"))(TEXTS)
    np.testing.assert_array_equal(found, expected)


def test_tower_inside_the_index_folder_comes_first(folder, tmp_path):
    save_index(make_index("bert_tiny"), tmp_path / "index")
    with pytest.raises(TowerNotFoundError):
        load_text_encoder(open_index(tmp_path / "index"), cache_dir=tmp_path / "none")
    shutil.copytree(folder, tmp_path / "index" / "bert_tiny")
    load_text_encoder(open_index(tmp_path / "index"), cache_dir=tmp_path / "none")


def test_hub_ids_are_looked_up_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EHI_CACHE", str(tmp_path))
    index = make_index("owner/tiny")
    with pytest.raises(TowerNotFoundError, match=r"hf download owner/tiny") as missing:
        load_text_encoder(index)
    assert missing.value.name == "owner/tiny"
    cached = tmp_path / "models" / "owner--tiny"
    assert str(cached) in str(missing.value)
    shutil.copytree(FIXTURES / "bert_tiny", cached)
    found = load_text_encoder(index)(TEXTS)
    # An explicit tower replaces the named one.
    given = load_text_encoder(make_index("no/such"), tower=FIXTURES / "bert_tiny")
    np.testing.assert_array_equal(found, given(TEXTS))


def test_hub_ids_are_looked_up_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("EHI_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--owner--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("c0ffee")
    shutil.copytree(FIXTURES / "bert_tiny", model / "snapshots" / "c0ffee")
    load_text_encoder(make_index("owner/tiny"))
    # An incomplete snapshot does not count.
    (model / "snapshots" / "c0ffee" / "model.safetensors").unlink()
    with pytest.raises(TowerNotFoundError):
        load_text_encoder(make_index("owner/tiny"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c"])
def test_missing_folders_are_no_hub_ids(name):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_text_encoder(make_index(name))


def test_index_of_bare_embeddings_says_that_it_has_no_encoder():
    index = build_index(np.eye(4, dtype=np.float32), range(4), tree=None)
    with pytest.raises(ValueError, match="does not name its text encoder"):
        load_text_encoder(index)


# Files


def test_other_weights_are_refused(folder, tmp_path):
    sha256 = weights_sha256(folder)
    load_text_encoder(make_index(folder, tower_sha256=sha256))
    with pytest.raises(ValueError, match="bert_tiny.*built with 000000000000"):
        load_text_encoder(make_index(folder, tower_sha256="0" * 64))
    # If the index states no sha256, the known one still applies.
    cached = tmp_path / "models" / MINILM.replace("/", "--")
    shutil.copytree(folder, cached)
    with pytest.raises(ValueError, match=f"expected are {KNOWN_SHA256[MINILM][:12]}"):
        load_text_encoder(make_index(MINILM), cache_dir=tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_and_damaged_files_are_named(folder, file):
    path = folder / file
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"[]", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=file):
            load_text_encoder(make_index(folder))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder} lacks {file}"):
        load_text_encoder(make_index(folder))


def test_pickled_weights_are_not_read_but_the_way_out_is_named(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin .* is a pickle"):
        load_text_encoder(make_index(folder))


@pytest.mark.parametrize("damage", [b"", b"\xff" * 9, b"#version: 0.2\nno such\n"])
def test_damaged_merges_are_named(tmp_path, damage):
    folder = Path(shutil.copytree(FIXTURES / "star_tiny", tmp_path / "star_tiny"))
    whole = (folder / "merges.txt").read_bytes()
    (folder / "merges.txt").write_bytes(damage or whole[: len(whole) // 2] + b" ")
    with pytest.raises(ValueError, match="vocab.json cannot be read"):
        load_text_encoder(make_index(folder))
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="lacks tokenizer.json"):
        load_text_encoder(make_index(folder))


def test_half_a_projection_is_refused(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "star_tiny", tmp_path / "star_tiny"))
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != "norm.bias"})
    with pytest.raises(ValueError, match=r"missing tensors \['norm.bias'\]"):
        read_tower(folder)
    edit_json(folder / "config.json", model_type="bert")
    with pytest.raises(ValueError, match="unknown tensors .*'embeddingHead.bias'"):
        read_tower(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, r"'t5' .* not one of \['bert', .*vectors.py"),
        ({"model_type": "roberta", "pad_token_id": 0}, "pad_token_id 0 .* only 1"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' .* only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute'"),
        ({"hidden_size": None}, "hidden_size None in .*config.json"),
        ({"num_attention_heads": 5}, "width 32 .* no multiple of 5 heads"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps 'x' in .*config.json"),
        ({"vocab_size": 99}, r"word_embeddings.*\(100, 32\).*implies \(99, 32\)"),
        ({"num_hidden_layers": 3}, r"safetensors .*missing tensors .*layer\.2\."),
        ({"num_hidden_layers": 1}, r"unknown tensors .*layer\.1\."),
    ],
)
def test_other_configurations_are_refused(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_text_encoder(make_index(folder))


def test_other_modules_and_poolings_are_refused(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "minilm_tiny", tmp_path / "m"))
    (folder / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode": "weightedmean"}'
    )
    with pytest.raises(ValueError, match=r"\['weightedmean'\].*1_Pooling/config.json"):
        read_tower(folder)
    (folder / "modules.json").write_text('[{"type": "x.Transformer"}]')
    with pytest.raises(ValueError, match=r"\['Transformer'\].*modules.json"):
        read_tower(folder)


def test_tensors_of_other_types_are_refused(folder):
    edit_tensors(
        folder,
        lambda tensors: {k: v.astype(np.int32) for k, v in tensors.items()},
    )
    with pytest.raises(ValueError, match="model.safetensors has type I32"):
        read_tower(folder)


def test_tokeniser_of_another_tower_is_refused(folder):
    words = load_file(folder / "model.safetensors")[
        "bert.embeddings.word_embeddings.weight"
    ]
    edit_tensors(
        folder,
        lambda t: t | {"bert.embeddings.word_embeddings.weight": words[:4].copy()},
    )
    edit_json(folder / "config.json", vocab_size=4)
    encode = load_text_encoder(make_index(folder))
    with pytest.raises(ValueError, match="word table of 4 rows: tokenizer.json"):
        encode(["a b c"])


@pytest.mark.parametrize("length", [0, 2, -1, 41, 10**12, "8", 8.0, None, True])
def test_query_lengths_out_of_range_are_refused(length):
    with pytest.raises(ValueError, match=r"allowed are 3\.\.40"):
        load_text_encoder(make_index(FIXTURES / "bert_tiny", query_length=length))


def test_heads_that_do_not_fit_are_refused():
    tower, head = FIXTURES / "bert_tiny", random_head(32, 16, 8)
    for spoiled, message in (
        (head | {"projection": head["projection"][:9]}, r"projection.*\(9, 16\).*"),
        (head | {"b_in": head["b_in"][:7]}, r"w_in.*\(32, 8\)"),
        (head | {"other": head["b_in"]}, "arrays .*'other'"),
        ({"w_in": head["w_in"]}, r"arrays \['w_in'\]"),
        (None, "the tower has width 32, the index 16"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text_encoder(make_index(tower, head=spoiled, width=16))


# What is not installed


@pytest.mark.parametrize("library", ["tokenizers", "safetensors"])
def test_a_missing_library_gives_the_install_line(monkeypatch, library):
    found = importlib.util.find_spec

    def absent(name):
        return None if name == library else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    index = make_index(FIXTURES / "bert_tiny")
    said = f"needs {library}.*pip install numpy threadpoolctl tokenizers safetensors &&"
    with pytest.raises(ImportError, match=said):
        index.search_text("a")
    index.search(np.eye(32)[:1])  # vectors do not need it


def test_the_install_line_is_that_of_the_readme():
    readme = (FIXTURES.parents[1] / "README.md").read_text()
    assert f"    {INSTALL}" in readme


def test_fit_without_jax_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "ehi.api", raising=False)
    with pytest.raises(ImportError, match="flax is not installed: .*install .`; the l"):
        ehi.fit  # noqa: B018
