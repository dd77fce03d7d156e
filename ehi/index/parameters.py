"""The trained parameters of an index: their arrays, their shapes, their checks.

A tree is a dict of arrays. `ehi.model.tree` makes it, and no framework is needed to
read it:

    {'kind': 'per_node', 'nodes': [(1, B, D), (B, B, D), ...], 'scale': float,
     'biases': [(1, B), (B, B), ...],                    absent: zeros
     'w_in': (D, hidden), 'w_out': (hidden, D)}          both or neither
    {'kind': 'per_level', 'u': [(E, E), ...], 'w': [(E, B), ...]}, E = (h - 1) B + D

None is the tree of a flat index, which has one leaf.
"""

import functools
import re
from dataclasses import dataclass

import numpy as np

from ehi.index.check import (
    MOST_QUERY_NORM,
    as_float32,
    check_choice,
    check_count,
    check_json,
    finite_rows,
    is_float,
)
from ehi.index.search.codes import FACTORED, SCORES, byte_codebooks, codeword_columns
from ehi.index.search.topk import MAX_NUMBER

# Arrays of the parameters beside those of the trees and of the query head.
PARAMETER_ARRAYS = ("codebooks", "assign_codebooks", "rotation", "leaf_centroids")
_TREE_ENTRIES = {
    "per_node": ({"nodes", "scale"}, {"biases", "w_in", "w_out"}),
    "per_level": ({"u", "w"}, set()),
}


@dataclass(frozen=True, eq=False)
class Parameters:
    """The trained part of an index. It stays the same while documents come and go.

    Attributes:
        width: embedding width D.
        spill: leaves that each document is stored in, s.
        tree: dict as above, or None in a flat index.
        query_tree: the tree that queries descend, or None if they descend `tree`.
        codebooks: (M, K, S) float32, or None in raw leaves.
        assign_codebooks: (M, K, S) float32 that choose the codes, or None if
            `codebooks` choose them. JPQ needs both: it trains codebooks after the
            codes are given.
        rotation: (D, D) float32, applied as q @ rotation, or None.
        leaf_centroids: (P, D) float32 if codes are of residuals, or None.
        score: how codes are scored, one of `ehi.index.search.codes.SCORES`; 'ip' in raw
            leaves.
        encoder, config: JSON dicts that identify what made the embeddings and the
            index, or None.
        query_head: arrays of the query head, for encoders outside this package.
    """

    width: int
    spill: int
    tree: dict | None = None
    query_tree: dict | None = None
    codebooks: np.ndarray | None = None
    assign_codebooks: np.ndarray | None = None
    rotation: np.ndarray | None = None
    leaf_centroids: np.ndarray | None = None
    score: str = "ip"
    encoder: dict | None = None
    config: dict | None = None
    query_head: dict | None = None

    @functools.cached_property
    def num_leaves(self):
        height, branching = tree_shape(self.tree)
        return branching**height

    @property
    def routing_tree(self):
        """The tree that queries descend."""
        return self.tree if self.query_tree is None else self.query_tree

    @property
    def code_bytes(self):
        """Bytes of one document's code; codebooks only."""
        num_subspaces, num_codewords, _ = self.codebooks.shape
        return num_subspaces if num_codewords == 256 else num_subspaces // 2

    @functools.cached_property
    def byte_codebooks(self):
        """Codebooks of the bytes in `codes`: see `ehi.index.search.codes`."""
        return byte_codebooks(self.codebooks)

    @functools.cached_property
    def codeword_columns(self):
        """The same as columns: see `ehi.index.search.codes`."""
        return codeword_columns(self.byte_codebooks)

    @property
    def has_factors(self):
        """Whether every copy of a document is stored with a factor of its score."""
        return self.score in FACTORED

    @functools.cached_property
    def l2_table(self):
        """Terms of the score 'l2' for each stored byte, (M, 256): sums are 1/2 - norms.

        It is -|codeword|^2 / 2, and 1/2 more in the first sub-space.
        """
        table = np.vecdot(self.byte_codebooks, self.byte_codebooks) / -2
        table[0] += 0.5
        return table

    @functools.cached_property
    def half_centroid_norms(self):
        """|leaf centroid|^2 / 2: (P,)."""
        return np.vecdot(self.leaf_centroids, self.leaf_centroids) / 2

    @functools.cached_property
    def rotated_centroids(self):
        """Leaf centroids times the rotation, or None: (P, D)."""
        if self.rotation is None or self.leaf_centroids is None:
            return self.leaf_centroids
        return self.leaf_centroids @ self.rotation

    @functools.cached_property
    def code_norm(self):
        """A bound of the norms of decoded documents."""
        longest = (self.codebooks**2).sum(axis=2).max(axis=1)  # (M,)
        norm = float(np.sqrt(longest.sum()))
        if self.leaf_centroids is not None:
            norm += float(np.linalg.norm(self.leaf_centroids, axis=1).max())
        return norm

    def arrays(self):
        """Every array under its name in the manifest of a folder."""
        arrays = {name: getattr(self, name) for name in PARAMETER_ARRAYS}
        for name in ("tree", "query_tree"):
            for key, value in (getattr(self, name) or {}).items():
                if isinstance(value, list):
                    levels = enumerate(value)
                    arrays |= {f"{name}.{key}.{h}": level for h, level in levels}
                elif isinstance(value, np.ndarray):
                    arrays[f"{name}.{key}"] = value
        head = self.query_head or {}
        arrays |= {f"query_head.{key}": value for key, value in head.items()}
        return {name: array for name, array in arrays.items() if array is not None}


