"""Encoding a corpus: sorted by length, padded to a few bucket lengths, cached."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from ehi.eval.records import atomic_write_npy
from ehi.model.encoder import TextEncoder
from ehi.model.pretrained import Pretrained
from ehi.model.sources import default_cache_dir

# On a CPU the activations of about 1,024 tokens stay in its caches: 1.4 times as fast
# as 4,096. An accelerator wants its many units filled.
BATCH_TOKENS = {"cpu": 1024}
ACCELERATOR_BATCH_TOKENS = 65_536
# What compiling one more shape costs, in tokens encoded meanwhile (about 1 s).
COMPILE_TOKENS = {"cpu": 5_000}
ACCELERATOR_COMPILE_TOKENS = 1_000_000


def encode(
    apply: Callable,
    params,
    tokens,
    *,
    batch_tokens: int | None = None,
    buckets: Sequence[int] | None = None,
    desc: str = "encode",
) -> np.ndarray:
    """Encode tokenised texts, longest first, in few shapes.

    Args:
        apply: jitted function (params, ids (N, L) int32, mask (N, L) bool) -> (N, T)
            whose rows do not depend on each other.
        params: its first argument.
        tokens: token array: `len`, `lengths` and `pad(rows, length) -> ids, mask`.
        batch_tokens: tokens of a batch, padding included; None = what suits the
            device.
        buckets: padded lengths, ascending; the longest text is added where it exceeds
            them. None = `choose_buckets`.
        desc: label of the progress bar, which shows only on a terminal.

    Returns:
        float32 array (len(tokens), T), in the order of `tokens`.

    Raises:
        ValueError: there is no text, or batch_tokens is not positive.
    """
    lengths = np.asarray(tokens.lengths)
    batches = _plan(lengths, buckets, batch_tokens)
    result = None
    bar = tqdm(
        total=int(lengths.sum()), desc=desc, unit="token", unit_scale=True, disable=None
    )

    def collect(rows, vectors):
        nonlocal result
        vectors = np.asarray(vectors, np.float32)[: len(rows)]
        if result is None:
            result = np.empty((len(lengths), vectors.shape[1]), np.float32)
        result[rows] = vectors
        bar.update(int(lengths[rows].sum()))

    with bar:
        waiting = None
        for rows, length, padded_rows in batches:
            ids, mask = tokens.pad(rows, length)  # (N, L)
            extra = ((0, padded_rows - len(rows)), (0, 0))
            vectors = apply(params, np.pad(ids, extra), np.pad(mask, extra))
            # Fetch the batch before only now: the device never waits for the host.
            if waiting:
                collect(*waiting)
            waiting = rows, vectors
        collect(*waiting)
    return result


def _plan(lengths, buckets, batch_tokens):
    """`plan_batches`, by what suits the device where nothing is asked for."""
    if not len(lengths):
        raise ValueError("no texts to encode")
    device = jax.default_backend()
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(device, ACCELERATOR_BATCH_TOKENS)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens {batch_tokens} is not positive")
    if buckets is None:
        cost = COMPILE_TOKENS.get(device, ACCELERATOR_COMPILE_TOKENS)
        buckets = choose_buckets(lengths, compile_tokens=cost)
    return plan_batches(lengths, buckets, batch_tokens)


def choose_buckets(
    lengths: np.ndarray, *, compile_tokens: int, step: int = 16
) -> tuple[int, ...]:
    r"""Padded lengths with the least padding plus compilation, by dynamic programming.

    .. math:: \min_{b_1 < \dots < b_n} \sum_i \min\{b_j \ge l_i\} + n \cdot c

    Args:
        lengths: tokens of each text (N,).
        compile_tokens: c, price of one more bucket, in tokens.
        step: buckets are multiples of it, so that data sets share compilations; the
            last one is the longest length.

    Returns:
        ascending tuple of lengths.
    """
    longest = int(np.max(lengths))
    ends = np.append(np.arange(step, longest, step), longest)
    count = np.searchsorted(np.sort(lengths), ends, side="right")  # texts that fit
    # best[j]: least cost of all texts of at most ends[j - 1] tokens.
    best, previous = np.zeros(len(ends) + 1), np.zeros(len(ends) + 1, int)
    before = np.append(0, count)
    for j in range(1, len(ends) + 1):
        cost = best[:j] + (count[j - 1] - before[:j]) * ends[j - 1] + compile_tokens
        previous[j] = np.argmin(cost)
        best[j] = cost[previous[j]]
    chosen, j = [], len(ends)
    while j:
        chosen.append(int(ends[j - 1]))
        j = previous[j]
    return tuple(reversed(chosen))


def plan_batches(
    lengths: np.ndarray, buckets: Sequence[int], batch_tokens: int
) -> list[tuple[np.ndarray, int, int]]:
    """Batches of a length-sorted corpus, longest first.

    A batch that a bucket cannot fill takes texts of the next shorter one, so that only
    the last batch is partial; its rows are padded to a power of two.

    Args:
        lengths: tokens of each text (N,).
        buckets: padded lengths, ascending.
        batch_tokens: rows of a batch = batch_tokens // its length, at least 1.

    Returns:
        list of (rows, padded length, padded number of rows).
    """
    longest = int(np.max(lengths))
    buckets = np.array(buckets if longest <= buckets[-1] else [*buckets, longest])
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        first = lengths[order[start]]
        length = int(buckets[np.searchsorted(buckets, first)])
        full = max(1, batch_tokens // length)
        rows = order[start : start + full]
        padded_rows = min(full, 1 << (len(rows) - 1).bit_length())
        batches.append((rows, length, padded_rows))
        start += len(rows)
    return batches


@functools.partial(jax.jit, static_argnames="graphdef")
def apply_module(params, ids, mask, *, graphdef):
    """Call the module (graphdef, params); one compilation a shape, whoever asks."""
    return nnx.merge(graphdef, params)(ids, mask)


def cached_encode(
    pretrained: Pretrained,
    tower: TextEncoder,
    tokens,
    *,
    cache_dir: str | Path | None = None,
    batch_tokens: int | None = None,
    desc: str = "encode",
) -> np.ndarray:
    """Outputs of a frozen pretrained tower, encoded once and then memory-mapped.

    The file's name holds a hash of everything the numbers depend on: weights, layers,
    pooling, normalisation, dtype, and the tokens with their length.

    Args:
        pretrained: the checkpoint that `tower` was loaded from, unchanged since.
        tower: `TextEncoder`.
        tokens: token array as for `encode`, with a string `key` that names its texts,
            tokeniser and length.
        cache_dir: folder of the arrays; default 'encoded' in our cache folder.
        batch_tokens: as for `encode`.
        desc: label of the progress bar.

    Returns:
        read-only float32 memory map (len(tokens), T).
    """
    cache_dir = Path(cache_dir) if cache_dir else default_cache_dir() / "encoded"
    parts = (
        pretrained.sha256,
        tokens.key,
        len(tower.layers),
        tower.pooling,
        tower.normalise,
        np.dtype(tower.dtype).name,
    )
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    path = cache_dir / f"{key[:32]}.npy"
    if not path.is_file():
        graphdef, params = nnx.split(tower)
        apply = functools.partial(apply_module, graphdef=graphdef)
        vectors = encode(apply, params, tokens, batch_tokens=batch_tokens, desc=desc)
        atomic_write_npy(path, vectors)
    return np.load(path, mmap_mode="r")
