import jax
import numpy as np
import optax
import pytest

from ehi.model.params import merge_model
from ehi.train.export import index_arrays
from ehi.train.objective import TERMS, objective
from ehi.train.optimizer import make_optimizer, trained_names
from ehi.train.pool import make_batch
from ehi.train.step import make_mesh, make_train_step, shard_batch, start_state

ALL_RATES = {
    "tower": 1e-3, "head": 1e-3, "query_head": 1e-3, "router": 1e-3,
    "query_router": 1e-3, "leaf_centroids": 1e-3, "rotation": 1e-3, "quantiser": 1e-3,
}  # fmt: skip


def batch_of(tiny, step=0, tower=False, **changes):
    options = {
        "batch_size": 12, "pool": 20, "seed": 0, "step": step,
        "sources": {"labelled": 0.75, "documents": 0.25}, "source_weights": {},
    } | changes  # fmt: skip
    if tower:
        options |= {"query_length": 8, "document_length": 8}
    return make_batch(tiny[0], **options)


def step_of(graphdef, params, rates, weights, **options):
    trained = trained_names(params, rates)
    optimizer = make_optimizer(rates, steps=50)
    step = make_train_step(graphdef, optimizer, trained, weights=weights, **options)
    return step, start_state(params, optimizer, trained)


def test_every_loss_reaches_the_tower(tiny, tiny_model):
    graphdef, params = tiny_model(tower=True)
    # Off the start, where the zero-initialised layers and distances have no slope.
    params = {
        name: value + 0.02 * jax.random.normal(jax.random.key(len(name)), value.shape)
        if name != "rotation/start"
        else value
        for name, value in params.items()
    }
    batch = batch_of(tiny, tower=True, lists_positives=True)
    codes = jax.random.randint(jax.random.key(0), (60, 4), 0, 16)
    tables = tiny[1] | {"codes": codes}

    def terms(tower):
        model = merge_model(graphdef, params | tower)
        weights = dict.fromkeys(TERMS, 1.0)
        _, found = objective(
            model, tables, batch, weights=weights, intra_leaf_threshold=2.0, top_k=9
        )
        return found["terms"]

    tower = {n: v for n, v in params.items() if n.startswith("tower/")}
    slopes = jax.jit(jax.jacrev(terms))(tower)  # term -> parameter -> gradient
    assert set(slopes) == set(TERMS)
    for term, gradient in slopes.items():
        norm = float(optax.tree.norm(gradient))
        # These two move the quantiser only: by definition the encoder stays.
        moves = term not in ("codebook", "reconstruction")
        assert np.isfinite(norm) and (norm > 1e-7) == moves, term


def test_joint_step_learns_and_compiles_once(tiny, tiny_model):
    graphdef, params = tiny_model()
    weights = {"distill": 1.0, "route_distill": 1.0, "balance": 0.1, "codebook": 1.0}
    step, state = step_of(graphdef, params, ALL_RATES, weights, revive_every=5)
    losses = []
    for number in range(30):
        state, metrics = step(state, tiny[1], batch_of(tiny, number), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert step._cache_size() == 1
    for name in ("leaf_load_max", "leaf_load_cv", "codewords_used", "codebook"):
        assert np.isfinite(metrics[name])
    rotation = index_arrays(graphdef, state["params"])["rotation"]
    assert np.abs(rotation.T @ rotation - np.eye(16)).max() < 1e-5


def test_frozen_groups_stay_and_a_weight_of_zero_costs_nothing(tiny, tiny_model):
    graphdef, params = tiny_model()
    before = {name: np.asarray(value) for name, value in params.items()}
    rates = {"query_head": 1e-2, "quantiser": 1e-2}
    step, state = step_of(
        graphdef, params, rates, {"distill": 1.0, "path": 0.0, "semantic": 0.0}
    )
    state, metrics = step(state, tiny[1], batch_of(tiny), jax.random.key(0))
    moved = {
        name.split("/")[0]
        for name, value in state["params"].items()
        if not np.array_equal(before[name], value)
    }
    assert moved == {"query_head", "quantiser"}
    assert "path" not in metrics and "semantic" not in metrics


def test_one_device_and_four_agree(tiny, tiny_model):
    """Run under 4 fake devices: in-batch negatives are global over the mesh."""
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices; tests/train/test_devices.py runs this in a child")
    graphdef, params = tiny_model()
    weights = {"semantic": 1.0, "distill": 1.0, "path": 1.0, "balance": 1.0}
    batch = batch_of(tiny)
    found = []
    for devices in (1, 4):
        step, state = step_of(graphdef, params, ALL_RATES, weights)
        mesh = jax.make_mesh(
            (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
            devices=jax.devices()[:devices],
        )  # fmt: skip
        _, metrics = step(state, tiny[1], shard_batch(mesh, batch), jax.random.key(0))
        found.append({name: float(value) for name, value in metrics.items()})
    for name in found[0]:
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4, abs=1e-6)


def test_chunked_encoding_gives_the_same_gradient(tiny, tiny_model):
    graphdef, params = tiny_model(
        tower=True, fitted=False, tree=None, num_subspaces=0, rotation="none",
        residual=False,
    )  # fmt: skip
    batch = batch_of(tiny, tower=True)
    norms = []
    for chunk in (0, 4):
        step, state = step_of(
            graphdef, params, {"tower": 1e-3}, {"semantic": 1.0}, chunk=chunk
        )
        _, metrics = step(state, tiny[1], batch, jax.random.key(0))
        norms.append([float(metrics[n]) for n in ("loss", "grad_norm/tower")])
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_shard_batch_replicates_what_does_not_divide():
    batch = shard_batch(make_mesh(), {"a": np.zeros((7, 2)), "b": np.zeros(8)})
    assert batch["a"].shape == (7, 2) and batch["b"].shape == (8,)
