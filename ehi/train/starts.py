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
# A fit reads at most this many vectors for each codeword of a subspace, or each leaf.
# Faiss takes no more than 256 for one centroid, and warns below 39.
PER_CODEWORD, PER_LEAF = 256, 128


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
    fit_sample: int = 0,
) -> float:
    """Fit tree and leaves to document embeddings, in place, before training.

    The tree is fitted by hierarchical spherical k-means, or by k-means for nearest
    centroids; a leaf's centroid is the mean of its documents. The codebooks are fitted
    by OPQ, or by PQ without a rotation, to the embeddings or to the residuals. Parts
    that the model lacks are skipped. Of a large corpus a sample is fitted, which is
    drawn by the seed; a smaller corpus is fitted whole.

    Args:
      model: a joint index, as it was initialised.
      documents: embeddings (rows, D) by the parent's head; a memory map is not copied.
      seed: of the fits.
      cache: folder that keeps the fits, so that systems with the same fit share it.
      random_tree: leave the tree and the leaves' centroids as they are.
      fit_sample: the most vectors that are fitted; 0: see `sample_sizes`.

    Returns:
      the seconds that the fits took when they were made.
    """
    seed = checked_seed(seed)
    key = jax.random.key(seed)
    for_tree, for_codes = sample_sizes(model, fit_sample)
    documents, of_tree, seconds = _Sample(documents, seed), "", 0.0
    targets = documents
    if model.router is not None and not random_tree:
        sample = documents.at_most(for_tree)
        residuals, name, seconds = _start_tree(model, sample, key, seed, cache)
        # Codes of whole embeddings are fitted to the same rows under any tree.
        if model.residual:
            targets, of_tree = residuals, name
    if model.quantiser is not None:
        m, k, _ = model.quantiser.codebooks.shape
        kind = "pq" if model.rotation is None else "opq"
        targets = targets.at_most(for_codes)
        fit, took = _cached(
            cache / f"{kind}{of_tree}-{m}x{k}{targets.name}-seed{seed}.npz",
            lambda: _fit_leaves(targets.read(), m, k, model.rotation is not None, key),
        )
        seconds += took
        model.quantiser.start_from(fit["codebooks"])
        if model.rotation is not None:
            model.rotation.start_from(fit["rotation"])
    return seconds


def sample_sizes(model: JointIndex, fit_sample: int = 0) -> tuple[int, int]:
    """The most vectors that the fits of tree and codebooks read.

    ``n_codes = 256 K`` for K codewords of a subspace, and ``n_tree = 128 P`` for P
    leaves, or `n_codes` if that is more; both are `fit_sample` if it is above 0.

    >>> from flax import nnx
    >>> model = JointIndex(
    ...     tower_width=8, width=8, head_hidden=0, num_subspaces=4, num_codewords=16,
    ...     tree={"kind": "per_node", "height": 1, "branching": 64},
    ...     residual=True, rngs=nnx.Rngs(0))
    >>> sample_sizes(model)
    (8192, 4096)
    """
    if fit_sample:
        return fit_sample, fit_sample
    codes = leaves = 0
    if model.quantiser is not None:
        codes = PER_CODEWORD * model.quantiser.codebooks.shape[1]
    if model.router is not None:
        leaves = PER_LEAF * model.router.branching**model.router.height
    return max(codes, leaves), codes


class _Sample:
    """Some rows of an array, which are read when a fit needs them.

    Args:
      rows: (N, D), a memory map or an array.
      seed: of the draws.
      chosen: the rows, ascending; None for all.
      less: leaf centroids (P, D) and the leaf of each chosen row, to be subtracted.
    """

    def __init__(self, rows, seed: int, chosen=None, less=None):
        self._rows, self._seed, self._chosen, self._less = rows, seed, chosen, less

    def __len__(self) -> int:
        return len(self._rows if self._chosen is None else self._chosen)

    @property
    def name(self) -> str:
        """Part of the name of a fit; empty if all rows are fitted."""
        return "" if self._chosen is None else f"-of{len(self)}"

    def at_most(self, most: int) -> "_Sample":
        """The same if there are no more rows, else `most` of them."""
        if len(self) <= most:
            return self
        rng = np.random.default_rng([self._seed, most])
        kept = np.sort(rng.choice(len(self), most, replace=False))
        chosen = kept if self._chosen is None else self._chosen[kept]
        less = self._less and (self._less[0], self._less[1][kept])
        return _Sample(self._rows, self._seed, chosen, less)

    def minus(self, centroids: np.ndarray, leaves: np.ndarray) -> "_Sample":
        """The residuals of the rows to the centroids of their leaves."""
        return _Sample(self._rows, self._seed, self._chosen, (centroids, leaves))

    def read(self) -> np.ndarray:
        """The rows (n, D) float32."""
        rows = self._rows if self._chosen is None else self._rows[self._chosen]
        rows = np.asarray(rows, np.float32)
        return rows if self._less is None else rows - self._less[0][self._less[1]]


def sampled_rows(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """All rows, or `most` of them, which are drawn by the seed (n, D) float32."""
    return _Sample(rows, seed).at_most(most).read()


def _start_tree(model, documents: _Sample, key, seed, cache):
    """Fit the tree; return the residuals to its leaves, their name, and the seconds."""
    router = model.router
    name = f"{router.kmeans}-{router.branching}^{router.height}{documents.name}"
    tree, seconds = _cached(
        cache / f"kmeans-{name}-seed{seed}.npz",
        lambda: KMEANS[router.kmeans](
            documents.read(), router.height, router.branching, key
        ),
    )
    nodes = [tree[f"nodes_{h}"] for h in range(router.height)]
    for started in (router, model.query_router):
        if started is not None:
            started.start_from(nodes)
    if model.leaf_centroids is not None:
        model.leaf_centroids[...] = jnp.asarray(tree["centroids"])
    residuals = documents.minus(tree["centroids"], tree["leaves"])
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
