"""NumPy forward pass of the text tower: token ids -> pooled vectors.

This is what `ehi.model.tower.Tower` computes, to float32 rounding. Token vectors are
columns, x (T, n): then a checkpoint's weights (outputs, inputs) are used as stored, and
for the 10 tokens of a query W x is 1.3 to 1.9 times faster than x W. The tokens of
several texts stand side by side without padding, n tokens in all. Only attention looks
at one text, or m texts of equal length, at a time.

Shapes: A heads, F = T / A their width, U hidden width of the MLP, n tokens.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ehi.index.check import check_count
from ehi.index.search.blas import one_blas_thread
from ehi.index.text.architectures import (
    Options,
    head_sizes,
    hidden_keys,
    module_parts,
    options_of,
    relative_buckets,
    rotary_frequencies,
)
from ehi.index.text.checkpoint import open_tensors, read_checkpoint, side_by_side
from ehi.index.text.settings import Dense, Projection, overridden, read_dense

CHUNK_TOKENS = 512  # computed at a time, so that the hidden layer stays in cache
BLOCK = 1 << 15  # numbers that gelu takes at a time: they and two copies fit in L2
# log Phi(-a) on 0 <= a <= 6, constant term first: minimax for the error of gelu, 5e-8.
LOG_TAIL = (
    -6.93142369e-01, -7.97952231e-01, -3.17995765e-01, -3.70224988e-02,
    5.60115467e-03, -5.33190548e-04, 2.29390559e-05,
)  # fmt: skip
TAIL_END = 6.0  # beyond it a Phi(-a) is less than 1e-8


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights of one layer, float32; vectors are columns (T, 1), or None.

    Attributes:
        qkv: ((A + 2K) F, T); queries leave it, or their norm, divided by sqrt F.
        out: (T, A F).
        mlp_in: (U, T); of a gated MLP (2U, T).
        mlp_out: (T, U).
        qkv_bias, out_bias, mlp_in_bias, mlp_out_bias: one number an output.
        attention_norm, mlp_norm: scale and bias, (T, 1) each.
        query_norm, key_norm: the same for a head, (F, 1).
    """

    qkv: np.ndarray
    out: np.ndarray
    mlp_in: np.ndarray
    mlp_out: np.ndarray
    qkv_bias: np.ndarray | None
    out_bias: np.ndarray | None
    mlp_in_bias: np.ndarray | None
    mlp_out_bias: np.ndarray | None
    attention_norm: tuple | None
    mlp_norm: tuple
    query_norm: tuple | None = None
    key_norm: tuple | None = None


