from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import phase_of

from ehi.index.search.codes import SCORES
from ehi.model.export import index_arrays
from ehi.model.params import merge_model
from ehi.parallel.mesh import batch_slice, check_batch, make_mesh, shard_batch
from ehi.train import losses
from ehi.train.batch import make_batch
from ehi.train.objective import objective
from ehi.train.optimizer import make_optimizer, trained_names
from ehi.train.phase import TERMS
from ehi.train.step import make_train_step, start_state

ALL_RATES = {
    "tower": 1e-3, "head": 1e-3, "query_head": 1e-3, "router": 1e-3,
    "query_router": 1e-3, "leaf_centroids": 1e-3, "rotation": 1e-3, "quantiser": 1e-3,
}  # fmt: skip


def batch_of(tiny, step=0, tower=False, own=None, **fields):
    lengths = (8, 8) if tower else (0, 0)
    phase = phase_of(**fields)
    return make_batch(tiny[0], phase, seed=0, step=step, lengths=lengths, own=own)


def step_of(graphdef, params, rates, weights, **fields):
    phase = phase_of(rates=rates, losses=weights, **fields)
    trained, optimizer = trained_names(params, rates), make_optimizer(phase)
    step = make_train_step(graphdef, optimizer, trained, phase)
    return step, start_state(params, optimizer, trained)


def test_every_loss_reaches_the_tower(tiny, tiny_model):
    graphdef, params = tiny_model(tower=True)
    # Away from the start, where zero-initialised layers and distances have no slope.
    params = {
        name: value + 0.02 * jax.random.normal(jax.random.key(len(name)), value.shape)
        if name != "rotation/start"
        else value
        for name, value in params.items()
    }
    weights = dict.fromkeys(TERMS, 1.0)
    phase = phase_of(losses=weights, intra_leaf_threshold=2.0, top_k=9)
    batch = batch_of(tiny, tower=True, losses=weights)
    codes = jax.random.randint(jax.random.key(0), (60, 4), 0, 16)
    tables = tiny[1] | {"codes": codes}

    def terms(tower):
        model = merge_model(graphdef, params | tower)
        return objective(model, tables, batch, phase)[1]["terms"]

    tower = {n: v for n, v in params.items() if n.startswith("tower/")}
    slopes = jax.jit(jax.jacrev(terms))(tower)  # term -> parameter -> gradient
    assert set(slopes) == set(TERMS)
    for term, gradient in slopes.items():
        norm = float(optax.tree.norm(gradient))
        # These two move the quantiser only; they give the encoder no gradient.
        moves = term not in ("codebook", "reconstruction")
        assert np.isfinite(norm) and (norm > 1e-7) == moves, term


@pytest.mark.parametrize("score", SCORES)
def test_every_score_trains(tiny, tiny_model, score):
    graphdef, params = tiny_model(score=score)
    weights = {"distill": 1.0, "quantised": 1.0}
    step, state = step_of(graphdef, params, ALL_RATES, weights)
    state = jax.tree.map(jnp.array, state)  # the step donates it
    found = []
    for _ in range(20):
        state, metrics = step(state, tiny[1], batch_of(tiny), jax.random.key(0))
        found.append(float(metrics["loss"]))
    assert np.isfinite(found).all() and found[-1] < 0.8 * found[0]
    assert all(np.isfinite(value).all() for value in state["params"].values())


def test_lambda_rank_ranks_by_the_score_of_the_index(tiny, tiny_model):
    weights = {"lambda_rank": 1.0}
    phase = phase_of(losses=weights, top_k=9)
    batch = batch_of(tiny, losses=weights)
    tables = tiny[1] | {"codes": jax.random.randint(jax.random.key(0), (60, 4), 0, 16)}

    def loss(score):
        graphdef, params = tiny_model(tree=None, residual=False, score=score)
        model = merge_model(graphdef, params)
        return float(objective(model, tables, batch, phase)[0])

    assert len({loss("ip"), loss("l2"), loss("cosine")}) == 3
    with pytest.raises(ValueError, match="'corrected' compares with the embedding"):
        loss("corrected")


