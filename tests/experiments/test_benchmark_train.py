"""The benchmark of the train step, on a tiny tower."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import train
from experiments.benchmarks.train import summary, take_turns
from experiments.run import flops

TOWER = Path(__file__).parent.parent / "fixtures" / "minilm_tiny"
SMALL = (
    "train", f"--model={TOWER}", "--batch=4", "--query-length=8",
    "--document-length=12", "--repeats=2", "--peak-flops=1e11",
)  # fmt: skip


def test_what_is_timed_counted_and_shown(monkeypatch, capsys):
    batches = []

    def make_peer(folder, *, dtype, rate, device):
        assert (Path(folder), dtype, device) == (TOWER, "float32", "cpu")
        return lambda batch: float(len(batches.append(batch) or batches))

    monkeypatch.setattr(train, "installed", lambda: True)
    monkeypatch.setattr(train, "make_peer", make_peer)
    monkeypatch.setattr(sys, "argv", ["benchmark", *SMALL])
    benchmark.main()
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    rows = found["steps"]
    assert list(rows) == ["tower", "whole", "sentence-transformers"]
    # The peer saw what ours did: a warm-up and two repeats.
    assert [b["documents_ids"].shape for b in batches] == [(4, 12)] * 3
    assert rows["tower"]["flops"] == rows["sentence-transformers"]["flops"]
    assert rows["tower"]["flops"] < rows["whole"]["flops"]
    for row in rows.values():
        seconds = row["step_ms"] / 1e3
        assert row["mfu"] == pytest.approx(row["flops"] / seconds / 1e11)
        assert row["examples_per_second"] == pytest.approx(4 / seconds)
    for name in ("tower", "whole"):
        assert rows[name]["host_ms"] > 0
        assert rows[name]["memory_bytes"]["temporaries"] > 0
    medians = [rows[name]["step_ms"] for name in rows]
    assert found["overhead"] == pytest.approx(medians[1] / medians[0] - 1)
    assert found["share"] == pytest.approx(1 - medians[0] / medians[1])
    assert found["ratio"] == pytest.approx(medians[2] / medians[0])
    assert found["peak_source"] == "stated"
    shown = captured.err
    assert "| whole |" in shown and "sentence-transformers over tower" in shown


def test_the_peer_computes_the_loss_of_ours():
    pytest.importorskip("sentence_transformers")
    from ehi.model.pretrained import resolve
    from ehi.parallel.mesh import make_mesh
    from experiments.benchmarks.train import Step

    args = SimpleNamespace(
        model=str(TOWER), batch=4, pool=0, query_length=8, document_length=12,
        dtype="float32",
    )  # fmt: skip
    pretrained = resolve(args.model)
    make = train.batch_maker(args, pretrained)
    ours = Step(args, pretrained, False, make_mesh())
    peer = train.make_peer(TOWER, dtype="float32", rate=1e-3)
    ours.compile(make(0))
    batch = make(0)
    first = peer(batch)
    assert first == pytest.approx(ours(batch), rel=1e-4)
    assert peer(batch) < first  # it learns


def test_a_loss_that_is_not_finite_stops_it():
    with pytest.raises(FloatingPointError, match="mine: the loss is nan"):
        take_turns({"mine": lambda batch: np.nan}, lambda number: number, 1)


def test_summary_by_hand():
    row = summary([1.0, 2.0, 3.0], examples=32, flops=8e9, peak=4e10)
    assert row["step_ms"] == 2000 and row["quartiles_ms"] == [1500, 2500]
    assert row["examples_per_second"] == 16
    assert row["mfu"] == pytest.approx(0.1)


def test_peaks_of_accelerators(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kinds = iter(["NVIDIA H200", "NVIDIA H100 PCIe", "TPU v5 lite", "Mystery 9"])
    device = lambda: [SimpleNamespace(device_kind=next(kinds))]  # noqa: E731
    monkeypatch.setattr(jax, "devices", device)
    peaks = [flops.peak_flops("float32")[0] for _ in range(3)]
    assert peaks == [989e12, 756e12, 197e12]
    with pytest.raises(ValueError, match="'Mystery 9' is not known.*--peak-flops"):
        flops.peak_flops("float32")
    assert flops.peak_flops("float32", 5.0) == (5.0, "stated")
