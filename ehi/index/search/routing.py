"""Routing: which leaves a query visits, and which leaves store a document.

A beam search descends the tree of `ehi.index.parameters`. A leaf is the mixed-radix
number of its path, level 1 most significant. p(leaf | x) is the product of the
softmaxes along the path, as in EHI (arXiv:2310.08891, section 3.2).
"""

import contextlib
from typing import NamedTuple

import numpy as np

from ehi.index.check import IndexCorruptError, check_count
from ehi.index.parameters import tree_shape
from ehi.index.search.blas import map_threads, one_blas_thread
from ehi.index.search.topk import best_of, pack, smallest, unpack

_NO_NUMBERS = "the tree gives scores that are not numbers"
_ROOT = np.zeros((1, 1), np.int64)  # the nodes above the first level


class Routes(NamedTuple):
    """The b best leaves found for each query, best first.

    Attributes:
        leaves: (N, b) int64 leaf numbers, padded with -1.
        log_probs: (N, b) float32 log p(leaf | query), padded with -inf.
        nodes_scored: (N,) int64 tree nodes that were scored.
    """

    leaves: np.ndarray
    log_probs: np.ndarray
    nodes_scored: np.ndarray


def route(x, tree, beam, min_prob=0.0, normalise=True):
    """Beam search: each level keeps its `beam` best nodes, or all if it has fewer.

    Leaves with p(leaf | x) < min_prob are dropped, except for the best one. Nodes that
    improbable are not expanded, since no leaf is more probable than a node above it.

    Args:
        x: (N, D) float32.
        tree: dict as in `ehi.index.parameters`.
        beam: nodes kept at each level, b; equal scores go to the smaller node.
        min_prob: the least p(leaf | x) of a leaf that is kept, 0 .. 1.
        normalise: False if only the leaves matter. A tree of one level without min_prob
            then skips its softmax, which changes no order, and log_probs are logits.

    Returns:
        Routes with b = min(beam, P), or fewer if every row keeps fewer.
    """
    if min_prob <= 0:
        return _descend(x, tree, beam, beam, normalise=normalise)
    floor = np.log(min_prob)
    found = _descend(x, tree, beam, beam, floor)
    unsure = np.flatnonzero(found.log_probs[:, 0] < floor)
    if len(unsure) and tree_shape(tree)[0] > 1:  # the best may be below a dropped node
        best = _descend(x[unsure], tree, beam, 1)
        found.leaves[unsure, 0] = best.leaves[:, 0]
        found.log_probs[unsure, 0] = best.log_probs[:, 0]
        found.nodes_scored[unsure] += best.nodes_scored
    return found


def assign_leaves(x, tree, spill=1, *, beam=None, threads=1, progress=None):
    """The top leaves of documents, best first, in chunks of documents.

    By default the result is exact, and all P leaves are scored. With a beam, each level
    keeps its `beam` best nodes, and the leaves below the nodes of the last but one
    level compete: beam x B nodes are scored at each level. A beam that keeps all nodes
    of that level is exact.

    Args:
        x: (N, D) float32.
        tree: dict as in `ehi.index.parameters`.
        spill: leaves that each document is stored in, s.
        beam: nodes kept at each level, at least s, or None for all of them.
        threads: Python threads over chunks of documents, one BLAS thread each.
        progress: called with the number of documents of every chunk that is done, in
            its thread; or None.

    Returns:
        (N, s) int64; equal probabilities go to the smaller leaf.

    Raises:
        ValueError: a beam narrower than s, threads out of range.

    Example:
        >>> import numpy as np
        >>> nodes = np.array([[[1, 0], [0, 1], [-1, 0]]], np.float32)  # (1, B, D)
        >>> tree = {"kind": "per_node", "nodes": [nodes], "scale": 1.0}
        >>> x = np.array([[0.9, 0.1], [-0.2, 0.8]], np.float32)
        >>> assign_leaves(x, tree, spill=2).tolist()
        [[0, 1], [1, 2]]
    """
    height, branching = tree_shape(tree)
    beam = check_beam_of_documents(beam, spill)
    threads = check_count("threads", threads)
    leaves = np.zeros((len(x), spill), np.int64)
    if not height:
        if progress is not None:
            progress(len(x))
        return leaves
    beam = branching**height if beam is None else beam
    # Twice the rows of a search: more documents share each pruned node's product.
    rows = rows_at_once(tree, beam, most=2**13)

    def assign(start):
        part = slice(start, start + rows)
        leaves[part] = _descend(x[part], tree, beam, spill, normalise=False).leaves
        if progress is not None:
            progress(len(x[part]))

    starts = range(0, len(x), rows)
    with one_blas_thread() if threads > 1 else contextlib.nullcontext():
        map_threads(assign, starts, threads)
    return leaves


