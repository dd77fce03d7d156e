"""The losses of embeddings: values, and what their gradients move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import phase_of

from ehi.train import losses
from ehi.train.objective import raw_terms

N, D = 4, 3
Z, Z_HAT = (jax.random.normal(jax.random.key(seed), (N, D)) for seed in (0, 1))


def test_distortions_have_one_value_and_opposite_gradients():
    for loss, moves, stays in (
        (losses.codebook_distortion, 1, 0),
        (losses.commitment_distortion, 0, 1),
    ):
        value = np.square(np.asarray(Z - Z_HAT)).sum(-1).mean()
        np.testing.assert_allclose(loss(Z, Z_HAT), value, rtol=1e-6)
        gradients = jax.grad(loss, (0, 1))(Z, Z_HAT)
        expected = 2 * (Z - Z_HAT) / N * (-1 if moves else 1)
        np.testing.assert_allclose(gradients[moves], expected, rtol=1e-5)
        assert not gradients[stays].any()


def test_anchor_is_zero_at_the_origin_and_two_opposite_to_it():
    rows = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    assert losses.anchor(rows, rows) == 0
    assert losses.anchor(rows, -rows) == 2
    assert losses.anchor(rows, jnp.array([[1.0, 0.0], [1.0, 0.0]])) == 0.5
    weights = jnp.array([1.0, 0.0])
    assert losses.anchor(rows, -rows[::-1], weights) == 1


def test_anchors_of_both_sides_are_to_the_outputs_of_the_same_rows():
    origin = jnp.eye(3)
    tables = {"features_queries": origin, "features_documents": origin}
    batch = {"queries": jnp.array([2, 0]), "documents": jnp.array([1])}
    weights = {"anchor": 1.0, "query_anchor": 1.0}
    q, d = -origin[batch["queries"]], origin[jnp.array([2])]
    found = raw_terms(weights, phase_of(), tables, batch, q, d, None)
    assert found == {"anchor": 1, "query_anchor": 2}
    with pytest.raises(ValueError, match="anchor of queries needs a head as wide"):
        narrow = q[:, :2], d[:, :2]
        raw_terms({"query_anchor": 1.0}, phase_of(), tables, batch, *narrow, None)
