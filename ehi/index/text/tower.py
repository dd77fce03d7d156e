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
from ehi.index.text.checkpoint import open_tensors, read_checkpoint
from ehi.index.text.settings import Dense, overridden, read_dense

CHUNK_TOKENS = 512  # computed at a time, so that the hidden layer stays in cache
PROJECTION_EPS = 1e-5  # PyTorch's default, whatever the tower's layers have
BLOCK = 1 << 15  # numbers that gelu takes at a time: they and two copies fit in L2
# log Phi(-a) on 0 <= a <= 6, constant term first: minimax for the error of gelu, 5e-8.
LOG_TAIL = (
    -6.93142369e-01, -7.97952231e-01, -3.17995765e-01, -3.70224988e-02,
    5.60115467e-03, -5.33190548e-04, 2.29390559e-05,
)  # fmt: skip
TAIL_END = 6.0  # beyond it a Phi(-a) is less than 1e-8


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights of one post-norm layer, float32; vectors are columns (T, 1).

    Attributes:
        qkv: (3T, T), queries already divided by sqrt F.
        out: (T, T).
        mlp_in: (U, T).
        mlp_out: (T, U).
        qkv_bias, out_bias, mlp_in_bias, mlp_out_bias: one number an output.
        attention_norm, mlp_norm: scale and bias, (T, 1) each.
    """

    qkv: np.ndarray
    out: np.ndarray
    mlp_in: np.ndarray
    mlp_out: np.ndarray
    qkv_bias: np.ndarray
    out_bias: np.ndarray
    mlp_in_bias: np.ndarray
    mlp_out_bias: np.ndarray
    attention_norm: tuple[np.ndarray, np.ndarray]
    mlp_norm: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Projection:
    r"""NumPy forward of `ehi.model.tower.Projection`.

    .. math:: y = \mathrm{norm}(W x + b)

    Attributes:
        weight: (T, T), outputs first.
        bias: (T,).
        norm: scale and bias, (T,) each.
    """

    weight: np.ndarray
    bias: np.ndarray
    norm: tuple[np.ndarray, np.ndarray]

    def __call__(self, x):
        """Map pooled vectors x (N, T) to float32 (N, T)."""
        scale, shift = self.norm
        y = x @ self.weight.T + self.bias
        y -= y.mean(axis=1, keepdims=True)
        variance = np.mean(y * y, axis=1, keepdims=True)
        return y / np.sqrt(variance + np.float32(PROJECTION_EPS)) * scale + shift


@dataclass(frozen=True, eq=False)
class Tower:
    """BERT-family tower: lists of token ids -> (N, T) float32.

    Attributes:
        words: (V, T) floats.
        positions: (max_positions, T) float32, the vector of token type 0 added; the
            first row is that of a text's first token.
        norm: scale and bias of the embedding norm, (T, 1) each.
        layers: first to last.
        num_heads: A.
        norm_eps: added to the variance in layer norms.
        pooling: 'mean' or 'max' over the tokens, 'cls', the first, or 'last'.
        normalise: scale the pooled vector to length one.
        projection: applied to the pooled vector before that, or None.
        dense: layers after the projection, first to last.

    Source: Devlin et al. 2019, arXiv:1810.04805; Sanh et al. 2019, arXiv:1910.01108.
    """

    words: np.ndarray
    positions: np.ndarray
    norm: tuple[np.ndarray, np.ndarray]
    layers: tuple[Layer, ...]
    num_heads: int
    norm_eps: float
    pooling: str
    normalise: bool
    projection: Projection | None = None
    dense: tuple[Dense, ...] = ()

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
        scratch = np.empty_like(x)
        qkv = np.empty((3 * width, tokens), np.float32)
        hidden = np.empty((len(self.layers[0].mlp_in), tokens), np.float32)
        runs = equal_runs(lengths)
        self.normalise_columns(x, self.norm, scratch)
        for layer in self.layers:
            np.matmul(layer.qkv, x, out=qkv)
            qkv += layer.qkv_bias
            attend(qkv, runs, self.num_heads, out=scratch)
            # The queries are no longer needed: reuse their third of the buffer.
            update = np.matmul(layer.out, scratch, out=qkv[:width])
            update += layer.out_bias
            x += update
            self.normalise_columns(x, layer.attention_norm, scratch)
            np.matmul(layer.mlp_in, x, out=hidden)
            hidden += layer.mlp_in_bias
            gelu(hidden)
            np.matmul(layer.mlp_out, hidden, out=update)
            update += layer.mlp_out_bias
            x += update
            self.normalise_columns(x, layer.mlp_norm, scratch)
        pooled = self.pool(x, runs)
        pooled = self.projection(pooled) if self.projection else pooled
        for layer in self.dense:
            pooled = layer(pooled)
        return pooled

    def normalise_columns(self, x, norm, scratch):
        """Layer norm of every column of x (T, n), in place."""
        scale, bias = norm
        average = np.full(len(x), 1 / len(x), np.float32)
        x -= average @ x
        np.multiply(x, x, out=scratch)
        variance = average @ scratch  # (n,)
        variance += self.norm_eps
        x /= np.sqrt(variance, out=variance)
        x *= scale
        x += bias

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

    def linear(*path):
        weight, bias = tensors.take(path, "weight"), tensors.take(path, "bias")
        return weight, bias[:, None]

    def norm(*path):
        return tuple(tensors.take(path, part)[:, None] for part in ("weight", "bias"))

    def layer(number):
        names = ("qkv", "out", "mlp_in", "mlp_out")
        parts = [linear("layers", number, name) for name in names]
        weights = _side_by_side([weight for weight, _ in parts])
        biases = [bias for _, bias in parts]
        # Queries are divided by the root of the head width here, once and for all.
        width = config["width"]
        root = np.float32((width // config["num_heads"]) ** -0.5)
        weights[0][:width] *= root
        biases[0][:width] *= root
        norms = [norm("layers", number, f"{of}_norm") for of in ("attention", "mlp")]
        return Layer(*weights, *biases, *norms)

    positions = tensors.take(("positions",), "weight")
    if config["type_vocab_size"]:
        # Every token has type 0.
        positions = positions + tensors.take(("types",), "weight")[0]
    projection = None
    if config.get("projection"):
        weight, bias = linear("projection", "linear")
        top = tuple(part[:, 0] for part in norm("projection", "norm"))
        projection = Projection(weight, bias[:, 0], top)
    return {
        # The word table keeps its type: only the rows of a query become float32.
        "words": tensors.take(("words",), "weight", dtype=None),
        "positions": positions,
        "norm": norm("norm"),
        "layers": tuple(layer(number) for number in range(config["num_layers"])),
        "projection": projection,
    }


def _side_by_side(arrays):
    """Copy float32 arrays into one block of memory, each at the start of a cache line.

    NumPy requests large pages for blocks above 4 MB. A query reads every weight once,
    and fewer pages to look up make its products a tenth faster.
    """
    line = 16  # float32 numbers in a cache line
    sizes = [-(-array.size // line) * line for array in arrays]
    block = np.empty(sum(sizes) + line, np.float32)
    start = -block.ctypes.data % (4 * line) // 4
    copies = []
    for array, size in zip(arrays, sizes, strict=True):
        copies.append(block[start : start + array.size].reshape(array.shape))
        copies[-1][...] = array
        start += size
    return copies


def attend(qkv, runs, num_heads, *, out):
    r"""Multi-head attention within each text, before the output projection.

    .. math:: O = V \, \mathrm{softmax}(K^T Q) \quad \text{(over the keys)}

    Args:
        qkv: (3T, n) queries, keys and values of n tokens, queries scaled.
        runs: from `equal_runs`.
        num_heads: A.
        out: (T, n), overwritten.
    """
    for start, stop, length in runs:
        # (A, F, m, L)
        shape = num_heads, len(out) // num_heads, (stop - start) // length, length
        parts = qkv[:, start:stop].reshape(3, *shape)
        query, key, value = parts.transpose(0, 3, 1, 2, 4)  # (m, A, F, L) each
        weights = np.matmul(key.swapaxes(2, 3), query)  # (m, A, L of keys, L)
        weights -= weights.max(axis=2, keepdims=True)
        np.exp(weights, out=weights)
        # A view: the product below writes into `out`.
        mixed = out[:, start:stop].reshape(shape).transpose(2, 0, 1, 3)
        np.matmul(value, weights, out=mixed)
        mixed /= weights.sum(axis=2, keepdims=True)


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
