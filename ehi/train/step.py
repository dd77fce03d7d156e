"""The jitted train step, and the state it moves."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ehi.model.params import merge_model
from ehi.model.pq import revive, update_usage
from ehi.train.objective import objective, weights_for

# How fast the moving average of codeword counts forgets; a codeword whose average
# falls below this share of an even load is dead.
USAGE_DECAY, DEAD_SHARE = 0.99, 0.02


def start_state(
    params: dict, optimizer, trained: frozenset[str], buffer: tuple[int, int] = (0, 0)
) -> dict:
    """params, opt_state, stats and step 0.

    The parameters are copied: a step donates its state, and the caller's arrays may be
    another system's start too.

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
        stats["usage"] = jnp.full((m, k), 1.0 / k, jnp.float32)  # (M, K) share
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
    *,
    weights: Mapping[str, float],
    revive_every: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    state_sharding: dict | None = None,
    **objective_options,
) -> Callable:
    """The step of one phase: ``train_step(state, tables, batch, key)``.

    Encoder, tree, quantiser, every loss and the optimiser are inside; it is compiled
    once. Only `trained` parameters are differentiated, so frozen ones cost no backward.

    Args:
      graphdef: of a `JointIndex`, from `split_model`.
      optimizer: from `make_optimizer`.
      trained: from `trained_names`.
      weights: loss term -> weight.
      revive_every: steps between revivals of dead codewords; 0 for never.
      mesh: of the devices.
      state_sharding: where the state lies, and the new one will; None: whole on every
        device.
      **objective_options: temperatures, margins, chunk; see `objective`.

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
            active = weights_for(model, weights)
            return objective(
                model, tables, batch, weights=active, mesh=mesh, **objective_options
            )

        some = {name: params[name] for name in sorted(trained)}
        (loss, found), grads = jax.value_and_grad(loss_of, has_aux=True)(some)
        updates, opt_state = optimizer.update(grads, state["opt_state"], some)
        params = params | optax.apply_updates(some, updates)
        stats = _update_stats(state["stats"], found, state["step"])
        if found["codes"] is not None and revive_every:
            params, stats = _revive(
                params, stats, found, jax.random.fold_in(key, state["step"]),
                now=(state["step"] + 1) % revive_every == 0,
            )  # fmt: skip
        metrics = {"loss": loss} | found["terms"] | _norms(grads) | _loads(found, stats)
        if "stop" in batch:  # of several processes: one stops, so all do
            metrics["stop"] = batch["stop"].max()
        new = {"params": params, "opt_state": opt_state, "stats": stats}
        return new | {"step": state["step"] + 1}, metrics

    return train_step


def _whole_rotation(params: dict, mesh: jax.sharding.Mesh | None) -> dict:
    """The parameters, those of a rotation on every device where each holds a part.

    `cayley` multiplies a dozen times in a row, and cut matrices would be gathered, and
    rounded in another way, at each.
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
    """Codeword use by a moving average; the last embeddings of documents in a ring."""
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
    """Every few steps, move dead codewords onto vectors of the batch."""
    codebooks = params["quantiser/codebooks"]  # (M, K, S)
    m, k, s = codebooks.shape
    vectors = jax.lax.stop_gradient(found["z"]).reshape(-1, m, s)  # (C, M, S)
    alive = revive(codebooks, stats["usage"], vectors, key, threshold=DEAD_SHARE / k)
    dead = stats["usage"] < DEAD_SHARE / k
    usage = jnp.where(now & dead, 1.0 / k, stats["usage"])
    params = params | {"quantiser/codebooks": jnp.where(now, alive, codebooks)}
    return params, stats | {"usage": usage}


def _norms(grads: dict) -> dict:
    groups = sorted({name.split("/")[0] for name in grads})
    return {
        f"grad_norm/{g}": optax.tree.norm(
            [v for n, v in grads.items() if n.split("/")[0] == g]
        )
        for g in groups
    }


def _loads(found: dict, stats: dict) -> dict:
    """Leaf load of the pool and codeword use, as the index would have them."""
    metrics = {}
    counts = found["leaf_counts"]
    if counts is not None:
        metrics["leaf_load_max"] = counts.max()
        metrics["leaf_load_cv"] = counts.std() / counts.mean()
    if found["codes"] is not None:
        k = stats["usage"].shape[1]
        metrics["codewords_used"] = (stats["usage"] >= DEAD_SHARE / k).mean()
    return metrics