def check_beam_of_documents(beam, spill):
    """`beam` as `assign_leaves` takes it: None, or an int of at least s."""
    if beam is None:
        return None
    beam = check_count("beam", beam)
    if beam < spill:
        raise ValueError(
            f"beam {beam} is smaller than the {spill} leaves of each document"
        )
    return beam


def leaf_log_probs(x, tree):
    """log p(leaf | x) of every leaf, the sum of the levels' log softmaxes: (N, P).

    Args:
        x: (N, D) float32.
        tree: dict as in `ehi.index.parameters`.

    Example:
        >>> import numpy as np
        >>> nodes = np.array([[[1, 0], [0, 1]]], np.float32)  # (1, B, D)
        >>> tree = {"kind": "per_node", "nodes": [nodes], "scale": 1.0}
        >>> np.exp(leaf_log_probs(np.zeros((1, 2), np.float32), tree)).tolist()
        [[0.5, 0.5]]
    """
    height, branching = tree_shape(tree)
    hidden = _node_input(x, tree)
    log_probs = np.zeros((len(x), 1), np.float32)
    for level in range(height):
        nodes = np.broadcast_to(np.arange(branching**level), log_probs.shape)
        joint = log_probs[:, :, None] + _log_softmax(
            _child_logits(hidden, tree, level, nodes)
        )
        log_probs = joint.reshape(len(x), branching ** (level + 1))
    return log_probs


