"""Product quantisation in the model: codebooks with straight-through gradients.

A rotated embedding z is cut into M subvectors. Each is replaced by the nearest of its K
codewords, whose M numbers are the code. `ehi.model.rotation` has the rotation.
"""

import jax
import jax.numpy as jnp
from flax import nnx

# Products rounded to TF32 or bfloat16 on an accelerator would choose other codes.
_EXACT = jax.lax.Precision.HIGHEST


def encode(codebooks: jax.Array, z: jax.Array) -> jax.Array:
    """The codes (N, M) int32 of rotated embeddings z (N, D), codebooks (M, K, S).

    ``code_m = argmin_k |z_m - c_mk|^2``. The loop over subspaces keeps only (K, N)
    distances at a time: 45 ms for 4,096 rows of 24 x 256 codewords on 2 cores; one
    einsum over all subspaces and argmin take 350 ms.
    """
    m, _, s = codebooks.shape
    parts = z.T.reshape(m, s, z.shape[0])  # (M, S, N)
    codebooks, parts = jax.lax.stop_gradient((codebooks, parts))
    return jax.lax.map(lambda part: nearest(*part), (codebooks, parts)).T


def nearest(
    words: jax.Array, columns: jax.Array, where: jax.Array | None = None
) -> jax.Array:
    """The word nearest to each column; among equals, the first.

    ``argmin_k |c_k|^2 / 2 - <x_n, c_k>``, the same as ``argmin_k |x_n - c_k|^2``.

    Args:
      words: c (K, S).
      columns: x' (S, N), transposed.
      where: (K, N), False for words that a column may not take.

    Returns:
      numbers (N,) int32.
    """
    half_norms = 0.5 * jnp.sum(words * words, -1, keepdims=True)  # (K, 1)
    distances = half_norms - jnp.dot(words, columns, precision=_EXACT)  # (K, N)
    if where is not None:
        distances = jnp.where(where, distances, jnp.inf)
    # XLA vectorises two plain minima on a CPU, but not argmin: half the time.
    number = jnp.arange(len(words), dtype=jnp.int32)[:, None]
    return jnp.where(distances == distances.min(0), number, len(words)).min(0)


def decode(codebooks: jax.Array, codes: jax.Array) -> jax.Array:
    """z_hat (N, D) of codes (N, M): the chosen codewords side by side.

    A gather from one list of the codewords of all subspaces. Its gradient, a
    scatter-add, is fast even on a CPU: 1 ms for 4,096 rows of 24 x 256 codewords; a
    product with one-hot codes takes 60-100 ms.
    """
    m, k, s = codebooks.shape
    chosen = codebooks.reshape(m * k, s)[codes + k * jnp.arange(m)]  # (N, M, S)
    return chosen.reshape(codes.shape[0], m * s)