def test_rows_cached_by_the_same_tower_are_as_good_as_encoded(tiny, tiny_model):
    graphdef, params = tiny_model(tower=True)
    data = tiny[0]
    model = merge_model(graphdef, params)
    tables = jax.tree.map(jnp.asarray, tiny[1]) | {
        "cached_queries": model.encode_queries(data.query_tokens.pad(range(100), 8)),
        "cached_documents": model.encode_documents(
            data.document_tokens.pad(range(60), 8)
        ),
    }
    weights = {"semantic": 1.0, "distill": 1.0, "path": 1.0, "commitment": 1.0}
    some = batch_of(tiny, tower=True, encoded=4)
    every = dict(some)
    for side, rows in (
        ("queries", data.query_tokens),
        ("documents", data.document_tokens),
    ):
        every[f"{side}_ids"], every[f"{side}_mask"] = rows.pad(some[side], 8)

    def loss(params, batch):
        model = merge_model(graphdef, params)
        return objective(model, tables, batch, phase_of(losses=weights))[0]

    slope = jax.jit(jax.value_and_grad(loss))
    (one, partial), (two, full) = slope(params, some), slope(params, every)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    for name in params:
        same = not name.startswith("tower/")
        if same:  # parts after the tower learn from all rows in both cases
            np.testing.assert_allclose(
                partial[name], full[name], atol=2e-5, err_msg=name
            )
    norms = [
        float(optax.tree.norm([g[n] for n in g if n.startswith("tower/")]))
        for g in (partial, full)
    ]
    assert 0 < norms[0] < norms[1]


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


def mesh_of(monkeypatch, process: int, processes: int = 2, devices: int = 2):
    """A mesh, with what the batch needs of it, as one of several processes sees it."""
    places = np.repeat(np.arange(processes), devices)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    return SimpleNamespace(
        size=len(places),
        devices=np.array([SimpleNamespace(process_index=place) for place in places]),
    )


def test_the_processes_rows_are_the_batch(tiny, monkeypatch):
    whole = batch_of(tiny, tower=True, losses={"lambda_rank": 1.0})
    parts = []
    for process in range(2):
        mesh = mesh_of(monkeypatch, process)

        def own(size, mesh=mesh):
            return batch_slice(mesh, size)

        parts.append(batch_of(tiny, tower=True, losses={"lambda_rank": 1.0}, own=own))
    assert parts[0].keys() == whole.keys()
    for name, expected in whole.items():
        found = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_a_pool_of_the_whole_corpus_is_held_by_all(monkeypatch):
    mesh = mesh_of(monkeypatch, process=1)
    assert batch_slice(mesh, 61) == slice(61)
    check_batch(mesh, batch_size=12, pool=100, num_documents=61)


def test_a_batch_that_the_mesh_cannot_divide_is_refused(monkeypatch):
    mesh = mesh_of(monkeypatch, process=1)
    with pytest.raises(ValueError, match="batch_size=13 .* multiples of 4"):
        check_batch(mesh, batch_size=13, pool=20, num_documents=60)
    with pytest.raises(ValueError, match="pool=21 does not divide over the 4 devices"):
        check_batch(mesh, batch_size=12, pool=21, num_documents=60)


def test_scores_of_codes_are_cosines_if_a_phase_asks_for_them(tiny, tiny_model):
    """Poeem: no document wins because its reconstruction is long."""
    graphdef, params = tiny_model(rotation="none", residual=False)
    batch, weights = batch_of(tiny), {"quantised": 1.0}

    def loss(params, **fields):
        model, phase = merge_model(graphdef, params), phase_of(losses=weights, **fields)
        return objective(model, tiny[1], batch, phase)[0]

    model = merge_model(graphdef, params)
    d = model.embed_documents(tiny[1]["features_documents"][batch["documents"]])
    q = model.embed_queries(tiny[1]["features_queries"][batch["queries"]])
    d_hat = model.quantise(d)[0]
    cosine = q @ (d_hat / jnp.linalg.norm(d_hat, axis=-1, keepdims=True)).T
    contrast = {name: batch[name] for name in ("target", "where", "weights")}
    expected = losses.softmax_contrastive(cosine, temperature=0.05, **contrast)
    np.testing.assert_allclose(loss(params, score="cosine"), expected, rtol=1e-5)
    assert loss(params, score="cosine") != loss(params)


def test_only_the_hardest_candidates_count_if_a_phase_asks_for_them(tiny, tiny_model):
    """RepCONC's dynamic negatives: the others have no part in the softmax."""
    graphdef, params = tiny_model(residual=False)
    batch, weights = batch_of(tiny), {"quantised": 1.0}

    def loss(**fields):
        model, phase = merge_model(graphdef, params), phase_of(losses=weights, **fields)
        return float(objective(model, tiny[1], batch, phase)[0])

    assert loss(hardest=1) < loss(hardest=3) < loss(hardest=19) <= loss() + 1e-6
    assert loss(hardest=19) == pytest.approx(loss())
