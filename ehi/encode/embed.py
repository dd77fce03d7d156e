"""Embeddings and codes of many rows by the current parameters of a joint index.

A row comes as the cached output of a frozen tower, or as tokens if the tower trains.
"""

import functools
from pathlib import Path

import jax
import numpy as np

from ehi.data.rows import Rows
from ehi.encode.encode import SomeTexts, check_positions, encode
from ehi.encode.packing import packing_pays
from ehi.encode.stream import stream_rows
from ehi.model.params import merge_model
from ehi.parallel.mesh import over_local_devices
from ehi.parallel.processes import gather_rows, process_slice
from ehi.progress import Progress

# Cached tower outputs that go through the head at once.
ROWS = 4096
# A table of embeddings of this many bytes is kept in memory.
KEPT = 2**28


def embed(
    graphdef, params, side: str, source, *, head: bool = True, desc: str | None = None
):
    """Embed queries or documents with the current parameters.

    Several processes call this together: each of P processes embeds every P-th row on
    its own devices, and all processes get all rows.

    Args:
      graphdef, params: of a `JointIndex`, from `split_model`.
      side: 'queries' or 'documents', which decides the head.
      source: cached tower outputs (rows, T), an array or `Rows`, or a `TokenArray` if
        the model has a tower.
      head: False returns the outputs of the tower.
      desc: what the progress bar, or the lines of the log, call this work.

    Returns:
      unit embeddings (rows, D) float32, or tower outputs (rows, T).
    """
    processes, desc = jax.process_count(), desc or f"encode {side}"
    if processes == 1 or len(source) < processes:
        return _embed(graphdef, params, side, source, head, desc)
    own = process_slice()
    if _is_text(source):
        own_source = SomeTexts(source, np.arange(len(source))[own])
    else:
        own_source = source[own]
    rows = _embed(graphdef, params, side, own_source, head, desc)
    return gather_rows(rows, len(source))


def _embed(graphdef, params, side: str, source, head: bool, desc: str):
    apply = _compiled(graphdef, f"{'embed' if head else 'encode'}_{side}")
    if _is_text(source):
        tower = merge_model(graphdef, params).tower
        check_positions(tower, source)
        return encode(
            lambda p, ids, mask: apply(p, (ids, mask)), params, source, desc=desc,
            pack=not head and packing_pays(),
        )  # fmt: skip
    return _by_chunks(_of_chunks(apply, params, len(source)), source, desc)


def _is_text(source) -> bool:
    return hasattr(source, "pad")


def _of_chunks(apply, params, num: int):
    """A function of a chunk of `num` rows; of several chunks all have one shape."""
    apply, several = over_local_devices(apply, params), num > ROWS

    def embed_chunk(chunk):
        # The last of several chunks is padded, so that one shape is compiled.
        missing = ROWS - len(chunk) if several else 0
        rows = apply(np.pad(chunk, ((0, missing), (0, 0))))
        return np.asarray(rows)[: len(chunk)]

    return embed_chunk


class EmbeddedRows(Rows):
    """Embeddings of a table of tower outputs, made when they are asked for.

    A small table is embedded once, and kept. Of a large one, only the chunks of `ROWS`
    rows that hold rows asked for are embedded, with the same bits.

    Args:
      graphdef, params, side: as of `embed`.
      source: tower outputs (rows, T), an array or `Rows`.
    """

    def __init__(self, graphdef, params, side: str, source):
        self._graphdef, self._params, self._side = graphdef, params, side
        self._source = source
        self.shape = (len(source), params["head/projection"].shape[1])
        self._keeps = self.nbytes <= KEPT
        # Several processes share the work, so they do it together, which is now.
        if self._keeps and jax.process_count() > 1:
            self._whole  # noqa: B018

    @functools.cached_property
    def _whole(self) -> np.ndarray:
        return embed(self._graphdef, self._params, self._side, self._source)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Unit embeddings (n, D) float32 of rows (n,), in any order."""
        if self._keeps:
            return self._whole[rows]
        apply = _compiled(self._graphdef, f"embed_{self._side}")
        apply = _of_chunks(apply, self._params, len(self))
        order = np.argsort(rows, kind="stable")
        found = np.empty((len(rows), self.shape[1]), np.float32)
        chunks, first = np.unique(rows[order] // ROWS, return_index=True)
        label = f"encode {self._side}"
        with Progress(label, len(rows), "rows", bar=False) as progress:
            for chunk, here in zip(chunks, np.split(order, first[1:]), strict=True):
                start = int(chunk) * ROWS
                part = self._source[start : start + ROWS]
                made = apply(np.asarray(part, np.float32))
                found[here] = made[rows[here] - start]
                progress.update(len(here))
        return found


def embed_to(
    path, graphdef, params, side: str, source, *, head: bool = True,
    desc: str | None = None, dtype: str = "float32",
) -> np.ndarray:  # fmt: skip
    """`embed` into a file, one block of `stream_rows` after the other.

    Args:
      path: the .npy file; if it is there, it is opened.
      graphdef, params, side, source, head, desc: as of `embed`.
      dtype: of the file, 'float32' or 'float16'.

    Returns:
      read-only memory map (rows, D), or (rows, T) without the head.
    """

    num = jax.process_count()
    if num > 1:  # they compute together, so all of them do, or none
        there = np.array([[Path(path).is_file()]], np.int32)
        if not gather_rows(there, num).all():
            Path(path).unlink(missing_ok=True)

    def make(start, stop):
        part = source
        if stop - start < len(source):
            text = _is_text(source)
            part = (
                source[start:stop]
                if not text
                else SomeTexts(source, np.arange(start, stop))
            )
        return embed(graphdef, params, side, part, head=head, desc=desc)

    return stream_rows(path, len(source), make, dtype=dtype)


def code_table(
    graphdef, params, documents: np.ndarray, path: Path | None = None
) -> np.ndarray:
    """Codes that the index stores, of the whole corpus by the current parameters.

    Args:
      graphdef, params: of a `JointIndex` with PQ leaves and without a tree.
      documents: embeddings (rows, D).
      path: .npy file to write them to, block after block, or None.

    Returns:
      codes (rows, M) uint8; with a path a memory map.
    """

    @jax.jit
    def apply(params, d):
        model = merge_model(graphdef, params)
        return model.quantiser.encode(model.rotate(d)[0])

    def make(start, stop):
        rows = documents[start:stop]
        codes = _by_chunks(functools.partial(apply, params), rows, "encode codes")
        return codes.astype(np.uint8)

    if path is None:
        return make(0, len(documents))
    return stream_rows(path, len(documents), make)


def _by_chunks(apply, rows: np.ndarray, desc: str) -> np.ndarray:
    """Apply the function to all rows, `ROWS` at a time."""
    made = []
    with Progress(desc, len(rows), "rows", bar=False) as progress:
        for start in range(0, len(rows), ROWS):
            chunk = np.asarray(rows[start : start + ROWS], np.float32)
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
