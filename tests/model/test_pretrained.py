"""Checkpoints: reference outputs of five architectures, tensor names, hashes."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ehi.model.pretrained import load_tower, resolve, save_float16

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = ["bert_tiny", "distilbert_tiny", "minilm_tiny", "roberta_tiny", "star_tiny"]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def bert_copy(tmp_path):
    return Path(shutil.copytree(FIXTURES / "bert_tiny", tmp_path / "bert_tiny"))


@pytest.fixture
def star_copy(tmp_path):
    return Path(shutil.copytree(FIXTURES / "star_tiny", tmp_path / "star_tiny"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


@jax.jit
def call(tower, ids, mask):
    return tower(ids, mask)


def run(tower, reference):
    return call(tower, reference["ids"], reference["mask"])


def outputs(folder, pooling):
    tower = load_tower(resolve(folder))
    tower.pooling = pooling
    return run(tower, np.load(FIXTURES / "bert_tiny" / "reference.npz"))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_outputs_equal_those_of_transformers(name, pooling):
    reference = np.load(FIXTURES / name / "reference.npz")
    tower = load_tower(resolve(FIXTURES / name))
    tower.pooling, tower.normalise = pooling, False
    vectors = run(tower, reference)
    np.testing.assert_allclose(vectors, reference[pooling], atol=2e-5)


def test_minilm_equals_sentence_embeddings():
    try:
        minilm = resolve(MINILM)
    except OSError as error:
        pytest.skip(f"weights of {MINILM} cannot be had here: {error}")
    reference = np.load(FIXTURES / "minilm_l6.npz")
    tower = load_tower(minilm)
    vectors = run(tower, reference)
    np.testing.assert_allclose(vectors, reference["embeddings"], atol=2e-6)
    half = run(load_tower(minilm, dtype=jnp.bfloat16), reference)
    assert (np.sum(half * vectors, axis=1) > 0.999).all()
    assert (minilm.max_length, tower.pooling, tower.normalise) == (256, "mean", True)


def test_sentence_transformers_modules_are_read():
    found = resolve(FIXTURES / "minilm_tiny")
    assert (found.config["pooling"], found.config["normalise"]) == ("cls", True)
    assert (found.name, found.max_length) == ("minilm_tiny", 24)
    plain = resolve(FIXTURES / "bert_tiny")
    assert (plain.config["pooling"], plain.config["normalise"]) == ("mean", True)
    assert plain.max_length == 40


def test_pooling_name_of_later_releases(tmp_path):
    folder = shutil.copytree(FIXTURES / "minilm_tiny", tmp_path / "m")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    config = resolve(folder).config
    assert (config["pooling"], config["normalise"]) == ("mean", False)


@pytest.mark.parametrize("change", ["no_prefix", "gamma_beta"])
def test_other_spellings_of_tensor_names(bert_copy, change):
    def rename(name):
        if change == "no_prefix":
            return name.removeprefix("bert.")
        return name.replace("Norm.weight", "Norm.gamma").replace(
            "Norm.bias", "Norm.beta"
        )

    edit_tensors(bert_copy, lambda tensors: {rename(k): v for k, v in tensors.items()})
    expected = outputs(FIXTURES / "bert_tiny", "mean")
    np.testing.assert_array_equal(outputs(bert_copy, "mean"), expected)


def test_missing_and_unknown_tensors_are_listed(bert_copy):
    def change(tensors):
        del tensors["bert.encoder.layer.1.output.dense.bias"]
        return tensors | {"bert.encoder.adapter.weight": np.zeros(3, np.float32)}

    edit_tensors(bert_copy, change)
    with pytest.raises(ValueError) as error:
        load_tower(resolve(bert_copy))
    assert "missing tensors ['encoder.layer.1.output.dense.bias']" in str(error.value)
    assert "unknown tensors ['encoder.adapter.weight']" in str(error.value)


def test_tensor_of_another_shape_is_refused(bert_copy):
    edit_json(bert_copy / "config.json", vocab_size=99)
    with pytest.raises(ValueError, match=r"embeddings.* \(100, 32\).*\(99, 32\)"):
        load_tower(resolve(bert_copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, r"'t5' .* not one of \['bert', .*vectors.py"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' .* only 'gelu'"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' .* only 'absolute'",
        ),
    ],
)
def test_other_architectures_are_refused(bert_copy, changes, message):
    edit_json(bert_copy / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        resolve(bert_copy)


def test_a_projection_says_how_to_pool():
    found = resolve(FIXTURES / "star_tiny")
    assert (found.config["pooling"], found.config["normalise"]) == ("cls", False)
    assert found.config["projection"]
    assert found.tokenizer_file.name == "vocab.json"
    # No token has the first two of the 42 positions.
    assert found.config["max_positions"] == found.max_length == 40
    assert load_tower(found).projection.norm.epsilon == 1e-5
    plain = resolve(FIXTURES / "roberta_tiny")
    assert (plain.config["pooling"], plain.config["normalise"]) == ("mean", True)
    assert load_tower(plain).projection is None


def test_modules_json_has_the_last_word_on_pooling(star_copy):
    for file in ("modules.json", "1_Pooling"):
        source = FIXTURES / "minilm_tiny" / file
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, star_copy / file)
    config = resolve(star_copy).config
    assert (config["pooling"], config["normalise"]) == ("cls", True)
    modules = json.loads((star_copy / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.CNN"
    (star_copy / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"'CNN'\] .* not supported"):
        resolve(star_copy)


@pytest.mark.parametrize("spelling", ["no_prefix", "classifier", "xlm"])
def test_other_spellings_of_roberta(star_copy, spelling):
    def change(tensors):
        if spelling == "no_prefix":
            return {k.removeprefix("roberta."): v for k, v in tensors.items()}
        more = ("classifier.dense.weight", "roberta.pooler.dense.bias", "lm_head.bias")
        return tensors | {name: np.zeros(3, np.float32) for name in more}

    edit_tensors(star_copy, change)
    if spelling == "xlm":
        edit_json(star_copy / "config.json", model_type="xlm-roberta")
    reference = np.load(FIXTURES / "star_tiny" / "reference.npz")
    vectors = run(load_tower(resolve(star_copy)), reference)
    np.testing.assert_allclose(vectors, reference["cls"], atol=2e-5)


def test_half_a_projection_and_that_of_another_type_are_refused(star_copy):
    edit_tensors(star_copy, lambda t: {k: v for k, v in t.items() if k != "norm.bias"})
    with pytest.raises(ValueError, match=r"missing tensors \['norm.bias'\]"):
        load_tower(resolve(star_copy))
    edit_json(star_copy / "config.json", model_type="bert")
    with pytest.raises(ValueError, match="unknown tensors .*'embeddingHead.bias'"):
        load_tower(resolve(star_copy))


def test_positions_from_another_padding_token_are_refused(star_copy):
    edit_json(star_copy / "config.json", pad_token_id=0)
    with pytest.raises(ValueError, match="pad_token_id 0 .* not supported, only 1"):
        resolve(star_copy)


def test_pickled_weights_are_not_read_but_the_way_out_is_named(star_copy):
    (star_copy / "model.safetensors").rename(star_copy / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError) as error:
        resolve(star_copy)
    assert "lacks model.safetensors: pytorch_model.bin there" in str(error.value)
    assert "weights_only=True" in str(error.value)


def test_known_name_with_other_weights_is_refused(tmp_path):
    folder = shutil.copytree(FIXTURES / "bert_tiny", tmp_path / MINILM)
    with pytest.raises(ValueError, match="has sha256 [0-9a-f]{64}, expected 53aa5117"):
        resolve(folder)


def test_float16_copy_carries_its_own_hash(tmp_path):
    source = resolve(FIXTURES / "minilm_tiny")
    folder = tmp_path / "half"
    save_float16(source, folder)
    half = resolve(folder)
    assert half.sha256 != source.sha256
    assert half.config == source.config
    np.testing.assert_allclose(
        outputs(folder, "mean"), outputs(source.folder, "mean"), atol=2e-3
    )
    with pytest.raises(FileExistsError):
        save_float16(source, folder)
    edit_tensors(folder, lambda t: {k: v * 2 for k, v in t.items()})
    with pytest.raises(ValueError, match=f"expected {half.sha256}"):
        resolve(folder)
