"""Prefixes, pooling, Dense layers and normalisation: the same in JAX and in NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from text_cases import FIXTURES, copy_of, make_index

from ehi.data.tokens import tokenise, tokenizer_sha256
from ehi.index.text.checkpoint import weights_sha256
from ehi.index.text.encoder import load_text_encoder
from ehi.index.text.settings import POOLINGS, read_prefixes
from ehi.index.text.tower import read_tower

PROMPTS = {"query": "query: ", "passage": "passage: "}
ROWS = [[2, 4, 5, 9, 3], [2, 3], [2, 7, 7, 30, 8, 6, 3], [2, 11, 3]]


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny checkpoint that has modules.json."""
    return copy_of("minilm_tiny", tmp_path)


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def add_dense(folder, widths=(32, 20, 24), *, bias=True, activation="Tanh"):
    """Put Dense layers between the pooling and the normalisation."""
    rng = np.random.default_rng(3)
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    for i, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        place = f"{i + 2}_Dense"
        kind = "sentence_transformers.models.Dense"
        modules.insert(-1, {"idx": i + 2, "path": place, "type": kind})
        config = {
            "in_features": inputs,
            "out_features": outputs,
            "bias": bias,
            "activation_function": f"torch.nn.modules.activation.{activation}",
        }
        write_json(folder / place / "config.json", config)
        tensors = {"linear.weight": rng.normal(size=(outputs, inputs)) / 6}
        if bias:
            tensors["linear.bias"] = rng.normal(size=outputs)
        tensors = {name: x.astype(np.float32) for name, x in tensors.items()}
        save_file(tensors, folder / place / "model.safetensors")
    write_json(path, modules)


def jax_outputs(folder, rows, **settings):
    pytest.importorskip("jax")
    from ehi.model.pretrained import load_tower, resolve

    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return np.asarray(load_tower(resolve(folder, **settings))(ids, mask))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings_are_those_of_sentence_transformers(pooling):
    folder = FIXTURES / "e5_tiny"
    prefixes = dict(zip(("query", "document"), read_prefixes(folder), strict=True))
    with np.load(folder / "reference.npz") as reference:
        texts = reference["texts"].tolist()
        for side, prefix in prefixes.items():
            expected = reference[f"{pooling}_{side}"]
            tokens = tokenise(
                texts, tokenizer_file=folder / "tokenizer.json", max_length=24,
                cache_dir=None, name=side, prefix=prefix,
            )  # fmt: skip
            ids, mask = tokens.pad(np.arange(len(texts)), 24)
            rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
            found = read_tower(folder, pooling=pooling)(rows)
            np.testing.assert_allclose(found, expected, atol=1e-5)
            found = jax_outputs(folder, rows, pooling=pooling)
            np.testing.assert_allclose(found, expected, atol=1e-5)
        index = make_index(
            folder, query_length=24, width=24, pooling=pooling,
            query_prefix=prefixes["query"],
        )  # fmt: skip
        found = load_text_encoder(index)(texts)
        np.testing.assert_allclose(found, reference[f"{pooling}_query"], atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_and_dense_layers_are_those_of_jax(folder, pooling):
    add_dense(folder)
    settings = {"pooling": pooling, "normalise": pooling == "last"}
    found = read_tower(folder, **settings)(ROWS)
    assert found.shape == (4, 24)
    expected = jax_outputs(folder, ROWS, **settings)
    np.testing.assert_allclose(found, expected, atol=3e-6)
    norms = np.linalg.norm(found, axis=1)
    assert np.allclose(norms, 1) == (pooling == "last")


@pytest.mark.parametrize("activation", ["Identity", "ReLU"])
def test_dense_layers_without_bias(folder, activation):
    add_dense(folder, (32, 16), bias=False, activation=activation)
    found = read_tower(folder, normalise=False)(ROWS)
    plain = read_tower(FIXTURES / "minilm_tiny", normalise=False)(ROWS)
    expected = plain @ read_tower(folder).dense[0].weight.T
    expected = np.maximum(expected, 0) if activation == "ReLU" else expected
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    found_by_jax = jax_outputs(folder, ROWS, normalise=False)
    np.testing.assert_allclose(found_by_jax, expected, rtol=1e-5, atol=1e-5)


def test_a_tower_with_dense_layers_is_saved_and_read_back(folder, tmp_path):
    pytest.importorskip("jax")
    from flax import nnx

    from ehi.model.pretrained import load_tower, resolve, save_tower

    add_dense(folder)
    pretrained = resolve(folder)
    assert pretrained.width == load_tower(pretrained).width == 24
    state = nnx.to_flat_state(nnx.state(load_tower(pretrained)))
    params = {"/".join(map(str, path)): np.array(x[...]) for path, x in state}
    params["dense/1/linear/bias"] += 1
    save_tower(pretrained, params, tmp_path / "saved")
    saved = read_tower(tmp_path / "saved")
    np.testing.assert_array_equal(
        saved.dense[1].bias, read_tower(folder).dense[1].bias + 1
    )
    np.testing.assert_array_equal(
        saved.dense[0].weight, read_tower(folder).dense[0].weight
    )
    # The identity of the weights covers those of Dense layers.
    assert weights_sha256(tmp_path / "saved") != weights_sha256(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": 31}, "width 31, but those before it have width 32"),
        ({"out_features": 0}, "out_features 0 .* no positive number"),
        ({"out_features": 21}, r"linear.bias.*\(20,\).*\(21,\)|weight.*\(20, 32\)"),
        ({"activation_function": "torch.nn.Mish"}, "'Mish' .* is not one of"),
        ({"bias": False}, r"holds \['linear.bias', 'linear.weight'\], a Dense layer"),
    ],
)
def test_dense_layers_that_do_not_fit_are_refused(folder, change, message):
    add_dense(folder, (32, 20))
    path = folder / "2_Dense" / "config.json"
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(ValueError, match=message):
        read_tower(folder)