def rows_at_once(tree, beam, entries=2**23, most=4096):
    """The number of rows to route together, in temporaries of about `entries`."""
    height, branching = tree_shape(tree)
    if not height:
        return most
    frontier = min(beam, branching ** (height - 1))
    width = branching
    if tree["kind"] == "per_level":
        width = max(branching, len(tree["w"][-1]))
    return max(1, min(most, entries // (frontier * width)))


def _descend(x, tree, beam, leaves, floor=-np.inf, normalise=True):
    """`route` that returns the best `leaves` <= beam of the leaves it scores.

    All rows keep the same number of nodes: enough for the row with most nodes above
    `floor` (a log-probability). The surplus is removed at the end.
    """
    height, branching = tree_shape(tree)
    num = len(x)
    hidden = _node_input(x, tree)
    if num == height == 1 and not normalise and floor == -np.inf:
        return _best_of_one_level(hidden, tree, min(leaves, branching))
    nodes = np.zeros((num, 1), np.int64)
    log_probs = np.zeros((num, 1), np.float32)
    scored = 0
    for level in range(height):
        joint = _child_logits(hidden, tree, level, nodes)  # (N, f, B)
        if normalise or height > 1:
            _log_softmax(joint)
            joint += log_probs[:, :, None]
        scored += nodes.shape[1] * branching
        last = level == height - 1
        keep = min(leaves if last else beam, branching ** (level + 1))
        if floor > -np.inf:
            above = np.count_nonzero(joint >= floor, axis=(1, 2))
            keep = min(keep, max(1, above.max(initial=1)))
        if last or keep < nodes.shape[1] * branching:
            log_probs, nodes = _best_children(joint, nodes, keep)
        else:
            log_probs = _per_row(joint)
            nodes = _children(nodes, branching)
    if floor > -np.inf:
        below = log_probs < floor
        below[:, :1] = False
        nodes[below], log_probs[below] = -1, -np.inf
    return Routes(nodes, log_probs, np.full(num, scored, np.int64))


def _best_of_one_level(hidden, tree, keep):
    """`_descend` of one row (1, D) in a tree of height 1, with half the calls."""
    logits = _child_logits(hidden, tree, 0, _ROOT)[0, 0]  # (B,)
    scores, leaves = best_of(logits, _as_they_are, keep)
    _check_numbers(scores, keep)
    return Routes(leaves[None], scores[None], np.array([len(logits)]))


def _as_they_are(positions):
    return positions


def _best_children(joint, nodes, keep):
    """The best children of nodes (N, f): their scores and numbers, (N, keep) each.

    Children below a row's keep-th score are dropped first: sorting all of them takes
    ten times as long.
    """
    branching = joint.shape[2]
    joint = _per_row(joint)  # (N, f B)
    num, width = joint.shape
    if num == 1:  # half the calls, each of which costs more than its work on one row
        scores, numbers = best_of(joint[0], _children(nodes, branching)[0], keep)
        _check_numbers(scores, min(keep, width))
        return scores[None], numbers[None]
    if keep < width:
        if keep == 1:
            floor = joint.max(axis=1)
        else:
            floor = np.partition(joint, width - keep, axis=1)[:, width - keep]
        kept = np.flatnonzero(joint >= floor[:, None])
        if len(kept) <= 2 * num * keep:  # few nodes tie with the keep-th
            parent, digit = np.divmod(kept, branching)
            numbers = nodes.ravel()[parent] * branching + digit
            scores, rows = joint.ravel()[kept], kept // width
            order = np.lexsort((numbers, -scores, rows))
            first = np.searchsorted(rows, np.arange(num + 1))
            if (np.diff(first) < keep).any():
                raise IndexCorruptError(_NO_NUMBERS)
            best = order[first[:-1, None] + np.arange(keep)]
            return scores[best], numbers[best]
    scores, numbers = unpack(smallest(pack(joint, _children(nodes, branching)), keep))
    _check_numbers(scores, keep)
    return scores, numbers


def _check_numbers(scores, keep):
    """Refuses best scores (..., keep) with NaN, or fewer because `>=` dropped NaN."""
    if scores.shape[-1] < keep or np.isnan(scores).any():
        raise IndexCorruptError(_NO_NUMBERS)


def _children(nodes, branching):
    """Numbers of the children of nodes (N, f): (N, f B)."""
    return _per_row(nodes[:, :, None] * branching + np.arange(branching))


def _per_row(values):
    num, frontier, branching = values.shape
    return values.reshape(num, frontier * branching)


def _log_softmax(logits):
    """logits (..., B), overwritten by log p(child | node, x)."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def _node_input(x, tree):
    """The input of the nodes: x, after the residual layer if the tree has one."""
    if tree is None or tree.get("w_in") is None:
        return x
    return x + np.maximum(x @ tree["w_in"], 0) @ tree["w_out"]


def _child_logits(x, tree, level, nodes):
    """Logits of the children of `nodes` (N, f): (N, f, B)."""
    logits = _per_node if tree["kind"] == "per_node" else _per_level
    return logits(x, tree, level, nodes)


def _per_node(x, tree, level, nodes):
    """scale (x . vector + bias) of each child of `nodes` (N, f): (N, f, B)."""
    vectors = tree["nodes"][level]  # (B^level, B, D)
    num_nodes, branching, width = vectors.shape
    num, frontier = nodes.shape
    scale = np.float32(tree["scale"])
    biases = tree["biases"][level] if "biases" in tree else None  # (B^level, B)
    if frontier == num_nodes:  # nothing pruned yet: all nodes, in order, in one GEMM
        logits = x @ vectors.reshape(num_nodes * branching, width).T
        logits = logits.reshape(num, frontier, branching)
        logits = logits if biases is None else logits + biases
        return logits if scale == 1 else logits * scale
    logits = np.empty((num * frontier, branching), np.float32)
    for node, members in zip(*group_by(nodes.ravel()), strict=True):
        logits[members] = x[members // frontier] @ vectors[node].T
    logits = logits.reshape(num, frontier, branching)
    return (logits if biases is None else logits + biases[nodes]) * scale


def group_by(values):
    """Distinct values of a 1-D array, and the positions of each."""
    if not len(values):
        return values, []
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    cuts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    return ordered[np.concatenate([[0], cuts])], np.split(order, cuts)


def _per_level(x, tree, level, nodes):
    """F_h = x_h + relu(x_h u_h), logits F_h w_h, x_h = (one-hots of the path, x).

    A one-hot times a matrix is one of its rows, so x_h is never formed.
    """
    u, w = tree["u"][level], tree["w"][level]  # (E, E), (E, B)
    branching = w.shape[1]
    first = level * branching
    hidden = (x @ u[first:])[:, None, :]  # (N, 1, E)
    logits = (x @ w[first:])[:, None, :]  # (N, 1, B)
    for step in range(level):
        digit = nodes // branching ** (level - 1 - step) % branching  # (N, f)
        hidden = hidden + u[step * branching + digit]  # (N, f, E)
        logits = logits + w[step * branching + digit]  # (N, f, B)
    return logits + np.maximum(hidden, 0) @ w