@dataclass(frozen=True, eq=False)
class Tower:
    """Text tower: lists of token ids -> (N, T) float32.

    Attributes:
        words: (V, T) floats.
        positions: (max_positions, T) float32, the vector of token type 0 added; the
            first row is that of a text's first token. Without a table of positions
            all rows are one.
        norm: scale and bias of the embedding norm, (T, 1) each; or None.
        layers: first to last.
        num_heads: A.
        norm_eps: added to the variance in layer norms.
        pooling: 'mean' or 'max' over the tokens, 'cls', the first, or 'last'.
        normalise: scale the pooled vector to length one.
        projection: applied to the pooled vector before that, or None.
        dense: layers after the projection, first to last.
        options: how layers compute.
        relative: table of relative positions (rows, A), or None.
        final_norm: of the last layer's outputs, or None.

    Source: Devlin et al. 2019, arXiv:1810.04805; Sanh et al. 2019, arXiv:1910.01108.
    """

    words: np.ndarray
    positions: np.ndarray
    norm: tuple | None
    layers: tuple[Layer, ...]
    num_heads: int
    norm_eps: float
    pooling: str
    normalise: bool
    projection: Projection | None = None
    dense: tuple[Dense, ...] = ()
    options: Options = Options()
    relative: np.ndarray | None = None
    final_norm: tuple | None = None

    @property
    def width(self):
        return len(self.dense[-1].bias) if self.dense else self.words.shape[1]

    def __call__(self, token_rows, *, threads=1):
        """Encode N texts.

        Args:
            token_rows: N lists of token ids; an empty list gives a zero row.
            threads: Python threads that share a batch of many texts. BLAS itself has
                one: for one query a second BLAS thread halves the time on idle cores,
                but triples it on busy ones.

        Returns:
            float32 array (N, T).

        Raises:
            ValueError: a token id outside the word table, or a text of more tokens
                than there are positions; threads below 1.
        """
        threads = check_count("threads", threads)
        lengths = np.array([len(row) for row in token_rows], np.int64)
        pooled = np.zeros((len(lengths), self.width), np.float32)
        longest = int(lengths.max(initial=0))
        if longest > len(self.positions):
            raise ValueError(
                f"a text of {longest} tokens exceeds the {len(self.positions)} "
                "positions of the tower"
            )
        order = np.argsort(lengths, kind="stable")
        chunks = list(split_by_tokens(order[lengths[order] > 0], lengths))

        def run(chunk):
            ids = np.concatenate([np.asarray(token_rows[i], np.int64) for i in chunk])
            pooled[chunk] = self.forward(ids, lengths[chunk])

        with one_blas_thread():
            if threads == 1 or len(chunks) < 2:
                for chunk in chunks:
                    run(chunk)
            else:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(run, chunks))
        return unit_rows(pooled) if self.normalise else pooled

    def forward(self, ids, lengths):
        """Pooled and projected vectors of m texts, each of at least one token.

        Args:
            ids: (n,) token ids, text after text.
            lengths: (m,) tokens of each text, ascending.

        Returns:
            float32 array (m, T'), not normalised; T' is `width`.
        """
        if ids.min() < 0 or ids.max() >= len(self.words):
            raise ValueError(
                f"token ids {ids.min()}..{ids.max()} are outside the word table of "
                f"{len(self.words)} rows: tokenizer.json is not that of the tower"
            )
        x = self.words[ids].astype(np.float32, copy=False)
        x += self.positions[np.concatenate([np.arange(size) for size in lengths])]
        x = np.ascontiguousarray(x.T)  # (T, n)
        width, tokens = x.shape
        mixed = self.layers[0].out.shape[1]  # A F
        scratch = np.empty((max(width, mixed), tokens), np.float32)
        qkv = np.empty((3 * mixed, tokens), np.float32)
        hidden = np.empty((len(self.layers[0].mlp_in), tokens), np.float32)
        update = np.empty_like(x) if width > len(qkv) else qkv[:width]
        runs = equal_runs(lengths)
        contexts = self.contexts(runs, lengths)
        if self.norm is not None:
            self.normalise_columns(x, self.norm, scratch[:width])
        for number, layer in enumerate(self.layers):
            angles, logits = contexts[number in self.options.local]
            entering = self.entering(x, layer.attention_norm, scratch)
            rows = qkv[: len(layer.qkv)]
            np.matmul(layer.qkv, entering, out=rows)
            add_bias(rows, layer.qkv_bias)
            self.prepare_heads(qkv, layer, angles)
            attend(qkv, runs, self.num_heads, out=scratch[:mixed], logits=logits)
            # The queries are no longer needed: reuse their third of the buffer.
            np.matmul(layer.out, scratch[:mixed], out=update)
            add_bias(update, layer.out_bias)
            x += update
            if not self.options.pre_norm:
                self.normalise_columns(x, layer.attention_norm, scratch[:width])
            entering = self.entering(x, layer.mlp_norm, scratch)
            np.matmul(layer.mlp_in, entering, out=hidden)
            add_bias(hidden, layer.mlp_in_bias)
            np.matmul(layer.mlp_out, activate(hidden, self.options.mlp), out=update)
            add_bias(update, layer.mlp_out_bias)
            x += update
            if not self.options.pre_norm:
                self.normalise_columns(x, layer.mlp_norm, scratch[:width])
        if self.final_norm is not None:
            self.normalise_columns(x, self.final_norm, scratch[:width])
        pooled = self.pool(x, runs)
        pooled = self.projection(pooled) if self.projection else pooled
        for layer in self.dense:
            pooled = layer(pooled)
        return pooled

    def contexts(self, runs, lengths):
        """What global layers need beside token vectors, and what local ones do.

        Returns:
            twice: cosines and sines (F / 2, n), or None; and for each run what is added
            to its logits, (A or 1, L of keys, L), or None.
        """
        options, width = self.options, self.layers[0].out.shape[1] // self.num_heads
        places = np.concatenate([np.arange(size) for size in lengths])

        def context(base, local):
            angles = None
            if base:
                turns = rotary_frequencies(base, width)[:, None]
                turns = turns * places.astype(np.float32)
                angles = np.cos(turns), np.sin(turns)
            return angles, [self.logits(length, local) for _, _, length in runs]

        return context(options.rotary, False), context(options.local_rotary, True)

    def logits(self, length, local):
        """What is added to the logits of a text, (A or 1, L of keys, L); or None."""
        if self.relative is not None:
            rows = relative_buckets(length, self.options.buckets).T
            return np.ascontiguousarray(self.relative[rows].transpose(2, 0, 1))
        columns = np.arange(length)
        hidden = hidden_keys(columns[:, None] - columns, self.options, local)
        if not hidden.any():
            return None
        return np.where(hidden, np.float32(-np.inf), np.float32(0))[None]

    def entering(self, x, norm, scratch):
        """What a product reads: x itself, or, with `pre_norm`, its norm in a copy."""
        if norm is None or not self.options.pre_norm:
            return x
        copy = x.copy()
        self.normalise_columns(copy, norm, scratch[: len(x)])
        return copy

    def prepare_heads(self, qkv, layer, angles):
        """Norm and rotate queries and keys, and repeat shared heads, in place.

        Args:
            qkv: (3 A F, n), the first (A + 2 K) F rows filled.
            layer: its Layer.
            angles: from `contexts`.
        """
        heads, width = self.num_heads, len(qkv) // 3 // self.num_heads
        shared = (len(layer.qkv) // width - heads) // 2  # K
        by_head = qkv.reshape(3 * heads, width, -1)  # (3 A, F, n)
        parts = by_head[:heads], by_head[heads : heads + shared]
        if layer.query_norm is not None:
            for part, norm in zip(
                parts, (layer.query_norm, layer.key_norm), strict=True
            ):
                for head in part:
                    self.normalise_columns(head, norm, np.empty_like(head))
        if angles is not None:
            for part in parts:
                rotate(part, *angles)
        if shared < heads:
            value = by_head[heads + shared : heads + 2 * shared].copy()
            by_head[heads : 2 * heads] = np.repeat(parts[1], heads // shared, axis=0)
            by_head[2 * heads :] = np.repeat(value, heads // shared, axis=0)

    def normalise_columns(self, x, norm, scratch):
        """Norm of every column of x (T, n), in place."""
        scale, bias = norm
        average = np.full(len(x), 1 / len(x), np.float32)
        if not self.options.rms:
            x -= average @ x
        np.multiply(x, x, out=scratch)
        variance = average @ scratch  # (n,)
        variance += self.norm_eps
        x /= np.sqrt(variance, out=variance)
        x *= scale
        add_bias(x, bias)

    def pool(self, x, runs):
        """Pool token vectors x (T, n) to one vector for each text (m, T)."""
        pooled = []
        for start, stop, length in runs:
            texts = x[:, start:stop].reshape(len(x), -1, length)
            if self.pooling in ("cls", "last"):
                one = texts[:, :, 0 if self.pooling == "cls" else -1]
            else:
                one = texts.max(axis=2) if self.pooling == "max" else texts.mean(axis=2)
            pooled.append(one.T)
        return np.concatenate(pooled)


def read_tower(folder, *, pooling=None, normalise=None):
    """The tower of a checkpoint folder, weights as float32.

    `pooling` and `normalise` replace those of its files, unless they are None.

    >>> from pathlib import Path
    >>> read_tower(Path("tests/fixtures/bert_tiny"))([[2, 4, 5, 3]]).shape
    (1, 32)

    Raises:
        FileNotFoundError: names the files that the folder lacks.
        ValueError: an architecture, activation or pooling that we do not have; a file
            that cannot be read; tensors missing, unknown or of another shape or type.
    """
    checkpoint = read_checkpoint(folder)
    config = overridden(checkpoint.config, pooling, normalise)
    with open_tensors(checkpoint) as tensors:
        arrays = _tower_arrays(tensors, config)
    names = ("num_heads", "norm_eps", "pooling", "normalise")
    settings = {name: config[name] for name in names}
    return Tower(**arrays, **settings, dense=read_dense(folder, config))


def _tower_arrays(tensors, config):
    """The arrays of `Tower`, in the layouts that its forward pass wants."""

    def part(path, name):
        if name not in module_parts(path, config):
            return None
        return tensors.take(path, name)[:, None]

    def linear(*path):
        return tensors.take(path, "weight"), part(path, "bias")

    def norm(*path):
        if path not in tensors.modules:
            return None
        return part(path, "weight"), part(path, "bias")

    def layer(number):
        names = ("qkv", "out", "mlp_in", "mlp_out")
        parts = [linear("layers", number, name) for name in names]
        weights = side_by_side([weight for weight, _ in parts])
        biases = [bias for _, bias in parts]
        kinds = ("attention", "mlp", "query", "key")
        norms = [norm("layers", number, f"{of}_norm") for of in kinds]
        # Queries are divided by the root of the head width here, once and for all.
        heads, _, width = head_sizes(config)
        root = np.float32(width**-0.5)
        if norms[2] is None:
            weights[0][: heads * width] *= root
            if biases[0] is not None:
                biases[0][: heads * width] *= root
        else:
            norms[2] = tuple(p if p is None else p * root for p in norms[2])
        return Layer(*weights, *biases, *norms)

    def table(name):
        known = (name,) in tensors.modules
        return tensors.take((name,), "weight") if known else None

    projection = None
    if config.get("projection"):
        weight, bias = linear("projection", "linear")
        top = tuple(part[:, 0] for part in norm("projection", "norm"))
        projection = Projection(weight, bias[:, 0], top)
    return {
        # The word table keeps its type: only the rows of a query become float32.
        "words": tensors.take(("words",), "weight", dtype=None),
        "positions": _positions(table, config),
        "norm": norm("norm"),
        "final_norm": norm("final_norm"),
        "relative": table("relative"),
        "options": options_of(config),
        "layers": tuple(layer(number) for number in range(config["num_layers"])),
        "projection": projection,
    }


def _positions(table, config):
    """The vectors of positions (L, T), with that of type 0, which all tokens have."""
    start = table("types")[0] if config["type_vocab_size"] else np.float32(0)
    positions = table("positions")
    if positions is None:
        return np.broadcast_to(start, (config["max_positions"], config["width"]))
    return positions + start if config["type_vocab_size"] else positions


def attend(qkv, runs, num_heads, *, out, logits):
    r"""Multi-head attention within each text, before the output projection.

    .. math:: O = V \, \mathrm{softmax}(K^T Q + B) \quad \text{(over the keys)}

    Args:
        qkv: (3T, n) queries, keys and values of n tokens, queries scaled.
        runs: from `equal_runs`.
        num_heads: A.
        out: (T, n), overwritten.
        logits: B of each run, (A or 1, L of keys, L), or None.
    """
    for (start, stop, length), added in zip(runs, logits, strict=True):
        # (A, F, m, L)
        shape = num_heads, len(out) // num_heads, (stop - start) // length, length
        parts = qkv[:, start:stop].reshape(3, *shape)
        query, key, value = parts.transpose(0, 3, 1, 2, 4)  # (m, A, F, L) each
        weights = np.matmul(key.swapaxes(2, 3), query)  # (m, A, L of keys, L)
        if added is not None:
            weights += added
        weights -= weights.max(axis=2, keepdims=True)
        np.exp(weights, out=weights)
        # A view: the product below writes into `out`.
        mixed = out[:, start:stop].reshape(shape).transpose(2, 0, 1, 3)
        np.matmul(value, weights, out=mixed)
        mixed /= weights.sum(axis=2, keepdims=True)


def rotate(x, cosine, sine):
    """Turn numbers i and i + F/2 of heads x (A, F, n) together, in place."""
    half = x.shape[1] // 2
    first, second = x[:, :half].copy(), x[:, half:]
    x[:, :half] = first * cosine - second * sine
    x[:, half:] = second * cosine + first * sine


def add_bias(x, bias):
    if bias is not None:
        x += bias


def activate(hidden, mlp):
    """What the second product of an MLP reads; (U or 2U, n) -> (U, n), in place."""
    if mlp == "gelu":
        return gelu(hidden)
    half = len(hidden) // 2
    gate, value = hidden[:half], hidden[half:]
    if mlp == "geglu":
        gelu(gate)
    else:
        gate /= 1 + np.exp(-np.maximum(gate, -80))  # exp(88) overflows
    gate *= value
    return gate


def gelu(x):
    r"""Exact gelu of a contiguous float32 array, in place; error below 1e-7 + rounding.

    .. math:: x \Phi(x) = \max(x, 0) - a \Phi(-a), \quad a = |x|

    The tail is exp of a polynomial: log Phi(-a) is nearly a parabola.

    >>> gelu(np.float32([-1, 0, 1])).round(3)
    array([-0.159,  0.   ,  0.841], dtype=float32)
    """
    flat = x.reshape(-1)
    *lower, highest = LOG_TAIL
    for start in range(0, len(flat), BLOCK):
        part = flat[start : start + BLOCK]
        size = np.abs(part)
        np.minimum(size, TAIL_END, out=size)
        tail = size * highest
        tail += lower[-1]
        for coefficient in lower[-2::-1]:
            tail *= size
            tail += coefficient
        np.exp(tail, out=tail)
        tail *= size
        np.maximum(part, 0, out=part)
        part -= tail
    return x


def unit_rows(x):
    """Rows of x (N, D) scaled to length one; a zero row stays zero."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.maximum(norms, 1e-12)


def split_by_tokens(order, lengths):
    """Split `order` into parts of at most `CHUNK_TOKENS` tokens, or of one text."""
    start, tokens = 0, 0
    for place, row in enumerate(order):
        if place > start and tokens + lengths[row] > CHUNK_TOKENS:
            yield order[start:place]
            start, tokens = place, 0
        tokens += lengths[row]
    if start < len(order):
        yield order[start:]


def equal_runs(lengths):
    """Groups of equally long texts: (first token, end, tokens of each text)."""
    sizes, counts = np.unique(lengths, return_counts=True)  # ascending, like the texts
    stops = np.cumsum(sizes * counts)
    starts = stops - sizes * counts
    return list(zip(starts.tolist(), stops.tolist(), sizes.tolist(), strict=True))