class ProductQuantiser(nnx.Module):
    """M codebooks of K codewords; gradients reach the embedding and the codewords.

    Args:
      width: D, of the (rotated) embeddings.
      num_subspaces: M, which must divide D.
      num_codewords: K, 16 (half a byte a subspace) or 256 (one byte).
      frozen_codes: choose codes by the codebooks of the start, not by the trained ones,
        so that a document keeps its code (JPQ: Zhan et al. 2021, arXiv 2108.00644,
        section 4).
      rngs: key of the random codebooks, as long as subvectors of unit embeddings.
    """

    def __init__(
        self,
        width: int,
        *,
        num_subspaces: int,
        num_codewords: int,
        frozen_codes: bool = False,
        rngs: nnx.Rngs,
    ):
        check_sizes(width, num_subspaces, num_codewords)
        shape = (num_subspaces, num_codewords, width // num_subspaces)
        codebooks = jax.random.normal(rngs.params(), shape) / width**0.5
        self.codebooks = nnx.Param(codebooks)  # (M, K, S)
        self.assign_codebooks = nnx.Param(codebooks) if frozen_codes else None

    def start_from(self, codebooks: jax.Array) -> None:
        """Start from codebooks (M, K, S), in place: part of building the model."""
        self.codebooks[...] = jnp.asarray(codebooks)
        if self.assign_codebooks is not None:
            self.assign_codebooks[...] = jnp.asarray(codebooks)

    def encode(self, z: jax.Array) -> jax.Array:
        """Codes (N, M) int32 of rotated embeddings z (N, D)."""
        frozen = self.assign_codebooks
        return encode((self.codebooks if frozen is None else frozen)[...], z)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Reconstructions z_hat (N, D) of codes (N, M)."""
        return decode(self.codebooks[...], codes)

    def straight_through(
        self, z: jax.Array, codes: jax.Array, *, codeword_gradient: bool = True
    ) -> jax.Array:
        """z_hat with gradients to z and to the chosen codewords.

        ``z_hat + z - stop_gradient(z)``: the value is z_hat. The backward pass treats
        the choice of codewords as the identity (Bengio et al. 2013, arXiv 1308.3432;
        VQ-VAE, van den Oord et al. 2017, arXiv 1711.00937, section 3.2), and z_hat
        passes the same gradient to the codewords, as in MoPQ (Xiao et al. 2021, arXiv
        2104.07858).

        Args:
          z: rotated embeddings (N, D).
          codes: of z (N, M), from `encode` or `balanced_codes`.
          codeword_gradient: False stops before the codewords, as VQ-VAE and Poeem do.

        Returns:
          z_hat (N, D).
        """
        z_hat = self.decode(codes)
        if not codeword_gradient:
            z_hat = jax.lax.stop_gradient(z_hat)
        return z_hat + (z - jax.lax.stop_gradient(z))


def check_sizes(width: int, num_subspaces: int, num_codewords: int) -> None:
    """Refuse sizes that do not divide the width, or cannot be stored."""
    if num_subspaces < 1 or width % num_subspaces:
        raise ValueError(
            f"the embedding width {width} is not divisible by "
            f"num_subspaces={num_subspaces}"
        )
    if num_codewords not in (16, 256):
        raise ValueError(f"num_codewords={num_codewords} is not one of 16, 256")


def update_usage(usage: jax.Array, codes: jax.Array, decay: float) -> jax.Array:
    """Moving average of the share of rows that choose each codeword.

    ``usage <- decay usage + (1 - decay) share``; the shares of a subspace sum to 1.

    Args:
      usage: (M, K); start it at 1/K.
      codes: of a batch (N, M).
      decay: from 0 (only this batch) to 1.

    Returns:
      the new usage (M, K).
    """
    n, m = codes.shape
    k = usage.shape[1]
    number = (codes + k * jnp.arange(m)).reshape(-1)  # (N M,)
    share = jnp.zeros(m * k).at[number].add(1.0 / n).reshape(m, k)
    return decay * usage + (1.0 - decay) * share


def revive(
    codebooks: jax.Array,
    usage: jax.Array,
    vectors: jax.Array,
    key: jax.Array,
    *,
    threshold: float,
) -> jax.Array:
    """Move each codeword that is chosen too rarely onto a random subvector.

    A codeword that no row chooses gets no gradient and would stay unused. Placed on a
    subvector of the data, it is nearest to at least that one (the restarts of Jukebox:
    Dhariwal et al. 2020, arXiv 2005.00341, section 3.1).

    Args:
      codebooks: (M, K, S).
      usage: shares (M, K) from `update_usage`.
      vectors: subvectors (N, M, S) of rotated embeddings.
      key: of the choice of rows.
      threshold: codewords with a smaller share are moved; 1/K is the mean share.

    Returns:
      codebooks (M, K, S); those with a share of at least ``threshold`` are unchanged.
    """
    m, k, _ = codebooks.shape
    rows = jax.random.randint(key, (m, k), 0, vectors.shape[0])
    candidates = vectors[rows, jnp.arange(m)[:, None]]  # (M, K, S)
    dead = usage < threshold
    return jnp.where(dead[:, :, None], candidates, codebooks)


def num_subspaces(compression: int, *, tower_width: int, num_codewords: int) -> int:
    """M such that a document's codes have ``4 T / compression`` bytes."""
    code_bits = {16: 4, 256: 8}[num_codewords]
    bits = 8 * 4 * tower_width
    if bits % (compression * code_bits):
        raise ValueError(
            f"compression {compression}x of {4 * tower_width} bytes is not a whole "
            f"number of {code_bits}-bit codes"
        )
    return bits // (compression * code_bits)
