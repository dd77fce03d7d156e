r"""The losses of scores and of embeddings.

All losses, here and in `ehi.train.tree_losses`, are pure functions of arrays that
return a float32 scalar. A formula is that of one row; the loss is the weighted mean
over the rows, ``sum_n w_n loss_n / sum_n w_n``, or 0 if all weights are 0. Arguments in
common:

  where: True where an entry counts; None if all entries count. A masked entry has no
    influence on the value or on the gradient, whatever it holds.
  weights: weight of each row, >= 0; None for 1. A row of weight 0 has no influence.

Every loss of rows takes both, so that the objective can mask and weight any of them.

Scores and logits have no unit; a temperature divides them. Distances are squared, in
the units of the embeddings.
"""

import jax
import jax.numpy as jnp

# Stands for minus infinity; differences and products of infinities would be NaN.
NEVER = -1e30
# Keeps logarithms and quotients finite where nothing counts.
TINY = jnp.finfo(jnp.float32).tiny


def softmax_contrastive(
    scores: jax.Array,
    target: jax.Array,
    where: jax.Array | None = None,
    *,
    temperature: float,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""Cross-entropy of the relevant candidate among all candidates (InfoNCE).

    .. math:: -\log \frac{\exp(s_{nt} / \tau)}{\sum_c \exp(s_{nc} / \tau)}

    With scores of quantised documents it is the matching loss of MoPQ.

    Args:
      scores: (N, C), queries against candidate documents.
      target: (N,) int, the candidate that is relevant.
      where: (N, C), False for other known positives; the target always counts.
      temperature: tau > 0, in units of the scores.
      weights: (N,).

    Returns:
      the mean, in nats: 0 if the target has all the probability, log C for equal
      scores.

    Raises:
      ValueError: `target` has another number of rows than `scores`.

    References:
      van den Oord et al. 2018, arXiv 1807.03748, eq. 4; MoPQ: Xiao et al. 2021, arXiv
      2104.07858.

    >>> import jax.numpy as jnp
    >>> from ehi.train.losses import softmax_contrastive
    >>> scores = jnp.array([[2.0, 1.0, 0.0]])
    >>> loss = softmax_contrastive(scores, target=jnp.array([0]), temperature=1.0)
    >>> print(f"{loss:.3f}")  # log(e^2 + e + 1) - 2
    0.408
    """
    is_target = _is_target(scores, target)  # (N, C)
    where = None if where is None else where | is_target
    scores = masked(as_float32(scores) / temperature, where)
    positive = jnp.take_along_axis(scores, target[:, None], -1)[:, 0]  # (N,)
    return row_mean(jax.nn.logsumexp(scores, -1) - positive, weights)


def hardest_negatives(
    scores: jax.Array,
    target: jax.Array,
    where: jax.Array | None = None,
    *,
    count: int,
) -> jax.Array:
    """The target and the negatives with the highest scores.

    Args:
      scores: (N, C), queries against candidate documents; they get no gradient.
      target: (N,) int, the candidate that is relevant.
      where: (N, C), False for candidates that may not be chosen.
      count: negatives of each row, >= 1; with fewer candidates all of them.

    Returns:
      (N, C) bool, the `where` of a contrastive loss.

    Raises:
      ValueError: `target` has another number of rows than `scores`.

    References:
      RepCONC: the dynamic top-k of the authors' code (Zhan et al. 2022, arXiv
      2110.05789).

    >>> import jax.numpy as jnp
    >>> from ehi.train.losses import hardest_negatives
    >>> scores = jnp.array([[0.9, 0.2, 0.8, 0.5]])
    >>> print(hardest_negatives(scores, jnp.array([3]), count=2).astype(int))
    [[1 0 1 1]]
    """
    is_target = _is_target(scores, target)  # (N, C)
    allowed = ~is_target if where is None else ~is_target & where
    scores = masked(jax.lax.stop_gradient(as_float32(scores)), allowed)
    count = min(count, scores.shape[1])
    rows = jnp.arange(len(scores))[:, None]
    chosen = jnp.zeros(scores.shape, bool)
    chosen = chosen.at[rows, jax.lax.top_k(scores, count)[1]].set(True)
    return is_target | (chosen & allowed)


def hinge_contrastive(
    scores: jax.Array,
    target: jax.Array,
    where: jax.Array | None = None,
    *,
    margin: float,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""Hinge on every negative that comes within a margin of the relevant candidate.

    .. math:: \frac{1}{|C^-_n|} \sum_{c \in C^-_n} [s_{nc} - s_{nt} + \gamma]_+

    An EHI-style loss: with scores of embeddings it stands for the paper's semantic
    similarity, with those of path embeddings for its indexing similarity. The form is
    from memory of the paper, which has no public code. It sums over the negatives; with
    the mean, a weight means the same for every size of the pool.

    Args:
      scores: (N, C), queries against candidate documents.
      target: (N,) int, the candidate that is relevant.
      where: (N, C), False for other known positives; the target always counts.
      margin: gamma, in units of the scores.
      weights: (N,).

    Returns:
      the mean, in units of the scores; 0 if every negative is a margin below its
      target.

    Raises:
      ValueError: `target` has another number of rows than `scores`.

    References:
      EHI: Kumar et al. 2023, arXiv 2310.08891, section 3, training objective.

    >>> import jax.numpy as jnp
    >>> from ehi.train.losses import hinge_contrastive
    >>> scores = jnp.array([[0.9, 0.8, 0.1]])
    >>> loss = hinge_contrastive(scores, target=jnp.array([0]), margin=0.3)
    >>> print(f"{loss:.3f}")  # the second comes within 0.3, by 0.2
    0.100
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
    teacher_temperature: float,
    temperature: float,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""Divergence of the student's ranking of the candidates from the teacher's.

    .. math:: KL(p \,\|\, \hat p), \quad p = \mathrm{softmax}(t_n / \tau_t), \quad
      \hat p = \mathrm{softmax}(s_n / \tau)

    It is the cross-entropy of ListNet minus the teacher's entropy, which is a constant:
    the gradients are the same.

    Args:
      teacher_scores: (N, C); they get no gradient.
      student_scores: (N, C), for instance of quantised documents.
      where: (N, C), candidates that count on both sides, at least one in a row.
      teacher_temperature: tau_t > 0, in units of the teacher's scores.
      temperature: tau > 0, in units of the student's scores.
      weights: (N,).

    Returns:
      the mean, >= 0, in nats; 0 for equal scores at equal temperatures.

    References:
      ListNet: Cao et al. 2007, Learning to rank: from pairwise approach to listwise
      approach, ICML; with a dense teacher, Distill-VQ: Xiao et al. 2022, arXiv
      2204.00185.

    >>> import jax.numpy as jnp
    >>> from ehi.train.losses import distillation
    >>> teacher = jnp.log(jnp.array([[0.75, 0.25]]))
    >>> options = {"teacher_temperature": 1.0, "temperature": 1.0}
    >>> loss = distillation(teacher, jnp.zeros((1, 2)), **options)
    >>> print(f"{loss:.3f}")  # 0.75 log(0.75 / 0.5) + 0.25 log(0.25 / 0.5)
    0.131
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
    r"""Logistic loss of pairs, weighted by the change of MRR if the two swap ranks.

    .. math:: \frac{1}{|C^+_n| |C^-_n|} \sum_{p \in C^+_n} \sum_{c \in C^-_n}
      |w(r_{nc}) - w(r_{np})| \log(1 + \exp(s_{nc} - s_{np})), \quad
      w(r) = 1/r \text{ if } r \le cut \text{ else } 0

    It compares all C^2 pairs of a row: 4 N C^2 bytes for each array of pairs.

    Args:
      scores: (N, C), queries against candidate documents.
      ranks: (N, C), ranks in the search's result, from 1; they get no gradient. A
        document that was not found has rank 0 or less, and w = 0.
      relevant: (N, C) bool.
      where: (N, C), candidates that count.
      cut: the last rank that matters, >= 1.
      weights: (N,).

    Returns:
      the mean, >= 0; a row without a positive or without a negative has loss 0.

    Raises:
      ValueError: `cut` is below 1.

    References:
      JPQ: Zhan et al. 2021, arXiv 2108.00644, with w as in the authors' code;
      LambdaRank: Burges 2010, From RankNet to LambdaRank to LambdaMART, MSR-TR-2010-82.

    >>> import jax.numpy as jnp
    >>> from ehi.train.losses import lambda_rank
    >>> scores, ranks = jnp.array([[0.0, 0.0]]), jnp.array([[1, 2]])
    >>> loss = lambda_rank(scores, ranks, jnp.array([[False, True]]), cut=10)
    >>> print(f"{loss:.3f}")  # (1/1 - 1/2) log 2
    0.347
    """
    if not cut >= 1:
        raise ValueError(f"cut={cut}; must be >= 1")
    where = jnp.ones(scores.shape, bool) if where is None else where
    relevant = relevant.astype(bool)
    # Zero, not minus infinity: the difference of a pair must be finite both ways.
    scores = jnp.where(where, as_float32(scores), 0.0)
    ranks = jax.lax.stop_gradient(ranks)
    counted = where & (ranks >= 1) & (ranks <= cut)
    gain = jnp.where(counted, 1.0 / jnp.where(counted, ranks, 1), 0.0)  # (N, C)
    pairs = (relevant & where)[:, :, None] & (~relevant & where)[:, None]  # (N, C, C)
    change = jnp.abs(gain[:, :, None] - gain[:, None])
    wrong = jax.nn.softplus(scores[:, None] - scores[:, :, None])
    total = jnp.sum(jnp.where(pairs, change * wrong, 0.0), (1, 2))  # (N,)
    return row_mean(total / jnp.maximum(pairs.sum((1, 2)), 1), weights)


def codebook_distortion(
    z: jax.Array, z_hat: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Squared distance that moves the chosen codewords towards the embeddings.

    .. math:: \| \mathrm{sg}(z_n) - \hat z_n \|^2

    Args:
      z: (N, D), embeddings before quantisation; they get no gradient.
      z_hat: (N, D), their reconstructions by `ProductQuantiser.decode`, which have a
        gradient to the codewords (the straight-through ones have none).
      weights: (N,).

    Returns:
      the mean, >= 0, in squared units of the embeddings.

    References:
      VQ-VAE: van den Oord et al. 2017, arXiv 1711.00937, eq. 3, second term.

    >>> import jax.numpy as jnp
    >>> from ehi.train.losses import codebook_distortion
    >>> z, z_hat = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])
    >>> print(codebook_distortion(z, z_hat))
    4.0
    """
    return row_mean(_squared_distance(jax.lax.stop_gradient(z), z_hat), weights)