def test_a_missing_file_of_a_dense_layer_is_named(folder):
    add_dense(folder, (32, 20))
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2_Dense/model.safetensors"):
        read_tower(folder)


def test_prompts_become_prefixes(folder):
    path = folder / "config_sentence_transformers.json"
    assert read_prefixes(folder) == ("", "")
    write_json(path, {"prompts": PROMPTS, "default_prompt_name": None})
    assert read_prefixes(folder) == ("query: ", "passage: ")
    write_json(path, {"prompts": {"all": "text: "}, "default_prompt_name": "all"})
    assert read_prefixes(folder) == ("text: ", "text: ")
    write_json(path, {"prompts": {"query": "q: "}, "default_prompt_name": "query"})
    assert read_prefixes(folder) == ("q: ", "")
    write_json(path, {"prompts": PROMPTS | {"document": ""}})
    assert read_prefixes(folder) == ("query: ", "")
    write_json(path, {"prompts": {"query": 3}})
    with pytest.raises(ValueError, match="prompt 'query' .* is 3; it must be a text"):
        read_prefixes(folder)
    write_json(path, {"prompts": {}, "default_prompt_name": "query"})
    with pytest.raises(ValueError, match=r"'query' .* is not one of \[\]"):
        read_prefixes(folder)


def test_a_prefix_stands_before_every_text_and_is_part_of_every_key(folder):
    file = folder / "tokenizer.json"
    arguments = {"tokenizer_file": file, "max_length": 20, "name": "t"}
    made = {
        prefix: tokenise(["a b", ""], **arguments, cache_dir=None, prefix=prefix)
        for prefix in ("", "q: ", "p: ")
    }
    written = tokenise(["q: a b", "q:"], **arguments, cache_dir=None)
    np.testing.assert_array_equal(made["q: "].ids, written.ids)
    assert len({tokens.key for tokens in made.values()}) == 3
    plain = tokenise(["a b", ""], **arguments, cache_dir=None)
    assert made[""].key == plain.key
    assert len({tokenizer_sha256(file, prefix) for prefix in made}) == 3


def test_an_index_states_prefix_pooling_and_norm(folder):
    # Not what the files say, but what the index was built with.
    path = folder / "config_sentence_transformers.json"
    write_json(path, {"prompts": PROMPTS})
    texts = ["a b", "c"]
    plain = load_text_encoder(make_index(folder))
    stated = load_text_encoder(make_index(folder, query_prefix="query: "))
    written = ["query: a b", "query: c"]
    np.testing.assert_array_equal(stated(texts), plain(written))
    assert not np.allclose(stated(texts), plain(texts))
    pooled = load_text_encoder(make_index(folder, pooling="max", normalise=False))
    assert (pooled.tower.pooling, pooled.tower.normalise) == ("max", False)
    for bad, message in (
        ({"query_prefix": 3}, "query_prefix is 3; it must be a text"),
        ({"pooling": "sum"}, "pooling 'sum' is not one of"),
        ({"normalise": "no"}, "normalise is 'no'; it must be true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text_encoder(make_index(folder, **bad))


def test_towers_of_dot_products_are_known(folder):
    pytest.importorskip("jax")
    from ehi.model.pretrained import compares_by_dot, resolve

    assert not compares_by_dot(resolve(folder))
    assert compares_by_dot(resolve(folder, normalise=False))
    assert compares_by_dot(resolve(FIXTURES / "star_tiny"))
    write_json(
        folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"}
    )
    assert not compares_by_dot(resolve(folder, normalise=False))


@pytest.mark.parametrize(
    ("name", "card", "wanted"),
    [
        ("e5-base-v2", None, ("query: ", "passage: ")),
        ("my_e5_small", None, ("query: ", "passage: ")),
        ("mine", "---\na: b\n---\n\n# E5-small\n", ("query: ", "passage: ")),
        ("bge-small-en-v1.5", None, ("Represent this sentence for searching", "")),
        ("minilm", "# all-MiniLM\n", None),
        ("gte-base", None, None),
    ],
)
def test_models_whose_card_asks_for_prefixes_are_known(tmp_path, name, card, wanted):
    pytest.importorskip("jax")
    from ehi.model.pretrained import missing_prefixes, resolve

    folder = copy_of("minilm_tiny", tmp_path).rename(tmp_path / name)
    if card:
        (Path(folder) / "README.md").write_text(card)
    found = missing_prefixes(resolve(folder))
    assert (found is None) == (wanted is None)
    if wanted:
        assert found[0].startswith(wanted[0]) and found[1] == wanted[1]
        assert missing_prefixes(resolve(folder, query_prefix="query: ")) is None
