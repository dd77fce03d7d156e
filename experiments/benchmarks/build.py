"""Seconds, memory and disk of building an index from shards.

python -m experiments.benchmark build --n=10000000

builds PQ leaves of synthetic embeddings, which every shard makes from the seed whenever
it is read, in a two-level tree, and prints JSON. Making the embeddings takes time of
its own, given beside the rest as `making_seconds`.
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
_NOISE = 0.7  # of documents around the vector of their leaf
_SAMPLE = 256  # documents routed exactly, to compare with


def add_arguments(command) -> None:
    """The command line of `build`."""
    command.add_argument("--n", type=int, default=1_000_000, help="documents")
    command.add_argument("--dim", type=int, default=384)
    command.add_argument(
        "--branching", type=int, default=317, help="of both levels; leaves: its square"
    )
    command.add_argument("--subspaces", type=int, default=64, help="bytes of a code")
    command.add_argument("--spill", type=int, default=1, help="leaves of a document")
    command.add_argument("--beam", type=int, default=2, help="0: exact assignment")
    command.add_argument("--shards", type=int, default=10)
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--folder", type=Path, help="where to build; default: TMPDIR")


def benchmark_build(args) -> dict:
    """Build an index in a folder of its own, check it and remove it."""
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
            # Within the two above: one thread makes the embeddings, twice.
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
    """Documents around the leaves of a tree, the same ones whenever they are made.

    Attributes:
        seconds: spent on making them.
        build_started: when the build was called.
    """

    def __init__(self, tree, seed):
        self.leaves = tree["nodes"][-1].reshape(-1, tree["nodes"][-1].shape[-1])
        self.seed = seed
        self.seconds = self.build_started = 0.0
        self._started = []

    def block(self, rng, num):
        """Embeddings of length one: (num, D) float32."""
        start = time.perf_counter()
        x = rng.standard_normal((num, self.leaves.shape[1]), np.float32)
        x *= np.float32(_NOISE)
        x += self.leaves[rng.integers(0, len(self.leaves), num)]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        self.seconds += time.perf_counter() - start
        return x

    def shard(self, number, num):
        """A function that makes the blocks of a shard."""

        def blocks():
            self._started.append(time.perf_counter())
            rng = np.random.default_rng([self.seed, number])
            for start in range(0, num, _BLOCK):
                yield self.block(rng, min(_BLOCK, num - start))

        return blocks

    def starts(self, shards):
        """When the first and the second reading of that many shards started."""
        # One more call comes before them, to find the width.
        return self._started[1], self._started[1 + shards]


def make_tree(branching, width, rng):
    """A two-level tree, the children of a node spread around it."""
    first = rng.standard_normal((1, branching, width), np.float32)
    second = rng.standard_normal((branching, branching, width), np.float32)
    second += first[0, :, None]
    return {"kind": "per_node", "nodes": [first, second], "scale": 0.1}


def same_leaves(tree, documents, beam) -> float:
    """Share of documents whose best leaf by beam is the best of all leaves."""
    found = assign_leaves(documents, tree, beam=beam)
    return float(np.mean(found == assign_leaves(documents, tree)))
