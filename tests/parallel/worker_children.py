"""Starts `process_worker.py` in child processes and reads what they wrote."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

WORKER = Path(__file__).with_name("process_worker.py")
ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds; a child that takes longer hangs


def start(job: dict, devices: int = 1) -> subprocess.Popen:
    """One process of a job, with so many fake devices."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        # Threads of XLA's pool, by default one for each core. Two collectives of four
        # devices that wait at once block more threads than two cores have.
        "NPROC": "16",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    return subprocess.Popen(
        [sys.executable, str(WORKER), json.dumps(job)], env=env, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def start_two(job: dict) -> list[subprocess.Popen]:
    """Two processes of one device each; more devices hang on few cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    place = {"coordinator": address, "num_processes": 2}
    return [start(job | place | {"process_id": n}) for n in range(2)]


def finish(*children: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; a hanging one may ignore SIGTERM."""
    found = []
    try:
        for child in children:
            out, err = child.communicate(timeout=LIMIT)
            found.append((child.returncode, out, err))
    finally:
        for child in children:
            child.kill()
    return found


def run_one(job: dict, devices: int = 1) -> tuple[int, str, str]:
    return finish(start(job, devices))[0]


def run_two(job: dict) -> list[tuple[int, str, str]]:
    return finish(*start_two(job))


def lose_one(job: dict) -> tuple[int, str, float]:
    """Process 1 is lost: exit code and stderr of process 0, seconds that it took."""
    first, lost = start_two(job)
    try:
        assert lost.wait(timeout=LIMIT) == -9
        started = time.monotonic()
        code, _, err = finish(first)[0]
        return code, err, time.monotonic() - started
    finally:
        finish(lost)
        first.kill()


def losses(folder: Path, system: str) -> list[float]:
    """The loss of every step that was logged."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["run"] == system]


def end(folder: Path, system: str) -> dict[str, np.ndarray]:
    """The parameters at the end."""
    with np.load(folder / f"{system}.npz") as file:
        return dict(file)


def assert_same_bits(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
