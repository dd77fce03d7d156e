"""Speed of the train step whose tower trains, beside sentence-transformers.

    python -m experiments.benchmark train --batch=32 --json=FILE

Three steps take turns on the same random tokens of full length: `tower`, our encoder,
head and contrastive loss; `whole`, the same with tree, residual PQ leaves, learned
rotation and every loss of ehi-pq; and the peer, where it is installed, on the tower
alone. A repeat waits for its result.

  examples/s          queries of a step / seconds, each with its document
  MFU                 F / (seconds x devices x peak), F = 2 x the multiplications of all
                      matrix products of a step, forward and backward, recomputation
                      included, counted in our jaxpr; the peer's F is that of `tower`
  peak                of a GPU or TPU the bfloat16 rate in `flops.PEAKS`, float32 steps
                      included; of a CPU the best of square products of the type
  overhead, share     whole / tower - 1 and 1 - tower / whole, of the medians
  ratio               peer / tower, of the medians
  cpu_overhead, cpu_ratio   the same of CPU seconds of all threads, which others on
                      the machine disturb less
  host ms             median time of a call of the step that nobody waits for: what
                      Python costs, if the device is asynchronous. `batch_ms` is the
                      making of the batch in NumPy and its copy to the device.
  memory              of the compiled step, on one device
"""

import statistics
import time
from pathlib import Path

import jax
import numpy as np

from ehi.eval.provenance import git_commit, hardware, versions
from ehi.model.pretrained import resolve
from ehi.train.mesh import make_mesh, shard_batch
from experiments import benchmark_step as steps
from experiments import benchmark_train_peer as peers
from experiments.flops import count_flops, peak_flops

CALLS = 4  # of a step in a row that nobody waits for
PACKAGES = ("jax", "flax", "optax", "torch", peers.PEER)


class Step:
    """One of our jitted steps, its state, and what its compilation says."""

    def __init__(self, args, pretrained, whole: bool, mesh):
        self.step, self.state = steps.make_step(args, pretrained, whole, mesh)
        self.tables = steps.make_tables(pretrained, mesh)
        self.mesh, self.key = mesh, jax.random.key(0)

    def compile(self, batch) -> dict:
        """FLOPs of a step on all devices, and bytes on one."""
        batch = shard_batch(self.mesh, batch)
        traced = self.step.trace(self.state, self.tables, batch, self.key)
        self.compiled = traced.lower().compile()
        memory = self.compiled.memory_analysis()
        return {
            "flops": count_flops(traced.jaxpr.jaxpr),
            "memory_bytes": {
                "arguments": memory.argument_size_in_bytes,
                "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
            },
        }

    def call(self, batch):
        """Start a step on a batch that is on the device; its metrics."""
        self.state, metrics = self.compiled(self.state, self.tables, batch, self.key)
        return metrics

    def __call__(self, batch) -> float:
        """The loss of a step on a NumPy batch."""
        return float(self.call(shard_batch(self.mesh, batch))["loss"])

    def host_seconds(self, batch) -> float:
        """Median time of a call when nobody waits for its result."""
        batch, seconds = shard_batch(self.mesh, batch), []
        jax.block_until_ready((batch, self.state))
        for _ in range(CALLS):
            started = time.perf_counter()
            self.call(batch)
            seconds.append(time.perf_counter() - started)
        jax.block_until_ready(self.state)
        return statistics.median(seconds)


def add_arguments(command) -> None:
    """The command line of `train`."""
    steps.add_arguments(command)
    command.add_argument(
        "--peak-flops", type=float, help="FLOP/s of a device, where it is not known"
    )
    command.add_argument("--no-peer", action="store_true")


