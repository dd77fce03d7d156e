"""Embeddings and codes of many rows by the current parameters of a joint index.

A row comes as the cached output of a frozen tower, or as tokens if the tower trains.
"""

import functools
from dataclasses import dataclass

import jax
import numpy as np

from ehi.data.tokens import TokenArray
from ehi.encode.encode import check_positions, encode
from ehi.encode.packing import packing_pays
from ehi.model.params import merge_model
from ehi.parallel.mesh import over_local_devices
from ehi.parallel.processes import gather_rows, process_slice
from ehi.progress import Progress

# Cached tower outputs that go through the head at once.
ROWS = 4096


def embed(
    graphdef, params, side: str, source, *, head: bool = True, desc: str | None = None
):
    """Embed queries or documents with the current parameters.

    Several processes call this together: each of P processes embeds every P-th row on
    its own devices, and all processes get all rows.

    Args:
      graphdef, params: of a `JointIndex`, from `split_model`.
      side: 'queries' or 'documents', which decides the head.
      source: cached tower outputs (rows, T), or a `TokenArray` if the model has a
        tower.
      head: False returns the outputs of the tower.
      desc: what the progress bar, or the lines of the log, call this work.

    Returns:
      unit embeddings (rows, D) float32, or tower outputs (rows, T).
    """
    processes, desc = jax.process_count(), desc or f"encode {side}"
    if processes == 1 or len(source) < processes:
        return _embed(graphdef, params, side, source, head, desc)
    own = process_slice()
    if isinstance(source, np.ndarray):
        own_source = source[own]
    else:
        own_source = _SomeTexts(source, np.arange(len(source))[own])
    rows = _embed(graphdef, params, side, own_source, head, desc)
    return gather_rows(rows, len(source))


def _embed(graphdef, params, side: str, source, head: bool, desc: str):
    apply = _compiled(graphdef, f"{'embed' if head else 'encode'}_{side}")
    if not isinstance(source, np.ndarray):
        tower = merge_model(graphdef, params).tower
        check_positions(tower, source)
        return encode(
            lambda p, ids, mask: apply(p, (ids, mask)), params, source, desc=desc,
            pack=not head and packing_pays(),
        )  # fmt: skip
    apply, several = over_local_devices(apply, params), len(source) > ROWS

    def embed_chunk(chunk):
        # The last of several chunks is padded, so that one shape is compiled.
        missing = ROWS - len(chunk) if several else 0
        rows = apply(np.pad(chunk, ((0, missing), (0, 0))))
        return np.asarray(rows)[: len(chunk)]

    return _by_chunks(embed_chunk, source, desc)


@dataclass(frozen=True)
class _SomeTexts:
    """Some of the texts of a token array, in the form that `encode` takes."""

    tokens: TokenArray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        return self.tokens.lengths[self.rows]

    def pad(self, rows, length: int):
        return self.tokens.pad(self.rows[rows], length)


def code_table(graphdef, params, documents: np.ndarray) -> np.ndarray:
    """Codes that the index stores, of the whole corpus by the current parameters.

    Args:
      graphdef, params: of a `JointIndex` with PQ leaves and without a tree.
      documents: embeddings (rows, D).

    Returns:
      codes (rows, M) uint8.
    """

    @jax.jit
    def apply(params, d):
        model = merge_model(graphdef, params)
        return model.quantiser.encode(model.rotate(d)[0])

    codes = _by_chunks(functools.partial(apply, params), documents, "encode codes")
    return codes.astype(np.uint8)


def _by_chunks(apply, rows: np.ndarray, desc: str) -> np.ndarray:
    """Apply the function to all rows, `ROWS` at a time."""
    made = []
    with Progress(desc, len(rows), "rows", bar=False) as progress:
        for start in range(0, len(rows), ROWS):
            chunk = rows[start : start + ROWS]
            made.append(np.asarray(apply(chunk)))
            progress.update(len(chunk))
    return np.concatenate(made)


@functools.lru_cache(maxsize=8)
def _compiled(graphdef, method: str):
    @jax.jit
    def apply(params, inputs):
        model = merge_model(graphdef, params)
        return getattr(model, method)(inputs)

    return apply
