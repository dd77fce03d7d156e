"""Refuses what does not fit, in one sentence, before any work is done."""

import json
import math
import numbers
import operator

import numpy as np

_PADDED = 2**20  # results that may always be asked for
_TREE_ENTRIES = {
    "per_node": ({"nodes", "scale"}, {"biases", "w_in", "w_out"}),
    "per_level": ({"u", "w"}, set()),
}


def check_count(name, value, least=1):
    """`value` as an int of at least `least`."""
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_share(name, value):
    """`value` as a float between 0 and 1."""
    # An abstract class is asked last: that takes ten times as long.
    if isinstance(value, (float, int, numbers.Real)) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}")


def check_choice(name, value, allowed):
    """`value`, if it is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


def check_results(name, value, num_documents, least=1):
    """`value`, how many results are wanted, as an int that memory can hold.

    A million may be asked for whatever there is: what is missing is padded.
    """
    value, most = check_count(name, value, least), max(num_documents, _PADDED)
    if value > most:
        raise ValueError(
            f"{name} must be at most {most}, got {value}: the index holds "
            f"{num_documents} documents"
        )
    return value


def check_json(name, value):
    """`value`, if it is a dict of plain JSON or None."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict of JSON values or None, got {value!r}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be plain JSON: {error}") from None
    return value


def check_same_encoder(expected, got):
    """Refuses an encoder whose identity differs in an entry that both name.

    One that names nothing the other does is refused as well: nothing was compared.
    """
    check_json("encoder", got)
    if not expected.keys() & got.keys():
        raise ValueError(
            f"an encoder of {sorted(got)} cannot be compared with that of the index, "
            f"of {sorted(expected)}"
        )
    for key in expected.keys() & got.keys():
        if expected[key] != got[key]:
            raise ValueError(
                f"these embeddings are of another encoder: its {key} is {got[key]!r}, "
                f"the index was built with {expected[key]!r}"
            )


def check_queries(queries, width):
    """Queries as float32 (N, D)."""
    queries = np.asarray(queries)
    if queries.dtype.kind != "f":
        raise ValueError(f"queries must be floats, got dtype {queries.dtype}")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(
            f"queries must have shape (N, {width}), the width of the index, "
            f"got {queries.shape}"
        )
    return finite_rows("queries", np.ascontiguousarray(queries, np.float32))


def check_embeddings(embeddings):
    """Document embeddings as float32 (N, D), at least one."""
    embeddings = np.asarray(embeddings)
    if embeddings.dtype.kind != "f" or embeddings.ndim != 2:
        raise ValueError(
            "embeddings must be floats of shape (N, D), "
            f"got {embeddings.dtype} of shape {embeddings.shape}"
        )
    if not embeddings.size:
        raise ValueError(f"an empty corpus: embeddings have shape {embeddings.shape}")
    return finite_rows("embeddings", np.ascontiguousarray(embeddings, np.float32))


def finite_rows(name, rows):
    """`rows` unchanged, if all values are finite."""
    # A sum is finite unless a value is not (or it overflows): one pass, no temporary.
    if rows.dtype == np.float32:  # BLAS: of one query a quarter of the time
        total = np.vdot(rows, rows)
    else:
        with np.errstate(invalid="ignore"):
            total = rows.sum(dtype=np.float64)
    if not math.isfinite(total):
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{name} hold NaN or infinity in {len(bad)} rows, first in row {bad[0]}"
            )
    return rows


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


def check_centroids(centroids, num_leaves, width):
    """Leaf centroids (P, D) as float32."""
    return _array("leaf_centroids", centroids, (num_leaves, width))


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
    if value.shape != shape or value.dtype.kind != "f":
        raise ValueError(
            f"{name} must be floats of shape {shape}, "
            f"got {value.dtype} of shape {value.shape}"
        )
    return np.ascontiguousarray(value, np.float32)