def benchmark_train(args) -> dict:
    """Time the steps in turn; the first call of each, which compiles, apart."""
    pretrained, mesh = resolve(args.model), make_mesh()
    make = steps.batch_maker(args, pretrained)
    ours = {k: Step(args, pretrained, k == "whole", mesh) for k in steps.KINDS}
    compiled = {name: step.compile(make(0)) for name, step in ours.items()}
    runs = dict(ours)
    if peers.installed() and not args.no_peer:
        device = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        runs[peers.PEER] = peers.make_peer(
            pretrained.folder, dtype=args.dtype, device=device,
            rate=steps.RATES["tower"],
        )  # fmt: skip
        compiled[peers.PEER] = {"flops": compiled["tower"]["flops"]}
    batch = make(0)
    first_loss = {name: run(batch) for name, run in runs.items()}
    wall, cpu = take_turns(runs, make, args.repeats)
    peak, source = peak_flops(args.dtype, args.peak_flops)
    rows = {
        name: compiled[name]
        | summary(wall[name], args.batch, compiled[name]["flops"], peak * mesh.size)
        | {"first_loss": first_loss[name]}
        for name in runs
    }
    for name, step in ours.items():
        rows[name]["host_ms"] = 1e3 * step.host_seconds(batch)
    medians = {name: statistics.median(values) for name, values in wall.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu.items()}
    tower, whole = (medians[name] for name in steps.KINDS)
    found = {
        "steps": rows,
        "overhead": whole / tower - 1,
        "cpu_overhead": cpu_medians["whole"] / cpu_medians["tower"] - 1,
        "share": 1 - tower / whole,
        "batch_ms": 1e3 * batch_seconds(make, mesh, args.repeats),
    }
    if peers.PEER in runs:
        found["peer"] = peers.PEER
        found["ratio"] = medians[peers.PEER] / tower
        found["cpu_ratio"] = cpu_medians[peers.PEER] / cpu_medians["tower"]
    names = ("model", "batch", "query_length", "document_length", "dtype", "repeats")
    return {name: getattr(args, name) for name in names} | found | {
        "devices": mesh.size,
        "peak_flops": peak,
        "peak_source": source,
        "hardware": hardware(),
        "git_commit": git_commit(Path(__file__).parent),
        "versions": versions(PACKAGES),
    }  # fmt: skip


def take_turns(runs, make, repeats: int):
    """Wall seconds and CPU seconds of every repeat, by name."""
    wall, cpu = ({name: [] for name in runs} for _ in range(2))
    for number in range(1, repeats + 1):
        batch = make(number)
        for name, run in runs.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            loss = run(batch)
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - cpu_started)
            if not np.isfinite(loss):
                raise FloatingPointError(f"{name}: the loss is {loss}")
    return wall, cpu


def summary(seconds, examples: int, flops: float, peak: float) -> dict:
    """Median and quartiles of a step, and what follows from the median."""
    quarter, median, three = np.percentile(seconds, [25, 50, 75]).tolist()
    return {
        "step_ms": 1e3 * median,
        "quartiles_ms": [1e3 * quarter, 1e3 * three],
        "examples_per_second": examples / median,
        "flops_per_second": flops / median,
        "mfu": flops / median / peak,
    }


def batch_seconds(make, mesh, repeats: int) -> float:
    """Median time of making a batch and copying it to the device."""
    seconds = []
    for number in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(shard_batch(mesh, make(number)))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def table(result: dict) -> str:
    """The result as Markdown."""
    lines = [
        "| step | ms (quartiles) | examples/s | GFLOP/s | MFU | host ms | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["steps"].items():
        low, high = row["quartiles_ms"]
        host = f"{row['host_ms']:.2f}" if "host_ms" in row else ""
        memory = sum(row.get("memory_bytes", {}).values()) / 2**30
        lines.append(
            f"| {name} | {row['step_ms']:.1f} ({low:.1f}-{high:.1f}) | "
            f"{row['examples_per_second']:.1f} | {row['flops_per_second'] / 1e9:.0f} | "
            f"{row['mfu']:.1%} | {host} | {f'{memory:.2f}' if memory else ''} |"
        )
    lines.append(
        f"\ntree, PQ and losses: {result['overhead']:+.1%} on the tower's step, "
        f"{result['share']:.1%} of the whole; {result['cpu_overhead']:+.1%} in CPU time"
    )
    if "ratio" in result:
        lines.append(
            f"{result['peer']} over tower: {result['ratio']:.2f} in time, "
            f"{result['cpu_ratio']:.2f} in CPU time"
        )
    return "\n".join(lines)
