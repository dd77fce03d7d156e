"""The losses of the tree: where queries and documents go, and how evenly.

What `ehi.train.losses` says of `where`, `weights` and the mean over the rows holds here
as well.
"""

import jax
import jax.numpy as jnp

from ehi.train.losses import NEVER, TINY, as_float32, masked, row_mean


def path_agreement(
    log_p_query: jax.Array,
    log_p_document: jax.Array,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""How improbable it is that a query and its document draw the same leaf.

    .. math:: -\log \sum_l p(l \mid q_n) \, p(l \mid d_n)

    Args:
      log_p_query: (N, P).
      log_p_document: (N, P), of the relevant document of each row.
      weights: (N,).
    """
    # Leaves of probability below 1e-38 still have a gradient: products stay logs.
    agree = jax.nn.logsumexp(as_float32(log_p_query) + as_float32(log_p_document), -1)
    return row_mean(-agree, weights)


def leaf_likelihood(
    log_p_query: jax.Array, leaves: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""How improbable it is that a query draws the leaf of its document.

    .. math:: -\log p(l_n \mid q_n) = \sum_h -\log p(i_h \mid i_1 \dots i_{h-1}, q_n)

    With a `per_node` tree each summand is a softmax of the node on the path against its
    siblings, which is the loss of JTR.

    Args:
      log_p_query: (N, P).
      leaves: (N,) int, where the relevant document of each row lives.
      weights: (N,).

    References:
      JTR: Li et al. 2023, arXiv 2304.11943, section 3.2.
    """
    chosen = jnp.take_along_axis(as_float32(log_p_query), leaves[:, None], -1)[:, 0]
    return row_mean(-chosen, weights)


def route_distillation(
    teacher_scores: jax.Array,
    log_p_document: jax.Array,
    log_p_query: jax.Array,
    where: jax.Array | None = None,
    *,
    teacher_temperature: float = 1.0,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""A query goes to the leaves that hold its teacher's neighbours.

    .. math:: -\sum_l \Big( \sum_c p_{nc} \, p(l \mid d_c) \Big) \log p(l \mid q_n),
      \quad p_n = \mathrm{softmax}(t_n / \tau_t)

    Args:
      teacher_scores: (N, C), without gradient.
      log_p_document: (C, P), log p(leaf | document).
      log_p_query: (N, P), log p(leaf | query).
      where: (N, C), candidates that count, at least one in a row.
      teacher_temperature: tau_t > 0; the smaller, the fewer neighbours matter.
      weights: (N,).
    """
    teacher = jax.lax.stop_gradient(as_float32(teacher_scores)) / teacher_temperature
    leaves = jnp.exp(as_float32(log_p_document))  # (C, P)
    target = jax.nn.softmax(masked(teacher, where)) @ leaves  # (N, P)
    return row_mean(-jnp.sum(target * as_float32(log_p_query), -1), weights)


def intra_leaf(
    similarity: jax.Array,
    path_similarity: jax.Array,
    where: jax.Array | None = None,
    *,
    threshold: float,
) -> jax.Array:
    r"""Documents that are not alike should not share a path.

    .. math:: \frac{1}{C (C - 1)} \sum_{i \ne j} 1[s_{ij} < \tau] \, T(d_i)^\top T(d_j)

    The indicator has no gradient, so the loss moves documents in the tree only.

    Args:
      similarity: (C, C), inner products of the documents' embeddings.
      path_similarity: (C, C), inner products of their path embeddings.
      where: (C, C), False for pairs to leave out (a document met twice, padding).
      threshold: tau; documents at least as similar as this may share a path.

    Returns:
      the mean over all ordered pairs that count.

    References:
      EHI: Kumar et al. 2023, arXiv 2310.08891, section 3, intra-leaf similarity.
    """
    counts = ~jnp.eye(similarity.shape[0], dtype=bool)
    if where is not None:
        counts &= where
    apart = counts & (similarity < threshold)
    shared = jnp.where(apart, as_float32(path_similarity), 0.0)
    return shared.sum() / jnp.maximum(counts.sum(), 1)


def load_balance(leaf_probs: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    r"""How far the mean leaf distribution of the documents is from uniform.

    .. math:: KL(\bar p \,\|\, 1/P) = \sum_l \bar p_l \log(P \bar p_l)

    Args:
      leaf_probs: (C, P), p(leaf | document).
      weights: (C,).

    Returns:
      from 0 (every leaf has the same load) to log P (one leaf has it all).
    """
    mean = jax.vmap(row_mean, (1, None))(as_float32(leaf_probs), weights)  # (P,)
    return jnp.sum(mean * jnp.log(jnp.maximum(mean, TINY) * mean.size))


def leaf_entropy(log_p: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    r"""How undecided the documents are between the leaves.

    .. math:: -\sum_l p(l \mid d_n) \log p(l \mid d_n)

    Args:
      log_p: (C, P), log p(leaf | document).
      weights: (C,).

    Returns:
      the mean, from 0 to log P.
    """
    log_p = jnp.maximum(as_float32(log_p), NEVER)  # 0 log 0 = 0
    return row_mean(-jnp.sum(jnp.exp(log_p) * log_p, -1), weights)
