"""What the tower makes of the corpus and of the query table, and the heads of that."""

import os
from pathlib import Path

import jax
import numpy as np

from ehi.model.params import has_tower
from ehi.train.embed import embed
from ehi.train.processes import digest
from experiments.inputs import Inputs


def tower_outputs(
    graphdef, params, inputs: Inputs, folder: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tower outputs of the corpus (documents, T) and of the query table (rows, T).

    Those of the pretrained tower, or, of a model that trains its own, of that.

    Args:
      graphdef, params: of a `JointIndex`, from `split_model`.
      inputs: from `load_inputs`.
      folder: where the outputs of a trained tower are kept; None to keep none.
    """
    if not has_tower(params):
        return inputs.document_features, inputs.query_features
    if folder is None:
        return _encode(graphdef, params, inputs)
    towers = {n: params[n] for n in params if n.split("/")[0].endswith("tower")}
    path = folder / f"{digest(jax.device_get(towers))[:16]}.npz"
    if not path.exists():
        documents, queries = _encode(graphdef, params, inputs)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(temporary, documents=documents, queries=queries)
        os.replace(temporary, path)
    with np.load(path, allow_pickle=False) as file:
        return file["documents"], file["queries"]


def embeddings(
    graphdef, params, inputs: Inputs, folder: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the corpus (documents, D) and of the query table (rows, D).

    Args: see `tower_outputs`.
    """
    documents, queries = tower_outputs(graphdef, params, inputs, folder)
    documents = embed(graphdef, params, "documents", documents)
    return documents, embed(graphdef, params, "queries", queries)


def _encode(graphdef, params, inputs: Inputs):
    documents = embed(graphdef, params, "documents", inputs.document_tokens, head=False)
    queries = embed(graphdef, params, "queries", inputs.query_tokens, head=False)
    return documents, inputs.query_table(queries, documents)