def make_parameters(
    width, num, *, tree, query_tree=None, rotation=None, codebooks=None,
    assign_codebooks=None, leaf_centroids=None, score="ip", spill=1, encoder=None,
    config=None, query_head=None,
):  # fmt: skip
    """Checked Parameters for an index of `num` documents.

    Args:
        width: embedding width D.
        num: documents, at least as many as leaves.
        tree, query_tree, rotation, codebooks, assign_codebooks, leaf_centroids, score,
            spill, encoder, config, query_head: as of `build_index`.

    Raises:
        ValueError: an argument that does not fit.
    """
    if num > MAX_NUMBER:
        raise ValueError(f"{num} documents are more than the {MAX_NUMBER} of one index")
    tree = check_tree(tree, width)
    query_tree = check_tree(query_tree, width, "query_tree")
    _check_same_shape(tree, query_tree)
    height, branching = tree_shape(tree)
    num_leaves = branching**height
    if num_leaves > num:
        raise ValueError(
            f"a tree of {num_leaves} leaves is too large for {num} documents"
        )
    spill = check_count("spill", spill)
    _check_spill(spill, num_leaves)
    quantiser = check_quantiser(
        width, num_leaves, codebooks=codebooks, assign_codebooks=assign_codebooks,
        rotation=rotation, leaf_centroids=leaf_centroids,
    )  # fmt: skip
    parameters = Parameters(
        width=width, spill=spill, tree=tree, query_tree=query_tree,
        score=check_score(score, codebooks),
        encoder=check_json("encoder", encoder), config=check_json("config", config),
        query_head=_check_query_head(query_head), **quantiser,
    )  # fmt: skip
    for name, array in parameters.arrays().items():
        finite_rows(name, array.reshape(len(array), -1))
    for name in ("tree", "query_tree"):
        if getattr(parameters, name) is not None:
            _check_scores(getattr(parameters, name), name)
    return parameters


def check_fit(parameters):
    """Checks that the arrays of Parameters read from a folder fit each other.

    Raises:
        ValueError: naming the array.
    """
    _check_same_shape(parameters.tree, parameters.query_tree)
    _check_spill(parameters.spill, parameters.num_leaves)
    check_score(parameters.score, parameters.codebooks)
    names = ("assign_codebooks", "rotation", "leaf_centroids")
    if parameters.codebooks is None:
        for name in names:
            if getattr(parameters, name) is not None:
                raise ValueError(f"{name} without codebooks")
        return
    codebooks = check_codebooks(parameters.codebooks, parameters.width)
    square = (parameters.width, parameters.width)
    leaves = (parameters.num_leaves, parameters.width)
    expect("codebooks", parameters.codebooks, codebooks.shape, "float32")
    for name, shape in zip(names, (codebooks.shape, square, leaves), strict=True):
        if getattr(parameters, name) is not None:
            expect(name, getattr(parameters, name), shape, "float32")


def expect(name, array, shape, *dtypes):
    """Refuses an array of another shape, or of none of the dtypes.

    Raises:
        ValueError: naming the array and what it is.
    """
    if array.shape != shape or array.dtype.name not in dtypes:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}, expected {dtypes[0]} {shape}"
        )


def check_score(score, codebooks):
    """`score`, if leaves of these codebooks, None for raw ones, can have it.

    Raises:
        ValueError: an unknown score, or another than 'ip' without codes.
    """
    check_choice("score", score, SCORES)
    if codebooks is None and score != "ip":
        raise ValueError(
            f"score {score!r} is for codes; raw leaves hold the vectors themselves: "
            "use 'ip'"
        )
    return score


