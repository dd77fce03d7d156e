"""The losses: pure functions of arrays that return a float32 scalar.

The formulas are those of one row; the loss is the weighted mean over the rows,
``sum_n w_n loss_n / sum_n w_n`` (0 if all weights are). Arguments in common:

  where: True where an entry counts, None for everywhere. A masked entry has no
    influence on value or gradient, whatever it holds.
  weights: of the rows, >= 0, None for all ones. A row of weight 0 has no influence.
"""

import jax
import jax.numpy as jnp

# Stands for minus infinity, of which differences and products would be NaN.
_NEVER = -1e30
# Keeps logarithms and quotients finite where there is nothing to count.
_TINY = jnp.finfo(jnp.float32).tiny


def softmax_contrastive(
    scores: jax.Array,
    target: jax.Array,
    where: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""Cross-entropy of the target among the candidates (InfoNCE).

    .. math:: -\log \frac{\exp(s_{nt} / \tau)}{\sum_c \exp(s_{nc} / \tau)}

    On quantised documents it is the matching loss of MoPQ.

    Args:
      scores: (N, C), of queries against candidate documents.
      target: (N,) int, the candidate that is relevant.
      where: (N, C), False for other known positives; the target always counts.
      temperature: tau > 0.
      weights: (N,).

    References:
      van den Oord et al. 2018, arXiv 1807.03748, eq. 4; MoPQ: Xiao et al. 2021, arXiv
      2104.07858.
    """
    is_target = _is_target(scores, target)  # (N, C)
    where = None if where is None else where | is_target
    scores = _masked(_float(scores) / temperature, where)
    positive = jnp.take_along_axis(scores, target[:, None], -1)[:, 0]  # (N,)
    return _mean(jax.nn.logsumexp(scores, -1) - positive, weights)


def hinge_contrastive(
    scores: jax.Array,
    target: jax.Array,
    where: jax.Array | None = None,
    *,
    margin: float,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""Hinge on every negative that comes within a margin of the target.

    .. math:: \frac{1}{|C^-_n|} \sum_{c \in C^-_n} [s_{nc} - s_{nt} + \gamma]_+

    With scores <u(q), v(d)> it is EHI's semantic similarity loss, with <T(q), T(d)> of
    path embeddings its indexing similarity loss. The paper sums over the negatives; the
    mean makes a weight mean the same for every size of the pool.

    Args:
      scores: (N, C).
      target: (N,) int, the candidate that is relevant.
      where: (N, C), False for other known positives; the target always counts.
      margin: gamma, in units of the scores.
      weights: (N,).

    Returns:
      the mean; 0 once every negative is a margin below its target.

    References:
      EHI: Kumar et al. 2023, arXiv 2310.08891, section 3, training objective.
    """
    negative = ~_is_target(scores, target)  # (N, C)
    negative = negative if where is None else negative & where
    scores = _float(scores)
    positive = jnp.take_along_axis(scores, target[:, None], -1)  # (N, 1)
    hinge = jnp.where(negative, jax.nn.relu(scores - positive + margin), 0.0)
    return _mean(hinge.sum(-1) / jnp.maximum(negative.sum(-1), 1), weights)


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
    agree = jax.nn.logsumexp(_float(log_p_query) + _float(log_p_document), -1)
    return _mean(-agree, weights)


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
    shared = jnp.where(apart, _float(path_similarity), 0.0)
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
    mean = jax.vmap(_mean, (1, None))(_float(leaf_probs), weights)  # (P,)
    return jnp.sum(mean * jnp.log(jnp.maximum(mean, _TINY) * mean.size))


def leaf_entropy(log_p: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    r"""How undecided the documents are between the leaves.

    .. math:: -\sum_l p(l \mid d_n) \log p(l \mid d_n)

    Args:
      log_p: (C, P), log p(leaf | document).
      weights: (C,).

    Returns:
      the mean, from 0 to log P.
    """
    log_p = jnp.maximum(_float(log_p), _NEVER)  # 0 log 0 = 0
    return _mean(-jnp.sum(jnp.exp(log_p) * log_p, -1), weights)


def codebook_distortion(
    z: jax.Array, z_hat: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Draws the chosen codewords to the embeddings, which stay.

    .. math:: \| \mathrm{sg}(z_n) - \hat z_n \|^2

    Args:
      z: (N, D), embeddings before quantisation.
      z_hat: (N, D), their reconstructions with a gradient to the codewords, from
        `ProductQuantiser.decode` (not the straight-through ones).
      weights: (N,).

    References:
      VQ-VAE: van den Oord et al. 2017, arXiv 1711.00937, eq. 3, second term.
    """
    return _mean(_squared_distance(jax.lax.stop_gradient(z), z_hat), weights)


def commitment_distortion(
    z: jax.Array, z_hat: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Draws the embeddings to their codewords, which stay.

    .. math:: \| z_n - \mathrm{sg}(\hat z_n) \|^2

    Args: as `codebook_distortion`, to which it is equal in value.

    References:
      VQ-VAE: van den Oord et al. 2017, arXiv 1711.00937, eq. 3, third term.
    """
    return _mean(_squared_distance(z, jax.lax.stop_gradient(z_hat)), weights)


def anchor(
    embeddings: jax.Array, origin: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Keeps embeddings near the pretrained encoder's, whose neighbours are good.

    .. math:: 1 - \langle d_n, o_n \rangle

    What is learned from labelled documents is pulled back on all others, so that it
    does not undo what the encoder knew of them.

    Args:
      embeddings: (N, D), unit rows.
      origin: (N, D), unit rows.
      weights: (N,).

    Returns:
      the mean, from 0 to 2.
    """
    cosine = jnp.sum(_float(embeddings) * _float(origin), -1)  # (N,)
    return _mean(1.0 - cosine, weights)


def distillation(
    teacher_scores: jax.Array,
    student_scores: jax.Array,
    where: jax.Array | None = None,
    *,
    teacher_temperature: float = 1.0,
    temperature: float = 1.0,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""The student ranks the candidates as the teacher does.

    .. math:: KL(p \,\|\, \hat p), \quad p = \mathrm{softmax}(t_n / \tau_t), \quad
      \hat p = \mathrm{softmax}(s_n / \tau)

    Args:
      teacher_scores: (N, C), without gradient.
      student_scores: (N, C), for instance on quantised documents.
      where: (N, C), candidates that count on both sides, at least one in a row.
      teacher_temperature: tau_t > 0.
      temperature: tau > 0.
      weights: (N,).

    Returns:
      the mean, >= 0; 0 for equal scores at equal temperatures.

    References:
      Distill-VQ: Xiao et al. 2022, arXiv 2204.00185 (ListNet on a dense teacher).
    """
    teacher = jax.lax.stop_gradient(_float(teacher_scores)) / teacher_temperature
    student = _float(student_scores) / temperature
    log_p = jax.nn.log_softmax(_masked(teacher, where))  # (N, C)
    log_q = jax.nn.log_softmax(_masked(student, where))  # (N, C)
    return _mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1), weights)


def route_distillation(
    teacher_scores: jax.Array,
    log_p_document: jax.Array,
    log_p_query: jax.Array,
    where: jax.Array | None = None,
    *,
    teacher_temperature: float = 1.0,
    weights: jax.Array | None = None,
    document_gradient: bool = False,
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
      document_gradient: let the documents move towards their queries' leaves as well.
    """
    teacher = jax.lax.stop_gradient(_float(teacher_scores)) / teacher_temperature
    leaves = jnp.exp(_float(log_p_document))  # (C, P)
    if not document_gradient:
        leaves = jax.lax.stop_gradient(leaves)
    target = jax.nn.softmax(_masked(teacher, where)) @ leaves  # (N, P)
    return _mean(-jnp.sum(target * _float(log_p_query), -1), weights)


def _float(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(_float(a) - _float(b)), -1)


def _masked(scores: jax.Array, where: jax.Array | None) -> jax.Array:
    return scores if where is None else jnp.where(where, scores, _NEVER)


def _is_target(scores: jax.Array, target: jax.Array) -> jax.Array:
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise ValueError(
            f"scores (N, C) and target (N,) have shapes {scores.shape}, {target.shape}"
        )
    return jnp.arange(scores.shape[1]) == target[:, None]  # (N, C)


def _mean(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
    if weights is None:
        return rows.mean()
    rows, weights = _float(rows), _float(weights)
    # 0 * inf would be NaN, and a row of padding must not spoil the mean.
    rows = jnp.where(weights > 0, rows * weights, 0.0)
    return rows.sum() / jnp.maximum(weights.sum(), _TINY)
