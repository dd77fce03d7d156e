"""Shapes without numbers: data set, model, batch and tables of a config, for a dry run.

Memory and time are never spent on them, and neither data nor weights are needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx

from ehi.data.datasets import open_dataset
from ehi.model.encoder import TextEncoder
from ehi.model.params import has_tower
from ehi.model.pretrained import resolve
from ehi.train.phase import Phase
from experiments.modules import build_model

# Towers of configs that name no shape of their own.
TOWERS = {
    "sentence-transformers/all-MiniLM-L6-v2": {
        "vocab_size": 30522, "width": 384, "num_layers": 6, "num_heads": 12,
        "mlp_width": 1536, "max_positions": 512, "type_vocab_size": 2,
    },
}  # fmt: skip
# Columns of a batch that lists the known positives of its queries; in a real run, as
# many as the query with the most has.
MOST_POSITIVES = 8


@dataclass(frozen=True)
class Sizes:
    """How large a data set is: documents, and train queries, one a labelled pair."""

    documents: int
    train_queries: int


def data_sizes(config) -> Sizes:
    """Sizes that a config states, else those of its data set, which is then opened."""
    stated = config.get("sizes", {})
    if stated.get("documents", 0):
        return Sizes(stated["documents"], stated.get("train_queries", 0))
    dataset = open_dataset(config.dataset)
    pairs = dataset.positives("train")[0] if "train" in dataset.qrels else ()
    return Sizes(len(dataset.documents), len(pairs))


def tower_shape(config) -> dict:
    """Arguments of the `TextEncoder` of a config: stated, known, or of a checkpoint."""
    stated = config.tower.get("shape", None)
    if stated:
        return dict(stated)
    name = config.tower.name
    return dict(TOWERS[name]) if name in TOWERS else dict(resolve(name).config)


def abstract_model(config, system, compression: int | None, sizes: Sizes, shape: dict):
    """The module of a system as `build_model` makes it, of shapes without numbers."""

    def build():
        # All that `build_model` asks of its inputs.
        tower = TextEncoder(
            **shape,
            dtype=jnp.dtype(config.tower.dtype),
            remat=config.tower.remat,
            rngs=nnx.Rngs(0),
        )
        inputs = SimpleNamespace(
            pretrained=SimpleNamespace(config=shape),
            dataset=SimpleNamespace(documents=range(sizes.documents)),
            tower=tower,
            fresh_tower=lambda: nnx.clone(tower),
        )
        return build_model(config, system, compression, inputs)

    return nnx.eval_shape(build)


def abstract_batch(config, phase: Phase, params: Mapping, sizes: Sizes) -> dict:
    """Shapes of what `make_batch` returns for a phase."""
    n, c = phase.batch_size, min(phase.pool, sizes.documents)
    batch = {
        "queries": _array((n,), jnp.int32),
        "documents": _array((c,), jnp.int32),
        "target": _array((n,), jnp.int32),
        "where": _array((n, c), bool),
        "weights": _array((n,), jnp.float32),
    }
    if phase.needs_codes:
        batch["positives"] = _array((n, MOST_POSITIVES), jnp.int32)
    if has_tower(params):
        for side, rows, length in (
            ("queries", phase.encoded or n, config.tower.query_length),
            ("documents", min(phase.encoded, c) or c, config.tower.document_length),
        ):
            batch[f"{side}_ids"] = _array((rows, length), jnp.int32)
            batch[f"{side}_mask"] = _array((rows, length), bool)
    return batch


def abstract_tables(config, phase: Phase, params: Mapping, sizes: Sizes) -> dict:
    """Shapes of the read-only arrays that the steps of a phase gather from.

    The query table has the train queries, pseudo-queries, documents and, of tower
    outputs, synthetic queries.
    """
    in_width, width = params["head/projection"].shape  # (T, D)
    documents, frozen = sizes.documents, not has_tower(params)
    per_document = config.pseudo.per_document + 1 + config.pseudo.synthetic
    queries = sizes.train_queries + documents * per_document
    tables = {}
    if frozen or phase.losses.get("query_anchor"):
        tables["features_queries"] = _array((queries, in_width), jnp.float32)
    if frozen or phase.losses.get("anchor"):
        tables["features_documents"] = _array((documents, in_width), jnp.float32)
    if not frozen and phase.encoded:
        tables["cached_queries"] = _array((queries, in_width), jnp.float32)
        tables["cached_documents"] = _array((documents, in_width), jnp.float32)
    if phase.needs_teacher:
        tables["teacher_queries"] = _array((queries, width), jnp.float32)
        tables["teacher_documents"] = _array((documents, width), jnp.float32)
    if phase.needs_codes:
        m = params["quantiser/codebooks"].shape[0]
        tables["codes"] = _array((documents, m), jnp.uint8)
    return tables


def _array(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