def commitment_distortion(
    z: jax.Array, z_hat: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Squared distance that moves the embeddings towards their codewords.

    .. math:: \| z_n - \mathrm{sg}(\hat z_n) \|^2

    Its value is that of `codebook_distortion`.

    Args:
      z: (N, D), embeddings before quantisation.
      z_hat: (N, D), their reconstructions; they get no gradient.
      weights: (N,).

    Returns:
      the mean, >= 0, in squared units of the embeddings.

    References:
      VQ-VAE: van den Oord et al. 2017, arXiv 1711.00937, eq. 3, third term.

    >>> import jax
    >>> from ehi.train.losses import commitment_distortion
    >>> z, z_hat = jax.numpy.array([[1.0, 2.0]]), jax.numpy.array([[1.0, 0.0]])
    >>> print(jax.grad(commitment_distortion)(z, z_hat))
    [[0. 4.]]
    """
    return row_mean(_squared_distance(z, jax.lax.stop_gradient(z_hat)), weights)


def anchor(
    embeddings: jax.Array, origin: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Cosine distance of embeddings from those of the pretrained encoder.

    .. math:: 1 - \langle d_n, o_n \rangle

    Training on labelled pairs moves all other texts as well. The anchor holds them back
    where the encoder ranked them well. It is loss `anchor` for documents, and
    `query_anchor` for queries.

    Args:
      embeddings: (N, D), rows of unit length.
      origin: (N, D), rows of unit length.
      weights: (N,).

    Returns:
      the mean, from 0 to 2.

    References:
      none; this loss is ours.

    >>> import jax.numpy as jnp
    >>> from ehi.train.losses import anchor
    >>> loss = anchor(jnp.array([[1.0, 0.0]]), jnp.array([[0.6, 0.8]]))
    >>> print(f"{loss:.3f}")  # 1 - 0.6
    0.400
    """
    cosine = jnp.sum(as_float32(embeddings) * as_float32(origin), -1)  # (N,)
    return row_mean(1.0 - cosine, weights)


# Shared by all losses, here and in `ehi.train.tree_losses`.


def as_float32(x: jax.Array) -> jax.Array:
    """The array in float32: losses are computed in it, whatever the model is in.

    >>> import jax.numpy as jnp
    >>> from ehi.train.losses import as_float32
    >>> print(as_float32(jnp.ones(2, jnp.bfloat16)).dtype)
    float32
    """
    return x.astype(jnp.float32)


def masked(scores: jax.Array, where: jax.Array | None) -> jax.Array:
    """Scores with `NEVER` in the place of those that do not count.

    >>> import jax.numpy as jnp
    >>> from ehi.train.losses import masked
    >>> print(masked(jnp.array([1.0, 2.0]), jnp.array([True, False])))
    [ 1.e+00 -1.e+30]
    """
    return scores if where is None else jnp.where(where, scores, NEVER)


def row_mean(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
    r"""The weighted mean of a loss over the rows; 0 if all weights are 0.

    .. math:: \sum_n w_n x_n / \sum_n w_n

    Args:
      rows: (N,), the loss of each row.
      weights: (N,), >= 0; None for 1.

    >>> import jax.numpy as jnp
    >>> from ehi.train.losses import row_mean
    >>> print(row_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1.0, 3.0, 0.0])))
    2.5
    """
    if weights is None:
        return rows.mean()
    rows, weights = as_float32(rows), as_float32(weights)
    # 0 * inf would be NaN, and a row of padding must not spoil the mean.
    rows = jnp.where(weights > 0, rows * weights, 0.0)
    return rows.sum() / jnp.maximum(weights.sum(), TINY)


def _squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(as_float32(a) - as_float32(b)), -1)


def _is_target(scores: jax.Array, target: jax.Array) -> jax.Array:
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise ValueError(
            f"scores (N, C) and target (N,) have shapes {scores.shape}, {target.shape}"
        )
    return jnp.arange(scores.shape[1]) == target[:, None]  # (N, C)
