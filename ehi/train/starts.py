"""The start of a system: its parent's head, a k-means tree, OPQ codebooks.

Without training on top, this start *is* the separate pipeline.
"""

import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ehi.files import atomic_write_npz
from ehi.model.joint import JointIndex
from ehi.model.params import merge_model, split_model
from ehi.train.batch import checked_seed
from ehi.train.kmeans import kmeans, kmeans_tree
from ehi.train.opq import fit_opq, fit_pq

# Rounds of codebook and rotation fits. The distortion has settled by then.
OPQ_ROUNDS = 40


def inherit(
    params: Mapping[str, jax.Array], parent: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Parameters with the parent's tower and head.

    A query tower or head that the parent lacks starts as a copy of the documents' one.

    Raises:
      ValueError: the parent has no such array, or one of another shape.
    """
    params = dict(params)
    for name, start in params.items():
        group, _, rest = name.partition("/")
        source = f"{group.removeprefix('query_')}/{rest}"
        if group not in ("tower", "query_tower", "head", "query_head"):
            continue
        value = parent.get(name, parent.get(source))
        if value is None or value.shape != start.shape:
            has = "nothing" if value is None else value.shape
            raise ValueError(
                f"{name} has shape {start.shape}, its parent has {has}: a system and "
                "its parent need the same tower and head"
            )
        params[name] = value
    return params


def before_freezing(graphdef, params: Mapping[str, jax.Array]):
    """The model of the phases before its documents freeze.

    One tower and one head serve both sides, and the codes follow the codebooks.

    Args:
      graphdef, params: of the whole model; parameters that the phases lack are dropped.

    Returns:
      graphdef and parameters.
    """
    model = merge_model(graphdef, dict(params))
    drop_query_side(model)
    return split_model(model)


def drop_query_side(model: JointIndex) -> None:
    """Remove what queries have for themselves, and frozen codes, in place."""
    model.query_tower = model.query_head = None
    if model.quantiser is not None:
        model.quantiser.assign_codebooks = None


def freeze_documents(
    params: Mapping[str, jax.Array], trained: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The whole model after the phases of `before_freezing`.

    Queries get a copy of the tower and of the head. Documents keep the codes that the
    present codebooks give them, even when training changes the codebooks.

    Args:
      params: of the whole model, as it was before.
      trained: the parameters after those phases.
    """
    made = inherit(params, trained) | dict(trained)
    if "quantiser/assign_codebooks" in params:
        made["quantiser/assign_codebooks"] = trained["quantiser/codebooks"]
    return made


def fit_starts(
    model: JointIndex,
    documents: np.ndarray,
    *,
    seed: int,
    cache: Path,
    random_tree: bool = False,
) -> float:
    """Fit tree and leaves to document embeddings, in place, before training.

    The tree is fitted by hierarchical spherical k-means, or by k-means for nearest
    centroids; a leaf's centroid is the mean of its documents. The codebooks are fitted
    by OPQ, or by PQ without a rotation, to the embeddings or to the residuals. Parts
    that the model lacks are skipped.

    Args:
      model: a joint index, as it was initialised.
      documents: embeddings (rows, D) by the parent's head.
      seed: of the fits.
      cache: folder that keeps the fits, so that systems with the same fit share it.
      random_tree: leave the tree and the leaves' centroids as they are.

    Returns:
      the seconds that the fits took when they were made.
    """
    seed = checked_seed(seed)
    key = jax.random.key(seed)
    targets, of_tree, seconds = documents, "", 0.0
    if model.router is not None and not random_tree:
        targets, of_tree, seconds = _start_tree(model, documents, key, seed, cache)
    if model.quantiser is not None:
        m, k, _ = model.quantiser.codebooks.shape
        kind = "pq" if model.rotation is None else "opq"
        fit, took = _cached(
            cache / f"{kind}{of_tree}-{m}x{k}-seed{seed}.npz",
            lambda: _fit_leaves(targets, m, k, model.rotation is not None, key),
        )
        seconds += took
        model.quantiser.start_from(fit["codebooks"])
        if model.rotation is not None:
            model.rotation.start_from(fit["rotation"])
    return seconds


def _start_tree(model, documents, key, seed, cache):
    """Fit the tree; return what to quantise, a name for it, and the seconds."""
    router = model.router
    name = f"{router.kmeans}-{router.branching}^{router.height}"
    tree, seconds = _cached(
        cache / f"kmeans-{name}-seed{seed}.npz",
        lambda: KMEANS[router.kmeans](documents, router.height, router.branching, key),
    )
    nodes = [tree[f"nodes_{h}"] for h in range(router.height)]
    for started in (router, model.query_router):
        if started is not None:
            started.start_from(nodes)
    if model.leaf_centroids is not None:
        model.leaf_centroids[...] = jnp.asarray(tree["centroids"])
    if not model.residual:
        return documents, "", seconds
    residuals = documents - tree["centroids"][tree["leaves"]]
    return residuals, f"-residual-{name}", seconds


def _fit_lists(documents, _height, branching, key) -> dict:
    """Plain k-means: a document is in the leaf of its nearest centroid."""
    centroids, leaves = kmeans(documents, branching, key=key)
    return {
        "nodes_0": np.asarray(centroids)[None],
        "leaves": np.asarray(leaves),
        "centroids": np.asarray(centroids),
    }


def _fit_tree(documents, height, branching, key) -> dict:
    """Hierarchical spherical k-means; the centroid of a leaf is its documents' mean."""
    nodes, leaves = kmeans_tree(documents, height=height, branching=branching, key=key)
    leaves = np.asarray(leaves)  # (rows,)
    num_leaves = branching**height
    counts = np.bincount(leaves, minlength=num_leaves)
    sums = np.zeros((num_leaves, documents.shape[1]), np.float32)  # (P, D)
    np.add.at(sums, leaves, documents)
    named = {f"nodes_{h}": np.asarray(level) for h, level in enumerate(nodes)}
    return named | {
        "leaves": leaves,
        "centroids": sums / np.maximum(counts, 1)[:, None],
    }


# The fits that routers start from, by `Router.kmeans`.
KMEANS = {"tree": _fit_tree, "lists": _fit_lists}


def _fit_leaves(targets, m, k, rotated, key) -> dict:
    options = {"num_subspaces": m, "num_codewords": k, "key": key}
    if not rotated:
        return {"codebooks": np.asarray(fit_pq(targets, **options))}
    rotation, codebooks = fit_opq(targets, rounds=OPQ_ROUNDS, **options)
    return {"rotation": np.asarray(rotation), "codebooks": np.asarray(codebooks)}


def _cached(path: Path, fit) -> tuple[dict, float]:
    """A fit and the seconds that it took, from disk if it was made before."""
    arrays = _read(path)
    if arrays is None:
        started = time.monotonic()
        arrays = fit()
        arrays["seconds"] = np.float64(time.monotonic() - started)
        atomic_write_npz(path, arrays)
    return arrays, float(arrays.pop("seconds"))


def _read(path: Path) -> dict | None:
    """The arrays of a cached fit; None if there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (FileNotFoundError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        return None
    return arrays if "seconds" in arrays else None