def check_quantiser(
    width, num_leaves, *, codebooks, assign_codebooks, rotation, leaf_centroids
):
    """The parameters of PQ leaves as float32 arrays that fit; all None of raw leaves.

    Raises:
        ValueError: an argument that does not fit.
    """
    parts = {
        "codebooks": codebooks,
        "assign_codebooks": assign_codebooks,
        "rotation": rotation,
        "leaf_centroids": leaf_centroids,
    }
    if codebooks is None:
        for name, value in parts.items():
            if value is not None:
                raise ValueError(f"{name} needs codebooks")
        return parts
    parts["codebooks"] = check_codebooks(codebooks, width)
    if assign_codebooks is not None:
        choosing = check_codebooks(assign_codebooks, width)
        if choosing.shape != parts["codebooks"].shape:
            raise ValueError(
                f"assign_codebooks are {choosing.shape}, codebooks "
                f"{parts['codebooks'].shape}; they must have one shape"
            )
        parts["assign_codebooks"] = choosing
    if rotation is not None:
        parts["rotation"] = check_rotation(rotation, width)
    if leaf_centroids is not None:
        parts["leaf_centroids"] = _array(
            "leaf_centroids", leaf_centroids, (num_leaves, width)
        )
    return parts


def tree_shape(tree):
    """(height, branching) of a tree; (0, 1) for None."""
    if tree is None:
        return 0, 1
    if tree["kind"] == "per_node":
        return len(tree["nodes"]), tree["nodes"][0].shape[1]
    return len(tree["w"]), tree["w"][0].shape[1]


def path_to_leaf(tree, leaf):
    """The child numbers from the root to a leaf: a tuple of H ints."""
    height, branching = tree_shape(tree)
    if not 0 <= leaf < branching**height:
        raise ValueError(f"leaf {leaf} is outside the {branching**height} leaves")
    return tuple(
        int(leaf) // branching ** (height - level) % branching
        for level in range(1, height + 1)
    )


def _check_same_shape(tree, query_tree):
    if query_tree is not None and tree_shape(query_tree) != tree_shape(tree):
        raise ValueError(
            "query_tree and tree must have the same height and branching, "
            f"got {tree_shape(query_tree)} and {tree_shape(tree)}"
        )


def _check_spill(spill, num_leaves):
    if spill > num_leaves:
        raise ValueError(f"spill {spill} is larger than the {num_leaves} leaves")


def _check_scores(tree, name):
    """Refuses a tree whose scores overflow float32 for the longest query allowed.

    |x A| is at most |x| |A|, which bounds each step of `ehi.index.search.routing`. A
    log-probability is the sum of H differences of two logits.
    """
    norm = np.linalg.norm
    height, _ = tree_shape(tree)
    steps, x = [], MOST_QUERY_NORM
    if tree["kind"] == "per_node":
        if "w_in" in tree:
            steps.append(x * float(norm(tree["w_in"])))
            x += steps[0] * float(norm(tree["w_out"]))
        longest = max(float(norm(level, axis=2).max()) for level in tree["nodes"])
        biases = [float(np.abs(level).max()) for level in tree.get("biases", [])]
        steps.append(x * longest + max(biases, default=0))
        steps.append(steps[-1] * abs(tree["scale"]))
    else:
        for u, w in zip(tree["u"], tree["w"], strict=True):
            steps.append((x + height) * float(norm(u)))
            steps.append((x + height + steps[-1]) * float(norm(w)))
    most = float(np.finfo(np.float32).max) / (2 * height)
    if not max(steps) <= most:
        raise ValueError(
            f"{name} gives scores of up to {max(steps):.3g} to a query of norm "
            f"{MOST_QUERY_NORM:.3g}, where those beyond {most:.3g} overflow float32: "
            "its scale or its arrays are too large"
        )


def _check_query_head(arrays):
    if arrays is None:
        return None
    bad = [key for key in arrays if not re.fullmatch(r"\w+", key, re.ASCII)]
    if bad:
        raise ValueError(f"query_head names must be plain words, got {bad}")
    return {key: np.asarray(value, np.float32) for key, value in arrays.items()}


