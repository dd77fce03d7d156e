"""Speed of a train step whose tower trains, beside sentence-transformers.

    python -m experiments.benchmark train --batch=32 --json=FILE

Three steps take turns on the same random tokens of full length. `tower` is our
encoder, head and contrastive loss. `whole` adds the tree, residual PQ leaves, the
learned rotation and every loss of ehi-pq. The third is the peer, if it is installed,
with its tower alone. Every repeat waits for its result.

  examples/s          queries of a step / seconds, each with its document
  MFU                 F / (seconds x devices x peak), where F = 2 x the multiplications
                      of all matrix products of a step, forward and backward, counted in
                      our jaxpr, recomputation included. The peer gets the F of `tower`
  peak                of a GPU or TPU the bfloat16 rate in `flops.PEAKS`, also for
                      float32; of a CPU the best measured product of the type
  overhead, share     whole / tower - 1 and 1 - tower / whole, of the medians
  ratio               peer / tower, of the medians
  cpu_overhead, cpu_ratio   the same of the CPU seconds of all threads, which other
                      programs on the machine disturb less
  host ms             median time of a call that does not wait for its result: what
                      Python costs, if the device is asynchronous
  batch_ms            time to make the batch in NumPy and to copy it to the device
  memory              of the compiled step, on one device
"""

import importlib.util
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ehi.eval.provenance import git_commit, hardware, versions
from ehi.model.joint import JointIndex
from ehi.model.params import split_model
from ehi.model.pretrained import load_tower, resolve
from ehi.parallel.mesh import make_mesh, replicate, shard_batch
from ehi.progress import track
from ehi.train.batch import TrainingSet, make_batch
from ehi.train.optimizer import make_optimizer, trained_names
from ehi.train.phase import TERMS, Phase
from ehi.train.step import make_train_step, start_state
from experiments.run.flops import count_flops, peak_flops

PEER = "sentence-transformers"
KINDS = ("tower", "whole")
ROWS = 4096  # documents of the synthetic corpus that batches are drawn from
CALLS = 4  # calls in a row that do not wait for their result
PACKAGES = ("jax", "flax", "optax", "torch", PEER)
# `lambda_rank` searches the whole code table: `experiments.benchmark step-search`.
LOSSES = tuple(term for term in TERMS if term != "lambda_rank")
RATES = {
    "tower": 1e-5, "head": 1e-4, "router": 1e-3, "query_router": 1e-3,
    "leaf_centroids": 1e-3, "rotation": 1e-4, "quantiser": 1e-4,
}  # fmt: skip


def add_arguments(command) -> None:
    """Add the options of `train`."""
    command.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    command.add_argument("--batch", type=int, default=32, help="queries per step")
    command.add_argument(
        "--pool", type=int, default=0, help="documents per step; 0: as many as --batch"
    )
    command.add_argument("--query-length", type=int, default=32, help="tokens")
    command.add_argument("--document-length", type=int, default=128, help="tokens")
    command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    command.add_argument("--repeats", type=int, default=9, help="timed steps of each")
    command.add_argument(
        "--peak-flops", type=float, help="FLOP/s of a device that is not in the list"
    )
    command.add_argument("--no-peer", action="store_true", help=f"do not time {PEER}")


def benchmark_train(args) -> dict:
    """Time the steps in turn; the first call of each compiles and is not timed."""
    pretrained, mesh = resolve(args.model), make_mesh()
    make = batch_maker(args, pretrained)
    ours = {k: Step(args, pretrained, k == "whole", mesh) for k in KINDS}
    compiled = {name: step.compile(make(0)) for name, step in ours.items()}
    runs = dict(ours)
    if installed() and not args.no_peer:
        device = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        runs[PEER] = make_peer(
            pretrained.folder, dtype=args.dtype, device=device,
            rate=RATES["tower"],
        )  # fmt: skip
        compiled[PEER] = {"flops": compiled["tower"]["flops"]}
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
    names = ("model", "batch", "query_length", "document_length", "dtype", "repeats")
    return {name: getattr(args, name) for name in names} | {
        "steps": rows,
        **comparisons(wall, cpu),
        "batch_ms": 1e3 * batch_seconds(make, mesh, args.repeats),
        "devices": mesh.size,
        "peak_flops": peak,
        "peak_source": source,
        "hardware": hardware(),
        "git_commit": git_commit(Path(__file__).parent),
        "versions": versions(PACKAGES),
    }  # fmt: skip


