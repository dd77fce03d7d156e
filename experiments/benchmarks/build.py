"""Seconds, memory and disk of building an index from shards.

    python -m experiments.benchmark build --n=10000000

Builds a two-level tree with PQ leaves from synthetic embeddings, and prints JSON. Every
shard makes its embeddings from the seed each time it is read; `making_seconds` is the
time that this takes.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np

from ehi.eval.provenance import git_commit, hardware, versions
from ehi.index import open_index
from ehi.index.search.routing import assign_leaves
from ehi.index.stream import Shard, build_folder
from ehi.progress import Progress
from experiments.benchmarks.measure import measured_build, memory_mb

_BLOCK = 8192
_NOISE = 0.7  # length of the noise around the vector of a leaf
_SAMPLE = 256  # documents that are also routed exactly, to compare


def add_arguments(command) -> None:
    """Add the options of `build`."""
    command.add_argument("--n", type=int, default=1_000_000, help="documents")
    command.add_argument("--dim", type=int, default=384)
    command.add_argument(
        "--branching", type=int, default=317,
        help="children per node on both levels; the leaves are its square",
    )  # fmt: skip
    command.add_argument("--subspaces", type=int, default=64, help="bytes per code")
    command.add_argument("--spill", type=int, default=1, help="leaves per document")
    command.add_argument(
        "--beam", type=int, default=2, help="beam of the assignment; 0: exact"
    )
    command.add_argument("--shards", type=int, default=10)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--folder", type=Path, help="folder to build in (TMPDIR)")


def benchmark_build(args) -> dict:
    """Build an index in a temporary folder, check it and remove it."""
    rng = np.random.default_rng(args.seed)
    tree = make_tree(args.branching, args.dim, rng)
    synthetic = Synthetic(tree, args.seed)
    sample = synthetic.block(np.random.default_rng([args.seed, args.shards]), 4096)
    codebooks = sample[rng.permutation(4096)[:256]]  # (K, D)
    codebooks = codebooks.reshape(256, args.subspaces, -1).swapaxes(0, 1)
    cuts = np.linspace(0, args.n, args.shards + 1).astype(int).tolist()
    shards = [
        Shard(synthetic.shard(number, stop - start), range(start, stop), name=number)
        for number, (start, stop) in enumerate(zip(cuts[:-1], cuts[1:], strict=True))
    ]
    beam = args.beam or None
    before = memory_mb("VmRSS")
    with tempfile.TemporaryDirectory(prefix="ehi-build-", dir=args.folder) as folder:
        path = Path(folder) / "index"
        cpu = time.process_time()

        def build():
            synthetic.build_started = time.perf_counter()
            with Progress("build", 2 * args.n, "readings of documents") as progress:
                build_folder(
                    path, shards, tree=tree, codebooks=codebooks, spill=args.spill,
                    beam=beam, threads=args.threads, progress=progress.update,
                )  # fmt: skip

        _, seconds, peak = measured_build(build)
        cpu = time.process_time() - cpu
        index = open_index(path, verify=True)
        first, second = synthetic.starts(args.shards)
        size = index.index_bytes / 2**20
        parameters = index.parameter_arrays().values()
        result = {
            "documents": index.num_documents,
            "leaves": index.num_leaves,
            "leaf_load_max": index.leaf_load_max,
            "code_bytes": args.subspaces,
            "spill": args.spill,
            "beam": args.beam,
            "threads": args.threads,
            "cpus": len(os.sched_getaffinity(0)),
            "seconds": seconds,
            "route_seconds": second - first,
            "encode_and_write_seconds": synthetic.build_started + seconds - second,
            # Included in the two above: one thread makes the embeddings twice.
            "making_seconds": synthetic.seconds,
            "cpu_seconds": cpu,
            "documents_per_second": args.n / seconds,
            "index_mb": size,
            "parameters_mb": sum(array.nbytes for array in parameters) / 2**20,
            "resident_mb_before": before,
            "resident_mb_peak": None if peak is None else before + peak,
            "peak_over_index": None if peak is None else peak / size,
            "beam_is_exact": same_leaves(tree, sample[:_SAMPLE], beam),
            "hardware": hardware(),
            "versions": versions(("numpy", "threadpoolctl")),
            "git_commit": git_commit(Path(__file__).parent),
        }
    return result


class Synthetic:
    """Documents around the leaves of a tree, made again from the seed at every reading.

    Attributes:
        seconds: time spent on making them.
        build_started: time at which the build was called.
    """

    def __init__(self, tree, seed):
        self.leaves = tree["nodes"][-1].reshape(-1, tree["nodes"][-1].shape[-1])
        self.seed = seed
        self.seconds = self.build_started = 0.0
        self._started = []

    def block(self, rng, num):
        """Return embeddings of length one (num, D), float32."""
        start = time.perf_counter()
        x = rng.standard_normal((num, self.leaves.shape[1]), np.float32)
        x *= np.float32(_NOISE)
        x += self.leaves[rng.integers(0, len(self.leaves), num)]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        self.seconds += time.perf_counter() - start
        return x

    def shard(self, number, num):
        """Return a function that yields the blocks of a shard."""

        def blocks():
            self._started.append(time.perf_counter())
            rng = np.random.default_rng([self.seed, number])
            for start in range(0, num, _BLOCK):
                yield self.block(rng, min(_BLOCK, num - start))

        return blocks

    def starts(self, shards):
        """Return when the first and the second reading of all shards began."""
        # The build first reads one block to find the width.
        return self._started[1], self._started[1 + shards]


def make_tree(branching, width, rng):
    """Return a two-level tree whose children are spread around their node."""
    first = rng.standard_normal((1, branching, width), np.float32)
    second = rng.standard_normal((branching, branching, width), np.float32)
    second += first[0, :, None]
    return {"kind": "per_node", "nodes": [first, second], "scale": 0.1}


def same_leaves(tree, documents, beam) -> float:
    """Return the share of documents whose best leaf by beam is the best leaf."""
    found = assign_leaves(documents, tree, beam=beam)
    return float(np.mean(found == assign_leaves(documents, tree)))
