"""Time and memory of searching the whole code table inside a train step (JPQ).

    python -m experiments.benchmark step-search --documents=8800000 --bytes=96

Times `search_codes` as the step calls it, jitted, on all devices of the mesh, with
random queries, codes and codebooks of 256 codewords. Beside it stands a predicted lower
bound, with N queries, C documents, D dimensions, M bytes per code and d devices:

  products   2 N C D / (d x FLOP/s of a float32 product at full precision)
  gathers    4 C D / (d x bytes/s of gathering one codeword after the other)
  predicted  their sum, since a chunk is decoded before it is multiplied

Both rates are measured here, on one device, for the product of one chunk and for its
decoding. The prediction leaves out the selection of the best k and the loop: they take
measured - predicted. Memory is that of the compiled search on one device, beside the
sizes that `search_codes` states.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ehi.eval.provenance import hardware, versions
from ehi.model.pq import decode
from ehi.parallel.mesh import make_mesh, replicate
from ehi.train.step_search import search_codes

CODEWORDS = 256
PACKAGES = ("jax", "jaxlib")


def add_arguments(command) -> None:
    """Add the options of `step-search`."""
    command.add_argument("--documents", type=int, default=1_000_000)
    command.add_argument("--bytes", type=int, default=96, help="bytes per code")
    command.add_argument("--batch", type=int, default=32, help="queries per step")
    command.add_argument("--dim", type=int, default=768)
    command.add_argument("--top-k", type=int, default=200, help="results per query")
    command.add_argument(
        "--chunk", type=int, default=65536, help="documents scored at once"
    )
    command.add_argument("--repeats", type=int, default=5)


def benchmark_step_search(args) -> dict:
    """Compile and time the search, and predict its time from the rates of its parts."""
    if args.dim % args.bytes:
        raise ValueError(f"--dim={args.dim} is no multiple of --bytes={args.bytes}")
    mesh = make_mesh()
    q, codebooks, codes = make_arrays(args, mesh)
    search = functools.partial(search_codes, k=args.top_k, chunk=args.chunk, mesh=mesh)
    started = time.perf_counter()
    compiled = jax.jit(search).lower(q, codebooks, codes).compile()
    compile_seconds = time.perf_counter() - started
    seconds = repeat(lambda: compiled(q, codebooks, codes), args.repeats)
    found = predict(args, mesh.size, *part_rates(args, q, codebooks, codes))
    memory, chunk = compiled.memory_analysis(), min(args.chunk, args.documents)
    names = ("documents", "bytes", "batch", "dim", "top_k", "chunk", "repeats")
    return {name: getattr(args, name) for name in names} | found | {
        "devices": mesh.size,
        "seconds": float(np.median(seconds)),
        "all_seconds": seconds,
        "compile_seconds": compile_seconds,
        "memory_bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        "stated_bytes": {
            "table": -(-args.documents // mesh.size) * args.bytes,
            "chunk": chunk * 4 * (args.dim + args.batch + args.bytes),
            "result": 16 * args.batch * args.top_k,
        },
        "hardware": hardware(),
        "versions": versions(PACKAGES),
    }  # fmt: skip


def make_arrays(args, mesh):
    """Return queries and codebooks on every device, and the codes in equal parts."""
    rng = np.random.default_rng(0)
    shape = (args.bytes, CODEWORDS, args.dim // args.bytes)
    q = rng.standard_normal((args.batch, args.dim), np.float32)
    codebooks = rng.standard_normal(shape, np.float32)
    codes = rng.integers(0, CODEWORDS, (args.documents, args.bytes), np.uint8)
    even = args.documents % mesh.size == 0
    parts = NamedSharding(mesh, PartitionSpec("data" if even else None))
    return replicate(mesh, q), replicate(mesh, codebooks), jax.device_put(codes, parts)


def repeat(call, repeats: int) -> list[float]:
    """Return the seconds of every call, after one call that is not timed."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return seconds


def part_rates(args, q, codebooks, codes) -> tuple[float, float]:
    """Measure FLOP/s of the product of a chunk, and bytes/s of decoding it."""
    q, codebooks = (jnp.asarray(np.asarray(x)) for x in (q, codebooks))
    block = jnp.asarray(np.asarray(codes[: args.chunk]))  # (c, M)
    vectors = jax.jit(decode)(codebooks, block.astype(jnp.int32))  # (c, D)

    @jax.jit
    def product(q, vectors):
        return jnp.dot(q, vectors.T, precision=jax.lax.Precision.HIGHEST)

    @jax.jit
    def gather(codebooks, block):
        return decode(codebooks, block.astype(jnp.int32))

    flops = 2.0 * len(q) * vectors.size
    return (
        flops / min(repeat(lambda: product(q, vectors), args.repeats)),
        vectors.nbytes / min(repeat(lambda: gather(codebooks, block), args.repeats)),
    )


def predict(args, devices: int, flops_rate: float, gather_rate: float) -> dict:
    """Predict the seconds of both parts by the formulas at the top of this file."""
    flops = 2.0 * args.batch * args.documents * args.dim
    gathered = 4.0 * args.documents * args.dim
    parts = {
        "products": flops / (devices * flops_rate),
        "gathers": gathered / (devices * gather_rate),
    }
    return {
        "flops_per_second": flops_rate,
        "gathered_bytes_per_second": gather_rate,
        "predicted_seconds": sum(parts.values()),
        "predicted_parts": parts,
    }


def table(result: dict) -> str:
    """Return the result as Markdown."""
    memory, stated = result["memory_bytes"], result["stated_bytes"]
    parts = result["predicted_parts"]
    return "\n".join(
        [
            f"top {result['top_k']} of {result['documents']:,} x {result['bytes']} "
            f"bytes, {result['batch']} queries, {result['devices']} devices",
            "",
            "| | measured | predicted |",
            "|---|---|---|",
            f"| milliseconds | {1e3 * result['seconds']:.1f} | "
            f"{1e3 * result['predicted_seconds']:.1f} (gathers "
            f"{1e3 * parts['gathers']:.1f}, products {1e3 * parts['products']:.1f}) |",
            f"| MB of the table, arguments | {memory['arguments'] / 1e6:.1f} | "
            f"{stated['table'] / 1e6:.1f} |",
            f"| MB beyond it, temporaries | {memory['temporaries'] / 1e6:.1f} | "
            f"{(stated['chunk'] + stated['result']) / 1e6:.1f} |",
        ]
    )