def comparisons(wall, cpu) -> dict:
    """Ratios of the median seconds: of `whole` to `tower`, and of the peer to it."""
    wall, cpu = (
        {name: statistics.median(values) for name, values in seconds.items()}
        for seconds in (wall, cpu)
    )
    found = {
        "overhead": wall["whole"] / wall["tower"] - 1,
        "cpu_overhead": cpu["whole"] / cpu["tower"] - 1,
        "share": 1 - wall["tower"] / wall["whole"],
    }
    if PEER in wall:
        found["peer"] = PEER
        found["ratio"] = wall[PEER] / wall["tower"]
        found["cpu_ratio"] = cpu[PEER] / cpu["tower"]
    return found


class Step:
    """One of our jitted steps, its state, and what its compilation reports."""

    def __init__(self, args, pretrained, whole: bool, mesh):
        self.step, self.state = make_step(args, pretrained, whole, mesh)
        self.tables = make_tables(pretrained, mesh)
        self.mesh, self.key = mesh, jax.random.key(0)

    def compile(self, batch) -> dict:
        """Compile; return the FLOPs on all devices and the bytes on one."""
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
        """Start a step on a batch that is on the device; return its metrics."""
        self.state, metrics = self.compiled(self.state, self.tables, batch, self.key)
        return metrics

    def __call__(self, batch) -> float:
        """Run a step on a NumPy batch; return its loss."""
        return float(self.call(shard_batch(self.mesh, batch))["loss"])

    def host_seconds(self, batch) -> float:
        """Median time of a call that does not wait for its result."""
        batch, seconds = shard_batch(self.mesh, batch), []
        jax.block_until_ready((batch, self.state))
        for _ in range(CALLS):
            started = time.perf_counter()
            self.call(batch)
            seconds.append(time.perf_counter() - started)
        jax.block_until_ready(self.state)
        return statistics.median(seconds)


def make_step(args, pretrained, whole: bool, mesh):
    """Return the jitted step and its first state."""
    width = pretrained.width
    parts = {}
    if whole:
        tree = {
            "kind": "per_node", "height": 1, "branching": 128, "hidden": 256,
            "query_router": True,
        }  # fmt: skip
        parts = {
            "tree": tree, "num_subspaces": width // 16, "rotation": "learned",
            "residual": True,
        }  # fmt: skip
    model = JointIndex(
        tower_width=width, width=width, head_hidden=512,
        tower=load_tower(pretrained, dtype=jnp.dtype(args.dtype)),
        rngs=nnx.Rngs(0), **parts,
    )  # fmt: skip
    graphdef, params = split_model(model)
    trained = trained_names(params, RATES)
    phase = make_phase(args, dict.fromkeys(LOSSES, 1.0) if whole else {"semantic": 1.0})
    optimizer = make_optimizer(phase)
    step = make_train_step(graphdef, optimizer, trained, phase, mesh=mesh)
    return step, replicate(mesh, start_state(params, optimizer, trained))


def make_phase(args, losses: dict) -> Phase:
    """Return a phase whose pool is the documents of the batch, or larger."""
    return Phase(
        steps=1000, batch_size=args.batch, pool=args.pool or args.batch,
        losses=losses, rates=RATES, sources={"labelled": 1.0},
        warmup=0, weight_decay=0.0,
    )  # fmt: skip


