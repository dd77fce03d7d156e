"""The trained model in JAX and the index in NumPy: same routes, codes and scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ehi.index import build_index
from ehi.index.search.codes import FACTORED, SCORES, factor_bytes, factor_table
from ehi.model.export import index_arrays
from ehi.model.joint import JointIndex
from ehi.model.params import merge_model, split_model
from ehi.model.score import score_quantised

WIDTH, ROWS = 16, 200


def trees():
    for kind in ("per_node", "per_level"):
        for height, branching in ((1, 8), (2, 3), (3, 2)):
            yield {
                "kind": kind,
                "height": height,
                "branching": branching,
                "hidden": 5 if kind == "per_node" else 0,
                "query_router": height != 2,
            }
    for query_router in (False, True):
        yield {
            "kind": "nearest",
            "height": 1,
            "branching": 8,
            "hidden": 0,
            "query_router": query_router,
        }


def joint_index(tree, **leaves):
    """A joint index with every parameter moved off its start."""
    model = JointIndex(
        tower_width=WIDTH, width=WIDTH, head_hidden=8, query_head=True,
        tree=tree, rngs=nnx.Rngs(0), **leaves,
    )  # fmt: skip
    graphdef, params = split_model(model)
    key = jax.random.key(1)
    for number, (name, value) in enumerate(sorted(params.items())):
        noise = jax.random.normal(jax.random.fold_in(key, number), value.shape)
        if name == "rotation/turned":  # only orthogonal matrices are its values
            params[name] = jnp.linalg.qr(noise)[0]
        elif name != "rotation/start":
            params[name] = value + 0.1 * noise
    return graphdef, params


def jax_search(model, q, d, leaves_visited):
    """Exhaustive scores of the documents in the visited leaves, by the model itself."""
    log_pd = None if model.router is None else model.route_documents(d)
    d_hat = d
    if model.quantiser is not None:
        d_hat = model.quantise(d, log_pd)[0]
    scores = np.array(q @ d_hat.T)
    if log_pd is not None:
        home = np.asarray(log_pd).argmax(1)
        visited = np.zeros_like(scores, bool)
        for row, leaves in enumerate(leaves_visited):
            visited[row] = np.isin(home, leaves)
        scores[~visited] = -np.inf
    return scores


@pytest.mark.parametrize("tree", [None, *trees()])
@pytest.mark.parametrize(
    "leaves",
    [
        {},
        {"num_subspaces": 4, "num_codewords": 16, "rotation": "learned"},
        {
            "num_subspaces": 4,
            "num_codewords": 16,
            "rotation": "fixed",
            "residual": True,
        },
        {
            "num_subspaces": 4,
            "num_codewords": 16,
            "rotation": "givens",
            "residual": True,
            "frozen_codes": True,
        },
    ],
    ids=["raw", "pq", "residual", "frozen"],
)
def test_model_and_index_agree(tree, leaves):
    if tree is None and leaves.get("residual"):
        leaves = leaves | {"residual": False}  # residual codes need a tree
    graphdef, params = joint_index(tree, **leaves)
    model = merge_model(graphdef, params)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    d = model.embed_documents(features[0])
    q = model.embed_queries(features[1, :32])
    index = build_index(
        np.asarray(d), np.arange(ROWS), **index_arrays(graphdef, params)
    )
    if leaves.get("residual") and tree["kind"] == "nearest":
        # Residuals are relative to the centroids that documents are routed by.
        tied = params["router/nodes/0"][0]
        np.testing.assert_array_equal(index.leaf_centroids, tied)
    beam = min(3, index.num_leaves)
    hits = index.search(np.asarray(q), 10, beam=beam)
    if tree is not None:
        log_pq = np.asarray(model.route_queries(q))
        clear = np.abs(np.sort(log_pq, 1)[:, -1] - np.sort(log_pq, 1)[:, -2]) > 1e-5
        assert np.array_equal(hits.leaves[clear, 0], log_pq.argmax(1)[clear])
        log_pd = np.asarray(model.route_documents(d))
        home = np.repeat(np.arange(index.num_leaves), index.leaf_sizes)
        of_row = np.empty(ROWS, int)
        of_row[index.segments[0].leaf_rows] = home
        margin = np.sort(log_pd, 1)[:, -1] - np.sort(log_pd, 1)[:, -2]
        assert np.array_equal(of_row[margin > 1e-5], log_pd.argmax(1)[margin > 1e-5])
    scores = jax_search(model, q, d, hits.leaves)
    for row in range(len(q)):
        found = hits.rows[row][hits.rows[row] >= 0]
        best = np.sort(scores[row])[::-1][: len(found)]
        np.testing.assert_allclose(scores[row, found], best, atol=1e-5)
        np.testing.assert_allclose(hits.scores[row, : len(found)], best, atol=1e-5)
    full = index.search(np.asarray(q), 10, beam=index.num_leaves)
    everything = jax_search(
        model, q, d, np.tile(np.arange(index.num_leaves), (len(q), 1))
    )
    best = np.sort(everything, 1)[:, ::-1][:, :10]
    np.testing.assert_allclose(full.scores, best, atol=1e-5)
    assert (full.visited == ROWS).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("num_codewords", [16, 256])
@pytest.mark.parametrize("residual", [False, True], ids=["flat", "residual"])
def test_every_score_is_that_of_the_index(score, num_codewords, residual):
    tree = None
    if residual:
        tree = {"kind": "per_node", "height": 1, "branching": 4, "hidden": 0}
    graphdef, params = joint_index(
        tree, num_subspaces=4, num_codewords=num_codewords, rotation="learned",
        residual=residual, score=score,
    )  # fmt: skip
    model = merge_model(graphdef, params)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
    d = model.embed_documents(features[0])
    q = model.embed_queries(features[1, :32])
    log_pd = None if tree is None else model.route_documents(d)
    d_hat = model.quantise(d, log_pd)[0]
    trained_with = np.asarray(score_quantised(q, d_hat, d, model.score))
    index = build_index(
        np.asarray(d), np.arange(ROWS), **index_arrays(graphdef, params)
    )
    assert index.score == score

    x, q, d = (np.asarray(a, np.float64) for a in (d_hat, q, d))
    products, squares = q @ x.T, np.square(x).sum(1)
    if score in FACTORED:
        exact = 1 / (np.sqrt(squares) if score == "cosine" else (x * d).sum(1))
        stored = np.empty(ROWS, np.uint8)
        stored[index.segments[0].leaf_rows] = index.segments[0].factors
        # A factor half-way between two bytes may be rounded either way.
        assert (stored == factor_bytes(exact)).mean() > 0.98
        np.testing.assert_allclose(trained_with, products * exact, atol=1e-5)
        expected = products * factor_table()[stored]
        np.testing.assert_allclose(expected, trained_with, rtol=0.0055)
    else:
        expected = products + (1 - squares) / 2 if score == "l2" else products
        np.testing.assert_allclose(trained_with, expected, atol=1e-5)
    hits = index.search(q.astype(np.float32), 10, beam=index.num_leaves)
    best = np.sort(expected, 1)[:, ::-1][:, :10]
    np.testing.assert_allclose(hits.scores, best, atol=1e-5)
    found = np.take_along_axis(expected, hits.rows, 1)
    np.testing.assert_allclose(found, best, atol=1e-5)


def test_the_frozen_codebooks_choose_and_the_trained_ones_decode():
    graphdef, params = joint_index(
        None, num_subspaces=4, num_codewords=16, rotation="givens", frozen_codes=True
    )
    frozen = params["quantiser/assign_codebooks"]
    trained = params["quantiser/codebooks"]
    assert np.abs(frozen - trained).max() > 0.1
    rotation = params["rotation/turned"]
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(WIDTH), atol=1e-6)
    d = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    index = build_index(d, np.arange(ROWS), **index_arrays(graphdef, params))
    parts = (d @ np.asarray(rotation)).reshape(ROWS, 4, 1, 4)
    codes = np.square(parts - np.asarray(frozen)).sum(-1).argmin(-1)  # (N, M)
    z_hat = np.asarray(trained)[np.arange(4), codes].reshape(ROWS, WIDTH)
    hits = index.search(d[:20], 5, beam=1)
    scores = d[:20] @ (z_hat @ np.asarray(rotation).T).T
    np.testing.assert_allclose(hits.scores, -np.sort(-scores, 1)[:, :5], atol=1e-4)
