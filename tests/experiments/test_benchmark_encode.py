"""The benchmark of encoding, on a tiny tower."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from topics import FIXTURES

from ehi.model.pretrained import load_tower, resolve
from experiments import benchmark
from experiments.benchmarks import encode
from experiments.benchmarks.measure import peak_memory
from experiments.run.flops import text_flops

TOWER = FIXTURES / "minilm_tiny"
OURS, PADDED, PEER = "ours", "ours, a text a row", "sentence-transformers, batch 8"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_timed_counted_and_written(
    dtype, corpus, tmp_path, monkeypatch, capsys
):
    asked = []

    def peer_encoder(pretrained, texts, max_length, dtype):
        asked.append((pretrained.name, len(texts), max_length, dtype))
        return lambda size: np.ones((len(texts), pretrained.config["width"]))

    monkeypatch.setattr(encode, "installed", lambda: True)
    monkeypatch.setattr(encode, "peer_encoder", peer_encoder)
    path = tmp_path / "encode.json"
    command = [
        "encode", f"--model={TOWER}", f"--dataset={corpus}", "--num-texts=20",
        "--max-length=24", "--repeats=2", "--peer-batch-sizes=8", "--padded-rows",
        f"--dtype={dtype}", "--peak-flops=1e11", f"--json={path}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["benchmark", *command])
    benchmark.main()
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found == json.loads(path.read_text())
    assert asked == [("minilm_tiny", 20, 24, dtype)]
    assert (found["dataset"], found["texts"], found["dtype"]) == ("topics", 20, dtype)
    assert list(found["median_seconds"]) == [OURS, PADDED, PEER]
    for name, seconds in found["median_seconds"].items():
        assert found["texts_per_second"][name] == pytest.approx(20 / seconds)
        tokens = found["tokens_per_second"][name]
        assert tokens == pytest.approx(found["tokens"] / seconds)
        assert found["mfu"][name] == pytest.approx(found["flops"] / seconds / 1e11)
        memory = found["memory_mb"][name]
        assert memory.keys() == {"host", "device"} and memory["device"] is None
    assert found["peak_source"] == "stated"
    assert found["host_seconds"] > 0
    ratio = found["median_seconds"][PEER] / found["median_seconds"][OURS]
    assert (found["peer"], found["ratio"]) == (PEER, pytest.approx(ratio))
    assert "| ours, a text a row |" in captured.err and f"{PEER} over" in captured.err


def test_the_work_of_texts_is_that_of_their_own_tokens():
    pretrained = resolve(TOWER)
    width, hidden = (pretrained.config[name] for name in ("width", "mlp_width"))
    layers, lengths = pretrained.config["num_layers"], np.array([3, 12, 12, 24])
    linear = 4 * width**2 + 2 * width * hidden  # of a token: q, k, v, out; the MLP
    by_hand = 2 * layers * sum(n * linear + 2 * n**2 * width for n in lengths)
    for dtype in (jnp.float32, jnp.bfloat16):
        counted = text_flops(load_tower(pretrained, dtype=dtype), lengths)
        assert counted == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_peer_encodes_what_ours_does(dtype, apart):
    pytest.importorskip("sentence_transformers")
    texts, pretrained = ["a b c", "d e", "a a b f g h"] * 2, resolve(TOWER)
    tower = load_tower(pretrained, dtype=jnp.dtype(dtype))
    ours, _ = encode.our_encoder(pretrained, tower, texts, 16)
    peer = encode.peer_encoder(pretrained, texts, 16, dtype)(4)
    assert encode.lowest_cosine(ours(), peer) > 1 - apart


def test_host_time_is_of_the_same_shapes_without_the_tower():
    pretrained = resolve(TOWER)
    tower = load_tower(pretrained)
    ours, tokens = encode.our_encoder(pretrained, tower, ["a b", "c"], 16)
    zeros = encode.zeros_of_width(tower.width)
    for pack in (True, False):
        found = ours(pack=pack, tower=zeros)
        assert found.shape == ours(pack=pack).shape == (2, tower.width)
        assert not found.any()


def test_memory_of_the_host_and_of_the_device(monkeypatch):
    def run():
        return np.ones(2**22).sum()  # 32 MB

    found = peak_memory(run, torch=False)
    assert 30 < found["host"] < 64 and found["device"] is None
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**20})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert peak_memory(run, torch=False)["device"] == 3
    assert peak_memory(run, torch=True)["device"] is None  # of torch, not of jax


def test_lowest_cosine_by_hand():
    a = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert encode.lowest_cosine(a, a[:, ::-1]) == 0
    assert encode.lowest_cosine(a, 3 * a) == pytest.approx(1)
