"""The losses of the tree: where queries and documents go, and how evenly.

`where`, `weights` and the mean over the rows are as in `ehi.train.losses`. All log
probabilities are natural logarithms, so the losses are in nats.
"""

import jax
import jax.numpy as jnp

from ehi.train.losses import NEVER, TINY, as_float32, masked, row_mean


def path_agreement(
    log_p_query: jax.Array,
    log_p_document: jax.Array,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""Minus the log-probability that a query and its document draw the same leaf.

    .. math:: -\log \sum_l p(l \mid q_n) \, p(l \mid d_n)

    Args:
      log_p_query: (N, P), log p(leaf | query).
      log_p_document: (N, P), log p(leaf | relevant document of the row).
      weights: (N,).

    Returns:
      the mean, >= 0; 0 if both are sure of the same leaf.

    References:
      none; this loss is ours.

    >>> import jax.numpy as jnp
    >>> from ehi.train.tree_losses import path_agreement
    >>> query, document = jnp.log(jnp.array([[[0.5, 0.5]], [[1.0, 0.0]]]))
    >>> print(f"{path_agreement(query, document):.3f}")  # log 2
    0.693
    """
    # Products stay logarithms, so leaves of probability below 1e-38 have a gradient.
    agree = jax.nn.logsumexp(as_float32(log_p_query) + as_float32(log_p_document), -1)
    return row_mean(-agree, weights)


def leaf_likelihood(
    log_p_query: jax.Array, leaves: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Minus the log-probability that a query draws a leaf of its document.

    .. math:: -\log p(l_n \mid q_n) = \sum_h -\log p(i_h \mid i_1 \dots i_{h-1}, q_n)

    With a `per_node` tree each summand is a softmax of the node on the path against its
    siblings, which is the loss of JTR. Of a document in several leaves any will do: the
    probabilities are added. The authors' code keeps one of the leaves as the label.

    Args:
      log_p_query: (N, P), log p(leaf | query).
      leaves: (N,) int, the leaf of each row's relevant document, or (N, s), all its
        leaves, which differ.
      weights: (N,).

    Returns:
      the mean, >= 0.

    References:
      JTR: Li et al. 2023, arXiv 2304.11943, section 3.2.

    >>> import jax.numpy as jnp
    >>> from ehi.train.tree_losses import leaf_likelihood
    >>> log_p = jnp.log(jnp.array([[0.25, 0.75]]))
    >>> print(f"{leaf_likelihood(log_p, jnp.array([0])):.3f}")  # log 4
    1.386
    """
    leaves = leaves.reshape(len(leaves), -1)  # (N, s)
    chosen = jnp.take_along_axis(as_float32(log_p_query), leaves, -1)
    return row_mean(-jax.nn.logsumexp(chosen, -1), weights)


def route_distillation(
    teacher_scores: jax.Array,
    log_p_document: jax.Array,
    log_p_query: jax.Array,
    where: jax.Array | None = None,
    *,
    teacher_temperature: float,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""Cross-entropy that sends a query to the leaves of its teacher's neighbours.

    .. math:: -\sum_l \Big( \sum_c p_{nc} \, p(l \mid d_c) \Big) \log p(l \mid q_n),
      \quad p_n = \mathrm{softmax}(t_n / \tau_t)

    The documents get a gradient as well: they move to where their queries look.

    Args:
      teacher_scores: (N, C); they get no gradient.
      log_p_document: (C, P), log p(leaf | document).
      log_p_query: (N, P), log p(leaf | query).
      where: (N, C), candidates that count, at least one in a row.
      teacher_temperature: tau_t > 0, in units of the teacher's scores; the smaller it
        is, the fewer neighbours matter.
      weights: (N,).

    Returns:
      the mean, >= 0.

    References:
      none; this loss is ours. For fixed clusters, routing learned from a ranking is of
      Vecchiato et al. 2024, SIGIR.

    >>> import jax.numpy as jnp
    >>> from ehi.train.tree_losses import route_distillation
    >>> teacher = jnp.log(jnp.array([[0.75, 0.25]]))
    >>> documents = jnp.log(jnp.eye(2) + 1e-30)  # each is sure of its own leaf
    >>> queries = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> arrays = teacher, documents, queries
    >>> loss = route_distillation(*arrays, teacher_temperature=1.0)
    >>> print(f"{loss:.3f}")  # log 2
    0.693
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
    r"""Path similarity of documents that are not alike.

    .. math:: \frac{1}{C (C - 1)} \sum_{i \ne j} 1[s_{ij} < \tau] \, T(d_i)^\top T(d_j)

    An EHI-style loss, whose exact form is from memory of the paper. The indicator has
    no gradient, so the loss moves documents in the tree only.

    Args:
      similarity: (C, C), inner products of the documents' embeddings.
      path_similarity: (C, C), inner products of their path embeddings.
      where: (C, C), False for pairs to leave out, such as padding.
      threshold: tau, in units of `similarity`; documents at least as alike may share a
        path.

    Returns:
      the mean over all ordered pairs that count.

    References:
      EHI: Kumar et al. 2023, arXiv 2310.08891, section 3, intra-leaf similarity.

    >>> import jax.numpy as jnp
    >>> from ehi.train.tree_losses import intra_leaf
    >>> alike = jnp.array([[1.0, 0.95, 0.1], [0.95, 1.0, 0.2], [0.1, 0.2, 1.0]])
    >>> loss = intra_leaf(alike, jnp.ones((3, 3)), threshold=0.9)
    >>> print(f"{loss:.3f}")  # 4 of the 6 ordered pairs are not alike
    0.667
    """
    counts = ~jnp.eye(similarity.shape[0], dtype=bool)
    if where is not None:
        counts &= where
    apart = counts & (similarity < threshold)
    shared = jnp.where(apart, as_float32(path_similarity), 0.0)
    return shared.sum() / jnp.maximum(counts.sum(), 1)


def load_balance(leaf_probs: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    r"""Divergence of the documents' mean leaf distribution from uniform.

    .. math:: KL(\bar p \,\|\, 1/P) = \sum_l \bar p_l \log(P \bar p_l)

    Args:
      leaf_probs: (C, P), p(leaf | document).
      weights: (C,).

    Returns:
      from 0, if all leaves have the same load, to log P, if one leaf has all of it.

    References:
      none; this loss is ours.

    >>> import jax.numpy as jnp
    >>> from ehi.train.tree_losses import load_balance
    >>> loss = load_balance(jnp.array([[1.0, 0.0], [1.0, 0.0]]))
    >>> print(f"{loss:.3f}")  # log 2
    0.693
    """
    mean = jax.vmap(row_mean, (1, None))(as_float32(leaf_probs), weights)  # (P,)
    return jnp.sum(mean * jnp.log(jnp.maximum(mean, TINY) * mean.size))


def leaf_entropy(log_p: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    r"""Entropy of the leaf distribution of a document.

    .. math:: -\sum_l p(l \mid d_n) \log p(l \mid d_n)

    Args:
      log_p: (C, P), log p(leaf | document).
      weights: (C,).

    Returns:
      the mean, from 0 to log P.

    References:
      none; this loss is ours.

    >>> import jax.numpy as jnp
    >>> from ehi.train.tree_losses import leaf_entropy
    >>> loss = leaf_entropy(jnp.log(jnp.array([[0.5, 0.5], [1.0, 0.0]])))
    >>> print(f"{loss:.3f}")  # log 2 and 0
    0.347
    """
    log_p = jnp.maximum(as_float32(log_p), NEVER)  # 0 log 0 = 0
    return row_mean(-jnp.sum(jnp.exp(log_p) * log_p, -1), weights)
