"""Building from shards in a child process: little memory, and a full disk."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ehi.index import open_index

_CHILD = """
import resource, signal, sys
import numpy as np
from ehi.index.stream import sorting
from ehi.index.stream import Shard, build_folder

sorting._BAND_BYTES, sorting._REGION_IDS = 2**22, 2**14
path, num, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
tree = {"kind": "per_node", "nodes": [rng.standard_normal((1, 64, 64))], "scale": 1.0}

def blocks():
    rng = np.random.default_rng(1)
    for _ in range(num // 5000):
        yield rng.standard_normal((5000, 64), np.float32)

def memory(field):
    with open("/proc/self/status") as file:
        return int([line for line in file if line.startswith(field)][0].split()[1])

if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
before = memory("VmRSS")
try:
    build_folder(path, [Shard(blocks, range(num))], tree=tree)
except OSError as error:
    print(error.errno, error)
else:
    print(memory("VmHWM") - before)
"""


def run_child(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, arguments)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_documents(tmp_path):
    sizes = (100_000, 400_000)
    peaks = [int(run_child(tmp_path / f"{size}", size, 0)) for size in sizes]  # KB
    grown = [open_index(tmp_path / f"{size}").index_bytes // 1024 for size in sizes]
    assert grown[1] - grown[0] > 70_000
    assert peaks[1] - peaks[0] < 10_000
    assert peaks[1] < 120_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits file sizes")
@pytest.mark.parametrize("limit", [10_000, 30_000, 300_000])
def test_a_full_disk_is_said_so_and_leaves_nothing(tmp_path, limit):
    said = run_child(tmp_path / "new", 20_000, limit)
    assert said.startswith(f"{errno.EFBIG} ") and "/new is as it was" in said
    assert not os.listdir(tmp_path)
