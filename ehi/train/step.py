"""The jitted train step, and the state that it updates."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ehi.model.params import merge_model
from ehi.model.pq import revive, update_usage
from ehi.train.objective import objective
from ehi.train.phase import Phase

# Decay of the moving average of codeword counts.
USAGE_DECAY = 0.99
# A codeword whose average is below this fraction of an even load is dead.
DEAD_SHARE = 0.02


def start_state(
    params: dict,
    optimizer: optax.GradientTransformation,
    trained: frozenset[str],
    buffer: tuple[int, int] = (0, 0),
) -> dict:
    """The state before step 0: `params`, `opt_state`, `stats` and `step`.

    The parameters are copied, because a step donates its state and the caller may start
    another system from the same arrays.

    Args:
      params: name -> array.
      optimizer, trained: from `make_optimizer` and `trained_names`.
      buffer: rows and width of the document embeddings that are kept; 0 rows for none.
    """
    params, stats = {name: jnp.copy(value) for name, value in params.items()}, {}
    if buffer[0]:
        stats["buffer"] = jnp.zeros(buffer, jnp.float32)  # (rows, D)
    if "quantiser/codebooks" in params:
        m, k, _ = params["quantiser/codebooks"].shape
        stats["usage"] = jnp.full((m, k), 1.0 / k, jnp.float32)  # (M, K), sum to 1
    return {
        "params": params,
        "opt_state": optimizer.init({n: params[n] for n in sorted(trained)}),
        "stats": stats,
        "step": jnp.zeros((), jnp.int32),
    }


def make_train_step(
    graphdef,
    optimizer: optax.GradientTransformation,
    trained: frozenset[str],
    phase: Phase,
    *,
    mesh: jax.sharding.Mesh | None = None,
    state_sharding: dict | None = None,
) -> Callable:
    """The step of one phase: ``train_step(state, tables, batch, key)``.

    It holds encoder, tree, quantiser, every loss and the optimiser, and is compiled
    once. Only `trained` parameters are differentiated, so frozen ones cost no backward
    pass.

    Args:
      graphdef: of a `JointIndex`, from `split_model`.
      optimizer: from `make_optimizer`.
      trained: from `trained_names`.
      phase: loss weights and the options of the losses.
      mesh: the devices.
      state_sharding: where the state lies before and after a step; None for a whole
        copy on every device.

    Returns:
      a jitted function -> state, metrics (a flat dict of scalars on the device).
    """
    options = {}
    if mesh is not None and mesh.size > 1:
        whole = NamedSharding(mesh, PartitionSpec())
        options = {"out_shardings": (state_sharding or whole, whole)}

    @functools.partial(jax.jit, donate_argnames=("state",), **options)
    def train_step(state, tables, batch, key):
        params = state["params"]

        def loss_of(some):
            model = merge_model(graphdef, _whole_rotation(params | some, mesh))
            return objective(model, tables, batch, phase, mesh)

        some = {name: params[name] for name in sorted(trained)}
        (loss, found), grads = jax.value_and_grad(loss_of, has_aux=True)(some)
        updates, opt_state = optimizer.update(grads, state["opt_state"], some)
        params = params | optax.apply_updates(some, updates)
        stats = _update_stats(state["stats"], found, state["step"])
        if found["codes"] is not None and phase.revive_every:
            params, stats = _revive(
                params, stats, found, jax.random.fold_in(key, state["step"]),
                now=(state["step"] + 1) % phase.revive_every == 0,
            )  # fmt: skip
        metrics = {"loss": loss} | found["terms"] | _norms(grads) | _loads(found, stats)
        if "stop" in batch:  # if one of several processes stops, all of them do
            metrics["stop"] = batch["stop"].max()
        new = {"params": params, "opt_state": opt_state, "stats": stats}
        return new | {"step": state["step"] + 1}, metrics

    return train_step


def _whole_rotation(params: dict, mesh: jax.sharding.Mesh | None) -> dict:
    """The parameters, with a rotation copied whole to every device.

    `cayley` multiplies a dozen times in a row. Each product of a sharded matrix would
    gather it again and round it differently.
    """
    if mesh is None or mesh.size == 1:
        return params
    whole = NamedSharding(mesh, PartitionSpec())
    return params | {
        name: jax.lax.with_sharding_constraint(value, whole)
        for name, value in params.items()
        if name.startswith("rotation/")
    }


def _update_stats(stats: dict, found: dict, step) -> dict:
    """Update the moving average of codeword use and the ring of document embeddings."""
    stats = dict(stats)
    if found["codes"] is not None:
        stats["usage"] = update_usage(stats["usage"], found["codes"], USAGE_DECAY)
    if "buffer" in stats:
        rows = len(found["d"])
        place = (step * rows + jnp.arange(rows)) % len(stats["buffer"])
        newest = jax.lax.stop_gradient(found["d"])
        stats["buffer"] = stats["buffer"].at[place].set(newest)
    return stats


def _revive(params, stats, found, key, *, now):
    """Move dead codewords onto vectors of the batch, if `now`."""
    codebooks = params["quantiser/codebooks"]  # (M, K, S)
    m, k, s = codebooks.shape
    vectors = jax.lax.stop_gradient(found["z"]).reshape(-1, m, s)  # (C, M, S)
    alive = revive(codebooks, stats["usage"], vectors, key, threshold=DEAD_SHARE / k)
    dead = stats["usage"] < DEAD_SHARE / k
    usage = jnp.where(now & dead, 1.0 / k, stats["usage"])
    params = params | {"quantiser/codebooks": jnp.where(now, alive, codebooks)}
    return params, stats | {"usage": usage}


def _norms(grads: dict) -> dict:
    """Gradient norm of each parameter group."""
    groups = sorted({name.split("/")[0] for name in grads})
    return {
        f"grad_norm/{g}": optax.tree.norm(
            [v for n, v in grads.items() if n.split("/")[0] == g]
        )
        for g in groups
    }


def _loads(found: dict, stats: dict) -> dict:
    """Leaf loads of the pool and the share of codewords in use."""
    metrics = {}
    counts = found["leaf_counts"]
    if counts is not None:
        metrics["leaf_load_max"] = counts.max()
        metrics["leaf_load_cv"] = counts.std() / counts.mean()
    if found["codes"] is not None:
        k = stats["usage"].shape[1]
        metrics["codewords_used"] = (stats["usage"] >= DEAD_SHARE / k).mean()
    return metrics
