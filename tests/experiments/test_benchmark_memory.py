import argparse
import sys

import numpy as np
import pytest

from experiments.benchmarks.memory import (
    GIB,
    _formula,
    add_arguments,
    draw,
    table,
    watched,
)


def arguments(*given):
    command = argparse.ArgumentParser()
    add_arguments(command)
    return command.parse_args(["--n=3000", "--dim=32", "--queries=40", *given])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_mixture_is_drawn_once_into_files(tmp_path, dtype):
    args = arguments(f"--dtype={dtype}")
    draw(args, tmp_path / "data")
    found = {path.name: np.load(path) for path in (tmp_path / "data").iterdir()}
    assert {name: (x.shape, x.dtype.name) for name, x in found.items()} == {
        "documents.npy": ((3000, 32), dtype), "queries.npy": ((40, 32), dtype),
    }  # fmt: skip
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    draw(args, tmp_path / "data")
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_the_peak_is_that_of_private_memory(tmp_path):
    size = 200 * 2**20
    np.save(tmp_path / "x.npy", np.ones(size // 8))
    held = f"x = bytearray(b'x' * {size // 2}); time.sleep(0.5)"
    mapped = f"x = np.load({str(tmp_path / 'x.npy')!r}, 'r')\n"
    # Read for a while, since the system may drop mapped pages at any time.
    mapped += "end = time.time() + 1\nwhile time.time() < end: x.sum()"
    peaks = []
    for line in ("pass; time.sleep(0.5)", held, mapped):
        code = f"import time\nimport numpy as np\n{line}"
        peaks.append(watched([sys.executable, "-c", code]))
    idle, anonymous, file = (peak["peak_gib"] for peak in peaks)
    assert anonymous - idle > 0.9 * size / 2 / GIB  # b'x' * n and its copy
    assert file - idle < 0.02 < 0.1 < peaks[2]["mapped_gib"]
    with pytest.raises(ValueError, match="ended with 3"):
        watched([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_formula_grows_with_what_is_said_only(tmp_path, monkeypatch):
    from experiments.benchmarks import memory

    monkeypatch.setattr(memory, "dry_run", lambda *_, **__: [])  # its step is compiled
    args = arguments()
    draw(args, tmp_path / "data")
    small = _formula(args, tmp_path / "data", "kmeans-tree-opq")
    assert 0.85 < small < 1.2
    found = {"ehi-pq": {"peak_gib": 1.5, "formula_gib": 1.25, "seconds": 61.7}}
    assert "| ehi-pq | 1.500 | 1.250 | 62 |" in table({"systems": found})