class RandomTokens:
    """Random words, all texts of full length: padding would flatter the tower."""

    def __init__(self, vocabulary: int, seed: int):
        self._rng, self._vocabulary = np.random.default_rng(seed), vocabulary

    def pad(self, rows, length: int):
        """Token ids and mask (N, L)."""
        shape = (len(rows), length)
        first = min(1000, self._vocabulary // 2)  # after the special tokens
        ids = self._rng.integers(first, self._vocabulary, shape).astype(np.int32)
        return ids, np.ones(shape, bool)


def batch_maker(args, pretrained):
    """Return a function from the number of a step to its batch, in NumPy."""
    vocabulary, rows = pretrained.config["vocab_size"], np.arange(ROWS)
    data = TrainingSet(
        ROWS, ROWS, {"labelled": (rows, rows)},
        RandomTokens(vocabulary, 0), RandomTokens(vocabulary, 1),
    )  # fmt: skip

    phase = make_phase(args, {"semantic": 1.0})

    def make(number: int) -> dict[str, np.ndarray]:
        lengths = args.query_length, args.document_length
        return make_batch(data, phase, seed=0, step=number, lengths=lengths)

    return make


def make_tables(pretrained, mesh) -> dict:
    """Return random unit vectors for every table that a loss reads."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(ROWS, pretrained.width)).astype(np.float32)
    table = replicate(mesh, table / np.linalg.norm(table, axis=1, keepdims=True))
    names = ("teacher_queries", "teacher_documents")
    return dict.fromkeys((*names, "features_queries", "features_documents"), table)


def installed() -> bool:
    """Whether sentence-transformers is installed."""
    return importlib.util.find_spec(PEER.replace("-", "_")) is not None


def make_peer(folder, *, dtype: str, rate: float, clip: float = 1.0, device="cpu"):
    """Return a function that trains the peer on one of our batches, to its loss.

    The loss is `MultipleNegativesRankingLoss` at its default temperature, 1/20 as
    ours. Gradient norms are clipped as ours are; AdamW has no weight decay; dropout is
    off, since we have none. bfloat16 is autocast: parameters stay float32, as ours.

    Args:
        folder: the checkpoint.
        dtype: 'float32' or 'bfloat16'.
        rate: learning rate.
        clip: largest norm of the gradient.
        device: as torch names it.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    if device == "cuda":  # TF32, the default of jax
        torch.set_float32_matmul_precision("high")
    model = SentenceTransformer(str(folder), device=device)
    model.eval()
    contrast = losses.MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def features(batch, side, rows):
        names = {"input_ids": f"{side}_ids", "attention_mask": f"{side}_mask"}
        return {
            name: torch.as_tensor(batch[ours][rows].astype(np.int64), device=device)
            for name, ours in names.items()
        }

    def step(batch) -> float:
        # The peer pairs row i of the queries with row i of the documents.
        own = batch["target"]
        others = np.setdiff1d(np.arange(len(batch["documents"])), own)
        if len(others):
            raise ValueError(
                "--pool: the peer takes no documents but those of its queries; set it 0"
            )
        pair = [
            features(batch, "queries", slice(None)),
            features(batch, "documents", own),
        ]
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = contrast(pair, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return float(loss.detach())  # waits for the device

    return step


def take_turns(runs, make, repeats: int):
    """Run the steps in turn; return wall and CPU seconds of every repeat by name."""
    wall, cpu = ({name: [] for name in runs} for _ in range(2))
    for number in track(range(1, repeats + 1), "time", "rounds"):
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
    """Median and quartiles of a step, and the speeds that the median gives."""
    quarter, median, three = np.percentile(seconds, [25, 50, 75]).tolist()
    return {
        "step_ms": 1e3 * median,
        "quartiles_ms": [1e3 * quarter, 1e3 * three],
        "examples_per_second": examples / median,
        "flops_per_second": flops / median,
        "mfu": flops / median / peak,
    }


def batch_seconds(make, mesh, repeats: int) -> float:
    """Median time to make a batch and to copy it to the device."""
    seconds = []
    for number in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(shard_batch(mesh, make(number)))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def table(result: dict) -> str:
    """Return the result as a Markdown table."""
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
