"""Balanced codes: every codeword gets its share of the batch (RepCONC)."""

import jax
import jax.numpy as jnp

# Iterations that scale by vectors between two in the log domain, and the log of the
# largest scaling: an entry that was rounded to 0 (below e^-87) stays below e^-27.
_SCALINGS = 9
_FAR = 30.0
# Keeps the quotient finite where all distances are equal.
_TINY = 1e-20
_EXACT = jax.lax.Precision.HIGHEST


def balanced_codes(
    codebooks: jax.Array, z: jax.Array, *, epsilon: float = 0.003, iterations: int
) -> jax.Array:
    r"""Codes near the embeddings that use all codewords equally often.

    .. math:: code_{nm} = \arg\max_k Q^m_{nk}, \quad
      Q^m = \mathrm{sinkhorn}(\tilde d^m), \quad
      \tilde d = (d - \mathrm{middle}) / \mathrm{amplitude} \in [-1, 1]

    where d are the squared distances in a subspace. This is for training; an index uses
    the nearest codewords. There is no gradient. The loop over subspaces keeps a plan in
    the cache: 512 rows of 24 x 256 codewords take 23 ms for 20 iterations on 2 cores,
    89 ms for 100.

    Args:
      codebooks: (M, K, S).
      z: rotated embeddings (N, D); a larger batch gives more equal shares.
      epsilon: softness of the assignment; a smaller one needs more iterations.
      iterations: of Sinkhorn's algorithm; 0 gives the nearest codewords.

    Returns:
      codes (N, M) int32.

    Raises:
      ValueError: for epsilon <= 0 or iterations < 0.

    References:
      RepCONC: Zhan et al. 2022, arXiv 2110.05789 (constrained clustering).
    """
    codebooks, z = jax.lax.stop_gradient((codebooks, z))
    m, k, s = codebooks.shape
    parts = z.reshape(z.shape[0], m, s).transpose(1, 0, 2)  # (M, N, S)

    def of_subspace(arrays):
        words, part = arrays  # (K, S), (N, S)
        norms = jnp.sum(part * part, -1)[:, None] + jnp.sum(words * words, -1)
        distances = norms - 2.0 * jnp.dot(part, words.T, precision=_EXACT)  # (N, K)
        low, high = distances.min(), distances.max()
        amplitude = jnp.maximum((high - low) / 2, _TINY)
        plan = sinkhorn((distances - low) / amplitude - 1.0, epsilon, iterations)
        # XLA vectorises two plain extrema on a CPU, but not argmax.
        number = jnp.arange(k, dtype=jnp.int32)
        return jnp.where(plan == plan.max(-1, keepdims=True), number, k).min(-1)

    return jax.lax.map(of_subspace, (codebooks, parts)).T


def sinkhorn(costs: jax.Array, epsilon: float, iterations: int) -> jax.Array:
    r"""The entropic transport plan from rows of weight 1 to columns of weight N/K.

    .. math:: Q_{nk} = u_n \exp(-c_{nk} / \epsilon) v_k

    An iteration scales columns to N/K, then rows to 1. With a small epsilon the
    exponentials leave the range of float32. So the state is log u and log v, and every
    tenth iteration runs in the log domain; the nine after it only multiply its plan by
    vectors. 24 plans of 512 x 256 take 76 ms for 100 iterations on 2 cores, and 410 ms
    with all iterations in the log domain, with the same codes.

    Args:
      costs: (..., N, K), finite.
      epsilon: > 0, in units of the costs.
      iterations: >= 0; 0 only scales the rows to 1.

    Returns:
      Q (..., N, K); rows sum to 1, and columns to N/K after convergence.

    Raises:
      ValueError: for epsilon <= 0 or iterations < 0.

    References:
      Cuturi 2013, arXiv 1306.0895; Schmitzer 2019, arXiv 1610.06519 (scalings
      absorbed into potentials).
    """
    if not epsilon > 0 or iterations < 0:
        raise ValueError(
            f"epsilon={epsilon} must be > 0 and iterations={iterations} >= 0"
        )
    n, k = costs.shape[-2:]
    energies = costs.astype(jnp.float32) / -epsilon  # (..., N, K)

    def in_logs(log_u):
        log_v = jnp.log(n / k) - _log_sum(energies + log_u[..., None], -2)
        return -_log_sum(energies + log_v[..., None, :], -1), log_v

    def plan(log_u, log_v):
        return jnp.exp(energies + log_u[..., None] + log_v[..., None, :])

    def ten(i, potentials):
        log_u, log_v = in_logs(potentials[0])
        now = plan(log_u, log_v)  # rows sum to 1, so nothing overflows

        def scale(_, scalings):
            v = _bounded((n / k) / jnp.einsum("...nk,...n->...k", now, scalings[0]))
            return _bounded(1.0 / jnp.einsum("...nk,...k->...n", now, v)), v

        left = jnp.minimum(_SCALINGS, iterations - i * (_SCALINGS + 1) - 1)
        ones = jnp.ones_like(log_u), jnp.ones_like(log_v)
        u, v = jax.lax.fori_loop(0, left, scale, ones)
        return log_u + jnp.log(u), log_v + jnp.log(v)

    log_v = jnp.zeros_like(energies[..., 0, :])
    potentials = -_log_sum(energies, -1), log_v
    if iterations:
        potentials = jnp.zeros_like(potentials[0]), log_v
        tens = -(-iterations // (_SCALINGS + 1))
        potentials = jax.lax.fori_loop(0, tens, ten, potentials)
    return plan(*potentials)


def _log_sum(x: jax.Array, axis: int) -> jax.Array:
    return jax.nn.logsumexp(x, axis)


def _bounded(scaling: jax.Array) -> jax.Array:
    """Limit a scaling (also 1 / 0) to the range in which the plan is exact enough."""
    return jnp.clip(scaling, jnp.exp(-_FAR), jnp.exp(_FAR))
