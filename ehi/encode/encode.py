"""Token ids of many texts -> vectors of a tower, in few shapes; cached on disk.

Texts are sorted by length, so that a batch holds little padding, and padded to a few
lengths, so that little is compiled. A row of a batch holds one text, or is packed with
several (see `ehi.encode.packing`).
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from ehi.data.tokens import TokenArray
from ehi.encode.packing import (
    choose_buckets,
    choose_packed_lengths,
    pack_batches,
    packing_pays,
    plan_batches,
)
from ehi.encode.stream import open_rows, stream_rows
from ehi.files import cache_folder
from ehi.index.text.architectures import Options
from ehi.model.pretrained import Pretrained
from ehi.model.tower import Tower
from ehi.parallel.mesh import over_local_devices
from ehi.progress import Progress

# Tokens of a batch. On a CPU the activations of about 1,024 tokens stay in its caches,
# which makes it 1.4 times as fast as 4,096 tokens. An accelerator needs more tokens to
# keep all its units busy.
BATCH_TOKENS = {"cpu": 1024}
ACCELERATOR_BATCH_TOKENS = 65_536
# The price of compiling one more shape (about 1 s), in tokens encoded in that time.
COMPILE_TOKENS = {"cpu": 5_000}
ACCELERATOR_COMPILE_TOKENS = 1_000_000


def encode(
    apply: Callable,
    params,
    tokens,
    *,
    batch_tokens: int | None = None,
    buckets: Sequence[int] | None = None,
    pack: bool = False,
    desc: str = "encode",
) -> np.ndarray:
    """Encode tokenised texts, longest first, in few shapes.

    The rows of a batch are spread over the devices of this process.

    Args:
        apply: jitted function (params, ids (N, L) int32, mask (N, L) bool) -> (N, T)
            whose rows do not depend on each other. With `pack`, the mask is int32 and
            numbers the texts of a row, and the result is (N, G, T), as of `Tower`.
        params: first argument of `apply`.
        tokens: token array with `len`, `lengths` and
            `pad(rows, length) -> ids, mask`.
        batch_tokens: tokens of a batch, padding included. None chooses a number that
            suits the devices.
        buckets: padded lengths, ascending. The length of the longest text is added if
            it is longer than all of them. None calls `choose_buckets`, or
            `choose_packed_lengths` with `pack`.
        pack: put several texts into a row, so that hardly any padding is left.
        desc: what the progress bar, or the lines of the log, call this work.

    Returns:
        float32 array (len(tokens), T), in the order of `tokens`.

    Raises:
        ValueError: `tokens` holds no text, or batch_tokens is less than 1.
    """
    lengths = np.asarray(tokens.lengths)
    batches = _batches(tokens, lengths, buckets, batch_tokens, pack)
    result = None
    progress = Progress(desc, int(lengths.sum()), "tokens")

    def collect(texts, places, vectors):
        nonlocal result
        vectors = np.asarray(vectors, np.float32)[places]
        if result is None:
            result = np.empty((len(lengths), vectors.shape[1]), np.float32)
        result[texts] = vectors
        progress.update(int(lengths[texts].sum()))

    apply = over_local_devices(apply, params)
    with progress:
        waiting = None
        for texts, places, ids, mask in batches:
            vectors = apply(ids, mask)
            # The batch before this one is fetched only now, so that the device always
            # has work while the host copies.
            if waiting:
                collect(*waiting)
            waiting = texts, places, vectors
        collect(*waiting)
    return result


def _batches(tokens, lengths, buckets, batch_tokens, pack):
    """For every batch: its texts, the places of their vectors, token ids and mask."""
    if not len(lengths):
        raise ValueError("no texts to encode")
    device = jax.default_backend()
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(device, ACCELERATOR_BATCH_TOKENS)
        batch_tokens *= jax.local_device_count()
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; must be at least 1")
    if buckets is None:
        buckets = _buckets(lengths, pack)
    longest = int(np.max(lengths))
    buckets = buckets if longest <= buckets[-1] else [*buckets, longest]
    if pack:
        for rows, length, padded in pack_batches(lengths, buckets, batch_tokens):
            yield _fill_rows(tokens, lengths, rows, (padded, length))
    else:
        for texts, length, padded in plan_batches(lengths, buckets, batch_tokens):
            ids, mask = tokens.pad(texts, length)  # (N, L)
            extra = ((0, padded - len(texts)), (0, 0))
            places = slice(len(texts))
            yield texts, places, np.pad(ids, extra), np.pad(mask, extra)


def _buckets(lengths: np.ndarray, pack: bool) -> tuple[int, ...]:
    """Padded lengths that suit texts of these lengths."""
    if pack:
        return choose_packed_lengths(lengths)
    cost = COMPILE_TOKENS.get(jax.default_backend(), ACCELERATOR_COMPILE_TOKENS)
    return choose_buckets(lengths, compile_tokens=cost)


def _fill_rows(tokens, lengths, rows, shape):
    """One batch of packed rows; returns what `_batches` yields."""
    texts = np.concatenate(rows)
    counts = [len(row) for row in rows]
    row = np.repeat(np.arange(len(rows)), counts)  # row of every text
    place = np.concatenate([np.arange(count) for count in counts])
    total = np.zeros(shape[0], int)  # tokens of every row
    np.add.at(total, row, lengths[texts])
    used = np.arange(shape[1]) < total[:, None]  # (N, L)
    ids, mask = tokens.pad(texts, int(lengths[texts].max()))
    filled, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    filled[used] = ids[mask]
    segments[used] = np.repeat(place + 1, lengths[texts])
    return texts, (row, place), filled, segments


@functools.partial(jax.jit, static_argnames="graphdef")
def apply_module(params, ids, mask, *, graphdef):
    """Call the module (graphdef, params). All callers share the compiled shapes."""
    return nnx.merge(graphdef, params)(ids, mask)


def cached_encode(
    pretrained: Pretrained,
    tower: Tower,
    tokens,
    *,
    desc: str = "encode",
    dtype: str = "float32",
) -> np.ndarray:
    """Outputs of a frozen pretrained tower, encoded once and then memory-mapped.

    The file is in the folder `encoded` of `ehi.files.cache_folder`. Its name is a hash
    of all that the numbers depend on: weights, layers and how they compute, pooling,
    activations of Dense layers, normalisation, dtype, and the tokens with their length.

    Args:
        pretrained: the checkpoint that `tower` was loaded from, unchanged since.
        tower: `Tower`.
        tokens: token array as for `encode`, with a string `key` that identifies its
            texts, tokeniser and length.
        desc: as for `encode`.
        dtype: of the file, 'float32' or 'float16'.

    Returns:
        read-only memory map (len(tokens), T).

    Raises:
        OSError: the disk is full; the blocks that are finished are kept.
    """
    parts = (
        pretrained.sha256,
        tokens.key,
        len(tower.layers),
        tower.pooling,
        tower.normalise,
        np.dtype(tower.dtype).name,
    )
    # The hash of the weights has neither; a BERT has defaults.
    if tower.options != Options():
        parts += (repr(tower.options),)
    parts += tuple(layer.activation for layer in tower.dense or ())
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    kind = "" if dtype == "float32" else f"-{dtype}"
    path = cache_folder() / "encoded" / f"{key[:32]}{kind}.npy"
    if path.is_file():
        return open_rows(path, len(tokens))
    check_positions(tower, tokens)
    graphdef, params = nnx.split(tower)
    apply = functools.partial(apply_module, graphdef=graphdef)
    return encode_to(
        path, apply, params, tokens, pack=packing_pays(), desc=desc, dtype=dtype
    )


def encode_to(
    path, apply: Callable, params, tokens, *, pack: bool, desc: str, dtype: str
) -> np.ndarray:
    """Encode texts into a file, one block of `stream_rows` after the other.

    All blocks have the padded lengths that suit all texts. The arguments are those of
    `encode`, `stream_rows` and `cached_encode`.
    """
    lengths = np.asarray(tokens.lengths)
    if not len(lengths):
        raise ValueError("no texts to encode")
    buckets = _buckets(lengths, pack)

    def make(start, stop):
        part = tokens
        if stop - start < len(tokens):
            part = SomeTexts(tokens, np.arange(start, stop))
        return encode(apply, params, part, buckets=buckets, pack=pack, desc=desc)

    return stream_rows(path, len(lengths), make, dtype=dtype)


@dataclass(frozen=True)
class SomeTexts:
    """Some of the texts of a token array, in the form that `encode` takes."""

    tokens: TokenArray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text (texts,)."""
        return self.tokens.lengths[self.rows]

    def pad(self, rows, length: int):
        """As `TokenArray.pad`."""
        return self.tokens.pad(self.rows[rows], length)


def check_positions(tower: Tower, tokens) -> None:
    """Refuse texts that are longer than a tower can read.

    The tower itself cannot check this: a packed row is longer than its texts.
    """
    longest = int(np.max(tokens.lengths, initial=0))
    if longest > tower.max_positions:
        raise ValueError(
            f"{longest} tokens exceed the {tower.max_positions} positions of the "
            f"encoder: tokenise with max_length <= {tower.max_positions}"
        )
