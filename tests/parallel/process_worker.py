"""The child of tests of several devices and processes: it trains tiny systems.

python process_worker.py '{"mode": "train", "folder": "...", "systems": ["jpq"]}'
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from mined_random import mine_random
from tiny import make_model, make_tiny

from ehi.encode.embed import code_table, embed
from ehi.index import build_index
from ehi.model.export import index_arrays
from ehi.parallel import mesh, preemption, processes
from ehi.parallel.mesh import make_mesh, place, replicate, shard_batch, table_sharding
from ehi.train import loop
from ehi.train.batch import make_batch
from ehi.train.logs import MetricLog
from ehi.train.negatives import mine_from_leaves
from ehi.train.optimizer import make_optimizer, trained_names
from ehi.train.phase import Phase
from ehi.train.step import make_train_step, start_state

FLAT = {"tree": None, "residual": False}
RAW = {"num_subspaces": 0, "rotation": "none", "residual": False}
RATES = dict.fromkeys(
    ("head", "query_head", "router", "query_router", "leaf_centroids", "rotation",
     "quantiser"), 1e-3,
)  # fmt: skip
_TREE = {
    "kind": "per_node", "height": 1, "branching": 4, "hidden": 0, "query_router": False
}  # fmt: skip
PQ_LOSSES = {"distill": 1.0, "codebook": 1.0, "commitment": 0.5}
TREE_LOSSES = {"path": 1.0, "route_distill": 1.0, "balance": 0.1, "entropy": 0.1}
# System -> options of the model, losses, changes of the phase.
SYSTEMS = {
    "dense": (
        RAW | {"tree": None, "query_head": False, "tower": True},
        {"semantic": 1.0},
        {"rates": RATES | {"tower": 1e-4}, "chunk": 4, "encoded": 8},
    ),
    "ehi": (RAW, TREE_LOSSES | {"semantic": 1.0, "distill_raw": 1.0}, {}),
    "joint-pq": (FLAT, PQ_LOSSES, {}),
    "ehi-pq": (
        {},
        TREE_LOSSES | PQ_LOSSES,
        {"refresh": 5, "mined_per_query": 1, "mined_kept": 4, "revive_every": 4},
    ),
    "jpq": (
        FLAT | {"rotation": "fixed", "frozen_codes": True},
        {"lambda_rank": 1.0},
        {"top_k": 10},
    ),
    # With the rates of all others it is chaotic: losses of 20 steps change by a tenth
    # where parameters start 1e-6 apart.
    "poeem": (
        {"tree": _TREE | {"kind": "nearest"}, "codeword_gradient": False},
        {"quantised": 1.0, "reconstruction": 3.0},
        {"rates": {"head": 1e-4, "router": 3e-4, "rotation": 2e-4, "quantiser": 3e-4}},
    ),
    "repconc": (
        FLAT,
        {"quantised": 1.0, "reconstruction": 1.0},
        {"sinkhorn": 10, "sinkhorn_epsilon": 0.05},
    ),
    "distill-vq": (
        {"tree": _TREE | {"query_router": True}, "rotation": "fixed"},
        {"distill": 1.0, "route_distill": 1.0},
        {},
    ),
    "jtr": (RAW | {"tree": _TREE}, {"leaf_likelihood": 1.0}, {}),
}
STEPS = 12


def system(name: str, folder: Path, changes: dict):
    """Training set, tables, graphdef, params, phase and token lengths of a system."""
    data, tables = make_tiny()
    options, losses, own = SYSTEMS[name]
    # Codebooks and nodes as they are drawn: fitting them takes longer than the tests.
    graphdef, params = make_model(tables, folder, fitted=False, **options)
    fields = {
        "steps": STEPS, "batch_size": 12, "pool": 20, "losses": losses, "rates": RATES,
        "sources": {"labelled": 0.75, "documents": 0.25}, "source_weights": {},
        "log_every": 1, "checkpoint_every": 4, "warmup": 0, "weight_decay": 0.0,
    }  # fmt: skip
    phase = Phase(**(fields | own | changes))
    if phase.needs_codes:
        documents = embed(graphdef, params, "documents", tables["features_documents"])
        tables = tables | {"codes": code_table(graphdef, params, documents)}
    lengths = (8, 8) if options.get("tower") else (0, 0)
    for side in ("queries", "documents"):
        tables = tables | {f"cached_{side}": tables[f"features_{side}"]}
    return data, tables, graphdef, params, phase, lengths


def train(job: dict) -> None:
    """Train the systems of a job with all devices of all processes."""
    folder = Path(job["folder"])
    own = folder / f"process{jax.process_index()}"
    for name in job["systems"]:
        data, tables, graphdef, params, phase, lengths = system(
            name, own / name, job.get("changes", {})
        )

        def mine(params, rows, graphdef=graphdef, data=data, tables=tables):
            documents = embed(
                graphdef, params, "documents", tables["features_documents"]
            )
            queries = embed(graphdef, params, "queries", tables["features_queries"])
            # Without codes: many documents share one, so their scores differ in the
            # last bits only, which other numbers of processes round otherwise.
            arrays = index_arrays(graphdef, params)
            trees = {name: arrays[name] for name in ("tree", "query_tree")}
            index = build_index(documents, np.arange(len(documents)), **trees)
            return mine_from_leaves(
                index, queries[rows], data, per_query=4, beam=2, rows=rows
            )

        log = MetricLog(folder / "metrics.jsonl", writes=processes.is_first())
        state = loop.run_phase(
            graphdef, params, data, tables, phase, run=name, name="joint", seed=0,
            directory=own / name / "checkpoints", log=log, lengths=lengths,
            mine=mine if phase.refresh else None,
            shard_state=job.get("shard_state", False),
        )  # fmt: skip
        if processes.is_first():
            arrays = {n.replace("/", "|"): v for n, v in state["params"].items()}
            np.savez(folder / f"{name}.npz", **arrays)
    processes.barrier("the end")


def compare(job: dict) -> None:
    """Gradients of one step and losses of 20, on one device and on all, as JSON."""
    for name in job["systems"]:
        found = [_steps(name, Path(job["folder"]), n) for n in (1, jax.device_count())]
        (one, losses_one, _), (all_, losses_all, held) = found
        whole = optax.tree.norm(one)
        apart = max(
            float(np.linalg.norm(all_[n] - one[n]))
            / max(float(np.linalg.norm(one[n])), 1e-2 * float(whole))
            for n in one
        )
        losses = np.abs(np.subtract(losses_all, losses_one)) / np.abs(losses_one)
        answer = {"system": name, "gradients": apart, "losses": float(losses.max())}
        answer |= {"norm": float(whole), "codes": held.get("codes")}
        print(json.dumps(answer), flush=True)


def shard(job: dict) -> None:
    """Bytes of a state on one device and losses of 8 steps, whole and sharded."""
    plain = {"refresh": 0, "mined_per_query": 0, "encoded": 0}
    for name in job["systems"]:
        data, tables, graphdef, params, phase, lengths = system(
            name,
            Path(job["folder"]) / name,
            plain,
        )
        every, answer = make_mesh(), {"system": name, "losses": [], "bytes": []}
        for sharded in (False, True):
            step, state, sharding = loop.make_phase_step(
                graphdef, params, phase, every, sharded
            )
            state, losses = place(state, sharding), []
            for number in range(8):
                batch = make_batch(data, phase, seed=0, step=number, lengths=lengths)
                batch = shard_batch(every, batch)
                state, metrics = step(
                    state, replicate(every, tables), batch, jax.random.key(0)
                )
                losses.append(float(metrics["loss"]))
            here = [x.addressable_shards[0].data for x in jax.tree.leaves(state)]
            answer["losses"].append(losses)
            answer["bytes"].append(sum(x.nbytes for x in here))
        print(json.dumps(answer), flush=True)


def refresh(job: dict) -> None:
    """Embeddings and mined negatives by all devices of all processes."""
    found = {}
    for name, table in (("ehi", "features_queries"), ("dense", "tokens")):
        data, tables, graphdef, params, _, lengths = system(
            name, Path(job["folder"]) / f"{name}{jax.process_index()}", {}
        )
        source = data.query_tokens if table == "tokens" else tables[table]
        found[name] = embed(graphdef, params, "queries", source)
    path = Path(job["folder"]) / f"refreshed{jax.process_index()}.npz"
    np.savez(path, **found, **mine_random(data))
    processes.barrier("the end")


def _steps(name: str, folder: Path, devices: int):
    data, tables, graphdef, params, phase, lengths = system(name, folder / name, {})
    trained = trained_names(params, phase.rates)
    phase = dataclasses.replace(phase, steps=20, encoded=0)
    optimizer = _keep_gradient(make_optimizer(phase))
    some = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )  # fmt: skip
    step = make_train_step(graphdef, optimizer, trained, phase, mesh=some)
    state = replicate(some, start_state(params, optimizer, trained))
    tables, losses = place(tables, table_sharding(some, tables)), []
    held = {n: x.addressable_shards[0].data.size / x.size for n, x in tables.items()}
    for number in range(20):
        batch = make_batch(data, phase, seed=0, step=number, lengths=lengths)
        batch = shard_batch(some, batch)
        state, metrics = step(state, tables, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
        if not number:
            gradient = jax.tree.map(np.array, state["opt_state"]["gradient"])
    return gradient, losses, held


def _keep_gradient(optimizer):
    """The optimiser, with the last gradient in its state."""

    def init(params):
        zeros = jax.tree.map(jax.numpy.zeros_like, params)
        return {"gradient": zeros, "inner": optimizer.init(params)}

    def update(gradient, state, params):
        updates, inner = optimizer.update(gradient, state["inner"], params)
        return updates, {"gradient": gradient, "inner": inner}

    return optax.GradientTransformation(init, update)


def wait(job: dict) -> None:
    """Wait for a process that does not come."""
    if jax.process_index() == job["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.barrier("never")


def agree(job: dict) -> None:
    """Agree, where one process has another config."""
    processes.agree("code", "the same")
    processes.agree("config", str(jax.process_index() in job["others"]))


def send_at(step: int, number: int) -> None:
    """Send this process a signal when it makes the batch of a step."""

    def make(*args, step, _made=make_batch, _at=step, **options):
        if step == _at:
            os.kill(os.getpid(), number)
        return _made(*args, step=step, **options)

    loop.make_batch = make


def main(job: dict) -> None:
    processes.initialize(
        job.get("coordinator"), job.get("num_processes"), job.get("process_id"),
        timeout=60, lost_after=job.get("lost_after", 20),
    )  # fmt: skip
    preemption.listen()
    mesh.SHARDED_FROM = 64  # the arrays here are small
    if "signal" in job and job.get("process_id", 0) == job.get("to", 0):
        send_at(job["at"], getattr(signal, job["signal"]))
    modes = {
        "train": train,
        "compare": compare,
        "shard": shard,
        "refresh": refresh,
        "wait": wait,
        "agree": agree,
    }
    try:
        modes[job["mode"]](job)
    except preemption.Preempted as stopped:
        print(stopped.message, file=sys.stderr)
        raise
    except Exception as error:
        if processes.is_loss(error):
            print(processes.explain_loss(error), file=sys.stderr)
            processes.leave(processes.LOST)
        if not isinstance(error, ValueError):
            raise
        print(error, file=sys.stderr)
        processes.leave(1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
