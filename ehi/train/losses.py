"""The losses of scores: queries against candidate documents.

All losses, here and in `ehi.train.tree_losses` and `ehi.train.losses`, are pure
functions of arrays that return a float32 scalar. The formulas are those of one row; the
loss is the weighted mean over the rows, ``sum_n w_n loss_n / sum_n w_n`` (0 if all
weights are). Arguments in common:

  where: True where an entry counts, None for everywhere. A masked entry has no
    influence on value or gradient, whatever it holds.
  weights: of the rows, >= 0, None for all ones. A row of weight 0 has no influence.
"""

import jax
import jax.numpy as jnp


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
    scores = masked(as_float32(scores) / temperature, where)
    positive = jnp.take_along_axis(scores, target[:, None], -1)[:, 0]  # (N,)
    return row_mean(jax.nn.logsumexp(scores, -1) - positive, weights)


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
    scores = as_float32(scores)
    positive = jnp.take_along_axis(scores, target[:, None], -1)  # (N, 1)
    hinge = jnp.where(negative, jax.nn.relu(scores - positive + margin), 0.0)
    return row_mean(hinge.sum(-1) / jnp.maximum(negative.sum(-1), 1), weights)


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
      the mean, >= 0; 0 for equal scores at equal temperatures. It is the cross-entropy
      of ListNet less the teacher's entropy, a constant, so the gradients are equal.

    References:
      ListNet: Cao et al. 2007, Learning to rank: from pairwise approach to listwise
      approach, ICML; on a dense teacher, Distill-VQ: Xiao et al. 2022, arXiv
      2204.00185.
    """
    teacher = jax.lax.stop_gradient(as_float32(teacher_scores)) / teacher_temperature
    student = as_float32(student_scores) / temperature
    log_p = jax.nn.log_softmax(masked(teacher, where))  # (N, C)
    log_q = jax.nn.log_softmax(masked(student, where))  # (N, C)
    return row_mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1), weights)


def lambda_rank(
    scores: jax.Array,
    ranks: jax.Array,
    relevant: jax.Array,
    where: jax.Array | None = None,
    *,
    cut: int,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""Pairs in the wrong order cost what their exchange would gain in MRR.

    .. math:: \frac{1}{|C^+_n| |C^-_n|} \sum_{p \in C^+_n} \sum_{c \in C^-_n}
      |w(r_{nc}) - w(r_{np})| \log(1 + \exp(s_{nc} - s_{np})), \quad
      w(r) = 1/r \text{ if } r \le cut \text{ else } 0

    All C^2 pairs of a row are looked at: 4 N C^2 bytes a copy.

    Args:
      scores: (N, C), of queries against candidate documents.
      ranks: (N, C), places in the search's result from 1 on, without gradient; 0 or
        less for a document that was not found, which has w = 0.
      relevant: (N, C) bool.
      where: (N, C), candidates that count.
      cut: the last rank that matters, >= 1.
      weights: (N,).

    Returns:
      the mean; a row without a positive or without a negative has loss 0.

    Raises:
      ValueError: for a cut < 1.

    References:
      JPQ: Zhan et al. 2021, arXiv 2108.00644; LambdaRank: Burges 2010, From RankNet to
      LambdaRank to LambdaMART, MSR-TR-2010-82.
    """
    if not cut >= 1:
        raise ValueError(f"cut={cut}; must be >= 1")
    where = jnp.ones(scores.shape, bool) if where is None else where
    relevant = relevant.astype(bool)
    # Zero instead of minus infinity: a pair's difference must be finite on both sides.
    scores = jnp.where(where, as_float32(scores), 0.0)
    ranks = jax.lax.stop_gradient(ranks)
    counted = where & (ranks >= 1) & (ranks <= cut)
    gain = jnp.where(counted, 1.0 / jnp.where(counted, ranks, 1), 0.0)  # (N, C)
    pairs = (relevant & where)[:, :, None] & (~relevant & where)[:, None]  # (N, C, C)
    change = jnp.abs(gain[:, :, None] - gain[:, None])
    wrong = jax.nn.softplus(scores[:, None] - scores[:, :, None])
    total = jnp.sum(jnp.where(pairs, change * wrong, 0.0), (1, 2))  # (N,)
    return row_mean(total / jnp.maximum(pairs.sum((1, 2)), 1), weights)


def _is_target(scores: jax.Array, target: jax.Array) -> jax.Array:
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise ValueError(
            f"scores (N, C) and target (N,) have shapes {scores.shape}, {target.shape}"
        )
    return jnp.arange(scores.shape[1]) == target[:, None]  # (N, C)


# MERGED ehi_train_masking: What all losses share: masks, and weighted means over the
# rows.

# Stands for minus infinity, of which differences and products would be NaN.
NEVER = -1e30
# Keeps logarithms and quotients finite where there is nothing to count.
TINY = jnp.finfo(jnp.float32).tiny


def as_float32(x: jax.Array) -> jax.Array:
    """Losses are computed in float32, whatever the model is in."""
    return x.astype(jnp.float32)


def masked(scores: jax.Array, where: jax.Array | None) -> jax.Array:
    """Scores, those that do not count as good as minus infinity."""
    return scores if where is None else jnp.where(where, scores, NEVER)


def row_mean(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The mean of a loss (N,), weighted by rows; 0 if all weights are."""
    if weights is None:
        return rows.mean()
    rows, weights = as_float32(rows), as_float32(weights)
    # 0 * inf would be NaN, and a row of padding must not spoil the mean.
    rows = jnp.where(weights > 0, rows * weights, 0.0)
    return rows.sum() / jnp.maximum(weights.sum(), TINY)


# MERGED ehi_train_vector_losses: The losses of embeddings: how far they are from their
# codewords, and their start.
#
# What `ehi.train.losses` says of `weights` and the mean over the rows holds here as
# well.
#


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
    return row_mean(_squared_distance(jax.lax.stop_gradient(z), z_hat), weights)


def commitment_distortion(
    z: jax.Array, z_hat: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Draws the embeddings to their codewords, which stay.

    .. math:: \| z_n - \mathrm{sg}(\hat z_n) \|^2

    Args: as `codebook_distortion`, to which it is equal in value.

    References:
      VQ-VAE: van den Oord et al. 2017, arXiv 1711.00937, eq. 3, third term.
    """
    return row_mean(_squared_distance(z, jax.lax.stop_gradient(z_hat)), weights)


def anchor(
    embeddings: jax.Array, origin: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Keeps embeddings near the pretrained encoder's, whose neighbours are good.

    .. math:: 1 - \langle d_n, o_n \rangle

    What is learned from labelled pairs is pulled back on everything else, so that it
    does not undo what the encoder knew of it. Of documents this is loss `anchor`, of
    queries `query_anchor`.

    Args:
      embeddings: (N, D), unit rows.
      origin: (N, D), unit rows.
      weights: (N,).

    Returns:
      the mean, from 0 to 2.
    """
    cosine = jnp.sum(as_float32(embeddings) * as_float32(origin), -1)  # (N,)
    return row_mean(1.0 - cosine, weights)


def _squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(as_float32(a) - as_float32(b)), -1)
