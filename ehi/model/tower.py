"""The tower: a transformer, from token ids to one vector per text.

Shapes beyond the alphabet of `ehi/__init__.py`: A attention heads, H width of the MLP,
G texts that share a row.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ehi.index.text.architectures import (
    Options,
    hidden_keys,
    relative_buckets,
    rotary_frequencies,
)
from ehi.index.text.settings import ACTIVATIONS, POOLINGS
from ehi.model.layer import TransformerLayer, norm_of, recomputed_layer
from ehi.model.tower_ops import linear_product, normed


class Tower(nnx.Module):
    """Tower of a known architecture; they differ in the arguments only.

    Args:
        vocab_size: V, rows of the word table.
        width: T, a multiple of `num_heads`.
        num_layers: transformer layers, addressed as `layers[i]`, first = 0.
        num_heads: attention heads of a layer.
        mlp_width: hidden width of a layer's MLP.
        max_positions: longest text, in tokens.
        options: how layers compute; see `Options`.
        type_vocab_size: rows of the token-type table; 0 = none (DistilBERT). Every
            token has type 0.
        norm_eps: added to the variance in layer norms.
        pooling: 'mean' or 'max' over the unmasked tokens, or the first ('cls') or
            'last' of them.
        normalise: scale the pooled vector to length one.
        projection: apply `Projection` after pooling (ANCE, STAR).
        dense: the `Dense` layers after that, as `settings.read_modules` lists them.
        dtype: of the matrix products, jnp.float32 or jnp.bfloat16; parameters are
            float32 in both cases.
        remat: keep only the inputs of layers, and run each again in the backward pass;
            may also be set later.
        rngs: source of the random start.

    Raises:
        ValueError: width is not a multiple of num_heads, or the pooling is unknown.

    Source: Devlin et al. 2019, arXiv:1810.04805; Sanh et al. 2019, arXiv:1910.01108;
    Liu et al. 2019, arXiv:1907.11692.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int,
        max_positions: int,
        type_vocab_size: int,
        options: Options = Options(),  # noqa: B008 (frozen)
        norm_eps: float = 1e-12,
        pooling: str = "mean",
        normalise: bool = True,
        projection: bool = False,
        dense: Sequence[Mapping] = (),
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if not options.head_width and width % num_heads:
            raise ValueError(
                f"width {width} is not a multiple of num_heads {num_heads}"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is not one of {POOLINGS}")
        self.pooling = pooling
        self.normalise = normalise
        self.max_positions = max_positions
        self.width = dense[-1]["width"] if dense else width
        self.dtype = dtype
        self.remat = remat

        def table(size: int):
            return nnx.Embed(size, width, dtype=dtype, rngs=rngs)

        def norm(wanted: bool):
            new = norm_of(options, width, epsilon=norm_eps, dtype=dtype, rngs=rngs)
            return new if wanted else None

        self.options = options
        self.head_width = options.head_width or width // num_heads
        self.words = table(vocab_size)
        self.positions = None if options.rotary else table(max_positions)
        self.types = table(type_vocab_size) if type_vocab_size else None
        self.norm = norm(options.embedding_norm)
        self.relative = (
            nnx.Embed(options.buckets, num_heads, rngs=rngs)
            if options.buckets
            else None
        )
        self.layers = nnx.List(
            TransformerLayer(
                width,
                num_heads=num_heads,
                mlp_width=mlp_width,
                norm_eps=norm_eps,
                options=options,
                first_norm=options.first_norm or number > 0,
                dtype=dtype,
                rngs=rngs,
            )
            for number in range(num_layers)
        )
        self.final_norm = norm(options.pre_norm)
        self.projection = (
            Projection(width, dtype=dtype, rngs=rngs) if projection else None
        )
        self.dense = _dense_layers(dense, width, dtype, rngs) if dense else None

    def __call__(self, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encode token ids to one vector for each text.

        A row holds one text, or several: then each text sees only its own tokens, and
        short texts take the room of padding. A row holds at most G = `texts_of_row(L)`
        texts.

        Args:
            token_ids: int array (N, L).
            mask: bool array (N, L), False on padding; if texts share rows, int array
                (N, L) that is 0 on padding and g on the tokens of the g-th text.

        Returns:
            float32 array (N, T), T being `width`; if texts share rows (N, G, T), in
            which absent texts are zero (or what layers after the pooling make of zero).

        Raises:
            ValueError: L exceeds `max_positions`. Shared rows may be longer, but not
                their texts.
        """
        shared = mask.dtype != bool
        if not shared and mask.shape[1] > self.max_positions:
            raise ValueError(
                f"{mask.shape[1]} tokens exceed the {self.max_positions} positions of "
                f"the encoder: tokenise with max_length <= {self.max_positions}"
            )
        if shared:
            positions = places_in_text(mask)  # (N, L)
            seen = mask[:, :, None] == mask[:, None, :]  # (N, L, L)
        else:
            positions, seen = jnp.arange(mask.shape[1]), mask[:, None, :]  # (N, 1, L)
        x = self.embed(token_ids, positions)  # (N, L, T)
        contexts = self.contexts(mask.shape, positions, seen)
        for number, layer in enumerate(self.layers):
            context = contexts[number in self.options.local]
            if self.remat:
                x = recomputed_layer(layer, x, *context)
            else:
                x = layer(x, *context)
        if self.final_norm is not None:
            x = normed(self.final_norm, x)
        # (N, G, T) or (N, T)
        pooled = self.pool_texts(x, mask, positions) if shared else self.pool(x, mask)
        if self.projection is not None:
            pooled = self.projection(pooled)
        for layer in self.dense or ():
            pooled = layer(pooled)
        return unit_rows(pooled) if self.normalise else pooled

    def embed(self, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """Normed sum of word, position and type vectors: (N, L) -> (N, L, T)."""
        x = self.words(token_ids)
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.types is not None:
            # nnx.Embed with one row, as RoBERTa has, refuses a scalar.
            shape = (1,) if self.types.num_embeddings == 1 else ()
            x = x + self.types(jnp.zeros(shape, jnp.int32))
        return x if self.norm is None else normed(self.norm, x)

    def contexts(self, shape, positions, seen):
        """What layers need beside token vectors: of global layers, and of local ones.

        Args:
            shape: (N, L).
            positions: of tokens in their texts, (L,) or (N, L).
            seen: which keys a query sees, bool (N, 1 or L, L).

        Returns:
            twice (bias, angles, relative), as `TransformerLayer` takes them.
        """
        options, columns = self.options, jnp.arange(shape[1])
        relative = None
        if self.relative is not None:
            # Tokens of a text stand side by side: columns give their distances.
            rows = relative_buckets(shape[1], options.buckets)
            relative = jnp.transpose(self.relative(rows), (2, 0, 1))  # (A, L, L)
        ahead = columns - columns[:, None]  # of keys

        def context(base, local):
            known = seen
            if options.causal or local:
                known = seen & ~hidden_keys(ahead, options, local)
            # The lowest finite number, because -inf makes NaN of a row of padding.
            lowest = jnp.finfo(jnp.float32).min
            bias = jnp.where(known, 0.0, lowest)[:, None]  # (N, 1, 1 or L, L)
            return bias, self.angles(shape, positions, base), relative

        every = context(options.rotary, False)
        return every, context(options.local_rotary, True) if options.local else every

    def angles(self, shape, positions, base):
        """Cosines and sines of rotary positions, (N L, 1, F / 2) each; or None."""
        if not base:
            return None
        places = jnp.broadcast_to(positions, shape).reshape(-1, 1, 1)
        angles = places * rotary_frequencies(base, self.head_width)
        return jnp.cos(angles), jnp.sin(angles)

    def pool(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Pool token vectors x (N, L, T) to float32 (N, T)."""
        if self.pooling == "cls":
            # A text without tokens is zero, as with 'mean'.
            return jnp.where(mask[:, :1], x[:, 0], 0).astype(jnp.float32)
        if self.pooling == "last":
            last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)  # padding is on the right
            found = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
            return jnp.where(mask[:, :1], found, 0).astype(jnp.float32)
        if self.pooling == "max":
            return _zero_if_absent(
                jnp.max(jnp.where(mask[..., None], x, -jnp.inf), axis=1)
            )
        kept = mask[..., None].astype(jnp.float32)  # (N, L, 1)
        total = jnp.sum(x.astype(jnp.float32) * kept, axis=1)
        return total / jnp.maximum(jnp.sum(kept, axis=1), 1.0)

    def pool_texts(self, x, segments, positions) -> jax.Array:
        """Pool token vectors x (N, L, T) of shared rows to float32 (N, G, T)."""
        names = jnp.arange(1, texts_of_row(segments.shape[1]) + 1)
        if self.pooling == "max":
            groups = len(names) + 1  # and the padding
            largest = functools.partial(jax.ops.segment_max, num_segments=groups)
            return _zero_if_absent(jax.vmap(largest)(x, segments)[:, 1:])
        kept = segments[:, None, :] == names[:, None]  # (N, G, L)
        if self.pooling == "cls":
            kept = kept & (positions == 0)[:, None, :]
        if self.pooling == "last":
            after = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
            kept = kept & (segments != after)[:, None, :]
        kept = kept.astype(jnp.float32)
        # This product only selects and adds; TF32 would round the vectors.
        total = jnp.matmul(kept, x.astype(jnp.float32), precision="highest")
        return total / jnp.maximum(jnp.sum(kept, axis=2, keepdims=True), 1.0)


def _zero_if_absent(x: jax.Array) -> jax.Array:
    """Maxima in float32; zero where there was no token."""
    return jnp.where(jnp.isneginf(x), 0, x).astype(jnp.float32)


class Projection(nnx.Module):
    r"""Linear layer and layer norm that ANCE and STAR put on top of RoBERTa.

    .. math:: y = \mathrm{norm}(x W + b)

    Args:
        width: T.
        dtype: of the matrix product; the layer norm stays float32.
        rngs: source of the random start.

    Source: Xiong et al. 2020, arXiv:2007.00808; Zhan et al. 2021, arXiv:2104.08051.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear = nnx.Linear(
            width, width, dtype=dtype, dot_general=linear_product, rngs=rngs
        )
        # PyTorch's default; the layers below may have another epsilon.
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map pooled vectors x (..., T) to float32 (..., T)."""
        return self.norm(self.linear(x))


class Dense(nnx.Module):
    r"""Dense layer of sentence-transformers, after the pooling.

    .. math:: y = f(x W + b)

    Args:
        in_width: of its inputs.
        out_width: of its outputs.
        bias: whether it adds b.
        activation: f, of `ACTIVATIONS`.
        dtype: of the matrix product.
        rngs: source of the random start.
    """

    def __init__(
        self, in_width: int, out_width: int, *, bias: bool, activation: str,
        dtype: jnp.dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not one of {ACTIVATIONS}")
        self.activation = activation
        self.linear = nnx.Linear(
            in_width, out_width, use_bias=bias, dtype=dtype,
            dot_general=linear_product, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map vectors x (..., inputs) to float32 (..., outputs)."""
        y = self.linear(x).astype(jnp.float32)
        if self.activation == "Tanh":
            return jnp.tanh(y)
        return jnp.maximum(y, 0) if self.activation == "ReLU" else y


def unit_rows(x: jax.Array) -> jax.Array:
    r"""Scale rows to length one; a zero row stays zero and has a finite gradient.

    .. math:: y = x / \max(\|x\|_2, 10^{-12})

    Args:
        x: vectors (..., D).

    Returns:
        float32 array (..., D).
    """
    x = x.astype(jnp.float32)
    # Clamping the square before the root keeps the gradient finite at zero.
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def texts_of_row(length: int) -> int:
    """The most texts that may share a row of L tokens: one for every 4 tokens."""
    return max(1, length // 4)


def places_in_text(segments: jax.Array) -> jax.Array:
    """Position of every token in its own text: segments (N, L) -> (N, L); padding 0."""
    columns = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segments != before, columns, 0)
    places = columns - jax.lax.cummax(starts, axis=1)
    return jnp.where(segments == 0, 0, places)


def _dense_layers(dense, width, dtype, rngs):
    """The Dense layers after the pooling, each as wide as `dense` says."""
    widths = [width, *(layer["width"] for layer in dense)]
    return nnx.List(
        Dense(
            widths[i], widths[i + 1], bias=layer["bias"],
            activation=layer["activation"], dtype=dtype, rngs=rngs,
        )
        for i, layer in enumerate(dense)
    )  # fmt: skip
