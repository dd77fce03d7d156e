"""Embeddings of many rows by a joint index: cached tower outputs or tokens in."""

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

# Rows of cached features that go through the head at once.
ROWS = 4096


def embed(
    graphdef, params, side: str, source, *, head: bool = True, desc: str | None = None
):
    """Embed queries or documents with the current parameters.

    The devices of a process share its rows. Several processes call this together: of P
    each embeds every P-th row, and all get all of them.

    Args:
      graphdef, params: of a `JointIndex`, from `split_model`.
      side: 'queries' or 'documents', which decides the head.
      source: cached tower outputs (rows, T), or a `TokenArray` if the model has a
        tower.
      head: False for the tower's outputs.
      desc: label of the progress bar, when the tower runs.

    Returns:
      unit embeddings (rows, D) float32, or tower outputs (rows, T).
    """
    processes, desc = jax.process_count(), desc or f"encode {side}"
    if processes == 1 or len(source) < processes:
        return _embed(graphdef, params, side, source, head, desc)
    own = process_slice()
    if isinstance(source, np.ndarray):
        share = source[own]
    else:
        share = _SomeTexts(source, np.arange(len(source))[own])
    rows = _embed(graphdef, params, side, share, head, desc)
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
    chunks = [source[i : i + ROWS] for i in range(0, len(source), ROWS)]
    # Pad the last chunk: one shape, one compilation.
    tail = len(chunks[-1])
    if len(chunks) > 1:
        padded = np.zeros_like(chunks[0])
        padded[:tail] = chunks[-1]
        chunks[-1] = padded
    apply = over_local_devices(apply, params)
    rows = [np.asarray(apply(chunk)) for chunk in chunks]
    rows[-1] = rows[-1][:tail]
    return np.concatenate(rows)


@dataclass(frozen=True)
class _SomeTexts:
    """Some texts of a token array, as `encode` takes them."""

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
    """Codes of the whole corpus by the current parameters, as the index has them.

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

    chunks = (documents[i : i + ROWS] for i in range(0, len(documents), ROWS))
    return np.concatenate([np.asarray(apply(params, c)) for c in chunks]).astype(
        np.uint8
    )


@functools.lru_cache(maxsize=8)
def _compiled(graphdef, method: str):
    @jax.jit
    def apply(params, inputs):
        model = merge_model(graphdef, params)
        return getattr(model, method)(inputs)

    return apply
