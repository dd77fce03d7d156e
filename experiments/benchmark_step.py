"""What tree, PQ leaves and all losses add to a train step whose tower trains.

    python -m experiments.benchmark_step --batch=32 --repeats=9

Times the jitted step of the tower with the contrastive loss alone, and the same step
with tree, residual PQ leaves, learned rotation and every loss, in turn, from the same
weights on the same random tokens. Prints JSON; `overhead` is the ratio of the medians
minus one. `experiments.benchmark train` times the same two beside a peer.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ehi.eval.provenance import hardware, versions
from ehi.model.joint import JointIndex
from ehi.model.params import split_model
from ehi.model.pretrained import load_tower, resolve
from ehi.train.mesh import make_mesh, replicate, shard_batch
from ehi.train.objective import TERMS
from ehi.train.optimizer import make_optimizer, trained_names
from ehi.train.pool import TrainingSet, make_batch
from ehi.train.step import make_train_step, start_state

KINDS = ("tower", "whole")
ROWS = 4096  # of the made-up corpus that a batch is drawn from
# `lambda_rank` searches the whole code table: `experiments.benchmark step-search`.
LOSSES = tuple(term for term in TERMS if term != "lambda_rank")
RATES = {
    "tower": 1e-5, "head": 1e-4, "router": 1e-3, "query_router": 1e-3,
    "leaf_centroids": 1e-3, "rotation": 1e-4, "quantiser": 1e-4,
}  # fmt: skip


class RandomTokens:
    """Texts of random words, all of full length: padding would flatter the tower."""

    def __init__(self, vocabulary: int, seed: int):
        self._rng, self._vocabulary = np.random.default_rng(seed), vocabulary

    def pad(self, rows, length: int):
        """Token ids and mask (N, L)."""
        shape = (len(rows), length)
        first = min(1000, self._vocabulary // 2)  # behind the special tokens
        ids = self._rng.integers(first, self._vocabulary, shape).astype(np.int32)
        return ids, np.ones(shape, bool)


def make_step(args, pretrained, whole: bool, mesh):
    """The jitted step and its first state."""
    width = pretrained.config["width"]
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
    optimizer = make_optimizer(RATES, steps=1000)
    weights = dict.fromkeys(LOSSES, 1.0) if whole else {"semantic": 1.0}
    step = make_train_step(graphdef, optimizer, trained, weights=weights, mesh=mesh)
    return step, replicate(mesh, start_state(params, optimizer, trained))


def batch_maker(args, pretrained):
    """A function from the number of a step to its batch, in NumPy."""
    vocabulary, rows = pretrained.config["vocab_size"], np.arange(ROWS)
    data = TrainingSet(
        ROWS, ROWS, {"labelled": (rows, rows)},
        RandomTokens(vocabulary, 0), RandomTokens(vocabulary, 1),
    )  # fmt: skip

    def make(number: int) -> dict[str, np.ndarray]:
        return make_batch(
            data, batch_size=args.batch, pool=args.pool or args.batch,
            sources={"labelled": 1.0}, source_weights={}, seed=0, step=number,
            query_length=args.query_length, document_length=args.document_length,
        )  # fmt: skip

    return make


def make_tables(pretrained, mesh) -> dict:
    """Random unit vectors as the tables that the losses compare with."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(ROWS, pretrained.config["width"])).astype(np.float32)
    table = replicate(mesh, table / np.linalg.norm(table, axis=1, keepdims=True))
    names = ("teacher_queries", "teacher_documents")
    return dict.fromkeys((*names, "features_queries", "features_documents"), table)


def benchmark(args) -> dict:
    """Median seconds of both steps, taken in turn."""
    pretrained, mesh = resolve(args.model), make_mesh()
    make, tables = batch_maker(args, pretrained), make_tables(pretrained, mesh)
    steps = {k: make_step(args, pretrained, k == "whole", mesh) for k in KINDS}
    seconds, key = {name: [] for name in steps}, jax.random.key(0)
    for number in range(args.repeats + 1):
        batch = shard_batch(mesh, make(number))
        for name, (step, state) in list(steps.items()):
            started = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, tables, batch, key))
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - started)
            steps[name] = (step, state)
            if not np.isfinite(metrics["loss"]):
                raise FloatingPointError(f"{name}: the loss is {metrics['loss']}")
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return vars(args) | {
        "median_seconds": medians,
        "all_seconds": {n: [round(s, 3) for s in v] for n, v in seconds.items()},
        "overhead": medians["whole"] / medians["tower"] - 1,
        "compilations": {name: step._cache_size() for name, (step, _) in steps.items()},
        "hardware": hardware(),
        "versions": versions(),
    }


def add_arguments(parser) -> None:
    """What a step is, on the command line."""
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--batch", type=int, default=32, help="queries of a step")
    parser.add_argument("--pool", type=int, default=0, help="documents; 0: --batch")
    parser.add_argument("--query-length", type=int, default=32, help="tokens")
    parser.add_argument("--document-length", type=int, default=128, help="tokens")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=9)


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    print(json.dumps(benchmark(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()