def check_tree(tree, width, name="tree"):
    """`tree` as a dict of contiguous float32 arrays whose shapes fit; None stays None.

    Raises:
        ValueError: another kind, missing or unknown entries, or shapes that do not fit
            each other and the width D.
    """
    if tree is None:
        return None
    kind = tree.get("kind")
    if kind not in _TREE_ENTRIES:
        raise ValueError(f"{name} kind must be 'per_node' or 'per_level', got {kind!r}")
    required, optional = _TREE_ENTRIES[kind]
    tree = {key: value for key, value in tree.items() if value is not None}
    entries = tree.keys() - {"kind"}
    lone = len(entries & {"w_in", "w_out"}) == 1
    if lone or not required <= entries <= required | optional:
        raise ValueError(
            f"a {kind} {name} holds {sorted(required)} and perhaps "
            f"{sorted(optional)} (w_in and w_out together); got {sorted(entries)}"
        )
    checked = _per_node if kind == "per_node" else _per_level
    return {"kind": kind, **checked(tree, width, name)}


def check_rotation(rotation, width):
    """An orthogonal (D, D) matrix as float32, to a tolerance of 1e-3."""
    rotation = _array("rotation", rotation, (width, width))
    error = np.abs(rotation.T @ rotation - np.eye(width, dtype=np.float32)).max()
    if not error <= 1e-3:
        raise ValueError(
            f"rotation is not orthogonal: R^T R is {error:.2g} from the identity"
        )
    return rotation


def check_codebooks(codebooks, width):
    """Codebooks (M, K, S) as float32, K = 16 (M even: two codes a byte) or 256."""
    codebooks = np.asarray(codebooks)
    if codebooks.ndim != 3:
        raise ValueError(f"codebooks must be (M, K, S), got shape {codebooks.shape}")
    num_subspaces, num_codewords, subwidth = codebooks.shape
    if num_subspaces * subwidth != width:
        raise ValueError(
            f"codebooks of {num_subspaces} sub-spaces of width {subwidth} do not make "
            f"the width {width}; D must be divisible by M, and S = D / M"
        )
    if num_codewords not in (16, 256):
        raise ValueError(f"codebooks must have K = 16 or 256, got {num_codewords}")
    if num_codewords == 16 and num_subspaces % 2:
        raise ValueError(
            f"K = 16 stores two codes a byte, so M = {num_subspaces} must be even"
        )
    return _array("codebooks", codebooks, codebooks.shape)


def _per_node(tree, width, name):
    first = np.asarray(tree["nodes"][0]) if len(tree["nodes"]) else np.zeros(0)
    if first.ndim != 3 or not first.size:
        raise ValueError(
            f"{name} nodes must start with an array (1, B, {width}), got {first.shape}"
        )
    branching = first.shape[1]
    nodes = [
        _array(f"{name} nodes[{h}]", level, (branching**h, branching, width))
        for h, level in enumerate(tree["nodes"])
    ]
    scale = float(tree["scale"])
    if not abs(scale) < float(np.finfo(np.float32).max):
        raise ValueError(f"{name} scale must be a float32 number, got {scale}")
    checked = {"nodes": nodes, "scale": scale}
    if "biases" in tree:
        if len(tree["biases"]) != len(nodes):
            raise ValueError(
                f"{name} has {len(nodes)} levels of nodes, {len(tree['biases'])} of "
                "biases"
            )
        checked["biases"] = [
            _array(f"{name} biases[{h}]", level, (branching**h, branching))
            for h, level in enumerate(tree["biases"])
        ]
    if "w_in" in tree:
        hidden = np.shape(tree["w_in"])[-1] if np.ndim(tree["w_in"]) else 0
        checked["w_in"] = _array(f"{name} w_in", tree["w_in"], (width, hidden))
        checked["w_out"] = _array(f"{name} w_out", tree["w_out"], (hidden, width))
    return checked


def _per_level(tree, width, name):
    first = np.asarray(tree["w"][0]) if len(tree["w"]) else np.zeros(0)
    if first.ndim != 2 or not first.size or len(tree["u"]) != len(tree["w"]):
        raise ValueError(
            f"{name} needs as many u as w, the first w of shape ({width}, B); "
            f"got {len(tree['u'])} u and {len(tree['w'])} w, first {first.shape}"
        )
    branching = first.shape[1]
    wide = [h * branching + width for h in range(len(tree["w"]))]  # E of each level
    return {
        "u": [
            _array(f"{name} u[{h}]", u, (wide[h], wide[h]))
            for h, u in enumerate(tree["u"])
        ],
        "w": [
            _array(f"{name} w[{h}]", w, (wide[h], branching))
            for h, w in enumerate(tree["w"])
        ],
    }


def _array(name, value, shape):
    value = np.asarray(value)
    if value.shape != shape or not is_float(value):
        raise ValueError(
            f"{name} must be floats of shape {shape}, "
            f"got {value.dtype} of shape {value.shape}"
        )
    return as_float32(value)
