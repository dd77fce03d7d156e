"""Trained parameters as the NumPy arrays that `ehi.index.build_index` takes."""

import numpy as np

from ehi.model.params import merge_model


def index_arrays(graphdef, params) -> dict:
    """Tree, rotation, codebooks, centroids and score of a joint index.

    Absent parts are None.

    Args:
      graphdef, params: of a `JointIndex`, from `split_model`.

    Returns:
      keyword arguments of `build_index`.
    """
    model = merge_model(graphdef, params)
    arrays = dict.fromkeys(
        (
            "tree",
            "query_tree",
            "rotation",
            "codebooks",
            "assign_codebooks",
            "leaf_centroids",
        )
    )
    arrays["score"] = model.score
    if model.router is not None:
        arrays["tree"] = model.router.to_arrays()
    if model.query_router is not None:
        arrays["query_tree"] = model.query_router.to_arrays()
    if model.rotation is not None:
        arrays["rotation"] = np.asarray(model.rotation.matrix())
    if model.quantiser is not None:
        arrays["codebooks"] = np.asarray(model.quantiser.codebooks[...])
        if model.quantiser.assign_codebooks is not None:
            frozen = model.quantiser.assign_codebooks[...]
            arrays["assign_codebooks"] = np.asarray(frozen)
    if model.residual:
        arrays["leaf_centroids"] = np.asarray(model.centroids())
    return arrays


def query_head_arrays(graphdef, params) -> dict[str, np.ndarray]:
    """The head of the queries, as `ehi.index.text` applies it.

    Args:
      graphdef, params: of a `JointIndex`, from `split_model`.

    Returns:
      'projection' and, if the head has a hidden layer, 'w_in', 'b_in', 'w_out'.
    """
    model = merge_model(graphdef, params)
    group = "head" if model.query_head is None else "query_head"
    return {
        name.removeprefix(group + "/"): np.asarray(value)
        for name, value in params.items()
        if name.startswith(group + "/")
    }
