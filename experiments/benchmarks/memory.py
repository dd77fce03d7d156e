"""Memory of a whole command that trains and indexes vectors in files.

    python -m experiments.benchmark memory --n=1000000 --dim=384

Draws a Gaussian mixture of N x D vectors (`experiments.benchmarks.data`) into a folder,
unless it is there, and runs `experiments.main` on it with the config of vectors, in a
process of its own. `peak_gib` is the largest RssAnon + RssShmem of that process, read
from /proc/PID/status every 50 ms: memory that the system cannot drop. Pages of mapped
files are `mapped_gib`. `formula_gib` is the peak by `experiments.run.memory`, which on
a CPU has the device's part. `results` are the cells that the command evaluated.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ehi.eval.provenance import git_commit, hardware, versions
from ehi.files import new_file
from experiments.benchmarks.data import gaussian_mixture
from experiments.configs import vectors
from experiments.run.dry_run import dry_run
from experiments.run.memory import plan_memory

CONFIG = "experiments/configs/vectors.py"
MEASURES = ("exact_recall@10", "ndcg@10", "docs_visited", "total_bytes_per_doc")
_INTERVAL = 0.05  # seconds between two readings
GIB = 2**30


def add_arguments(command) -> None:
    """Add the options of `memory`."""
    command.add_argument("--n", type=int, default=50_000, help="documents")
    command.add_argument("--dim", type=int, default=128)
    command.add_argument("--queries", type=int, default=2000)
    command.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    command.add_argument("--systems", nargs="+", default=["kmeans-tree-opq", "ehi-pq"])
    command.add_argument(
        "--budgets", nargs="+", default=["visit-1-64x", "visit-2-64x", "visit-5-64x"]
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--folder", type=Path, help="for vectors and runs (TMPDIR)")
    command.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE",
        help="fields of the config, such as joint.steps=20",
    )  # fmt: skip


def benchmark_memory(args) -> dict:
    """Run the command once for each system, and compare its peak with the formula."""
    folder = Path(args.folder or tempfile.mkdtemp(prefix="ehi-memory-"))
    data = folder / f"mixture-{args.n}x{args.dim}-{args.dtype}-{args.seed}"
    draw(args, data)
    found = {}
    for system in args.systems:
        workdir = folder / f"run-{system}-{data.name}"
        fields = {"dataset": str(data), "systems": repr((system,)), "seed": args.seed}
        fields["budgets"] = repr(tuple(args.budgets))
        given = [f"--config.{name}={value}" for name, value in fields.items()]
        given += [f"--config.{field}" for field in args.set]
        command = [sys.executable, "-m", "experiments.main", f"--config={CONFIG}"]
        found[system] = watched([*command, *given, f"--workdir={workdir}"])
        found[system]["formula_gib"] = _formula(args, data, system)
        found[system]["results"] = list(_results(workdir / "results.jsonl"))
    return {
        "benchmark": "memory", "documents": args.n, "width": args.dim,
        "dtype": args.dtype, "set": args.set, "systems": found,
        "git_commit": git_commit(Path(__file__).parent), "versions": versions(),
        "hardware": hardware(),
    }  # fmt: skip


def draw(args, folder: Path) -> None:
    """Write documents.npy and queries.npy of a mixture, unless they are there."""
    shape, queries = (args.n, args.dim), folder / "queries.npy"
    if queries.exists():  # written last
        return
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / "documents.npy") as beside:
        with beside.with_suffix(".float32").open("w+b") as scratch:
            rows = np.memmap(scratch, np.float32, "w+", shape=shape)
            made = gaussian_mixture(
                *shape, num_queries=args.queries, seed=args.seed, out=rows
            )
            with beside.open("wb") as file:
                np.lib.format.write_array_header_1_0(
                    file,
                    {
                        "descr": np.lib.format.dtype_to_descr(np.dtype(args.dtype)),
                        "fortran_order": False, "shape": shape,
                    },
                )  # fmt: skip
                for start in range(0, args.n, 2**16):
                    part = np.asarray(rows[start : start + 2**16])
                    file.write(part.astype(args.dtype).tobytes())
        beside.with_suffix(".float32").unlink()
    with new_file(queries) as beside, beside.open("wb") as file:
        np.save(file, made.queries.astype(args.dtype))


def watched(command: list[str]) -> dict:
    """Run a command; return its exit code, its seconds and the peaks of its memory."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = {"peak_gib": 0, "mapped_gib": 0}
    try:
        while process.poll() is None:
            here = _memory(process.pid)
            held = here.get("RssAnon", 0) + here.get("RssShmem", 0)
            peaks["peak_gib"] = max(peaks["peak_gib"], held)
            peaks["mapped_gib"] = max(peaks["mapped_gib"], here.get("RssFile", 0))
            time.sleep(_INTERVAL)
    finally:
        process.kill()  # of no effect if it has ended
    if process.returncode:
        raise ValueError(f"the command ended with {process.returncode}: {command}")
    return {"seconds": round(time.monotonic() - started, 1)} | {
        name: round(peak / GIB, 3) for name, peak in peaks.items()
    }


def _memory(process: int) -> dict[str, int]:
    """Return the bytes of a process by the names of /proc/PID/status."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return {}
    fields = (line.split() for line in lines if line.startswith("Rss"))
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in fields}


def _formula(args, data: Path, system: str) -> float:
    """Return the GiB at the peak by the formula, with those of the CPU as device."""
    config = vectors.get_config()
    config.dataset = str(data)
    config.systems, config.budgets = (system,), tuple(args.budgets)
    with config.unlocked():
        for field in args.set:
            name, value = field.split("=", 1)
            old = config.to_dict()
            for part in name.split("."):
                old = old[part]
            config.update_from_flattened_dict({name: type(old)(value)})
    device = max((r.peak for r in dry_run(config, flops_per_second=1.0)), default=0)
    return round((plan_memory(config).peak + device) / GIB, 3)


def _results(path: Path):
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        yield {"budget": record["budget"]} | {
            name: record[name] for name in MEASURES if record.get(name) is not None
        }


def table(result: dict) -> str:
    """Return the peaks beside the formula, as a table."""
    lines = ["| system | peak GiB | formula GiB | seconds |", "|---|--:|--:|--:|"]
    for name, found in result["systems"].items():
        lines.append(
            f"| {name} | {found['peak_gib']:.3f} | {found['formula_gib']:.3f} | "
            f"{found['seconds']:.0f} |"
        )
    return "\n".join(lines)
