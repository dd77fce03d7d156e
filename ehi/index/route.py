"""Beam search over the tree: queries to leaves, documents to their top leaves.

A tree is a dict of arrays, made by `ehi.model.tree` and read by nobody's framework:

    {'kind': 'per_node', 'nodes': [(1, B, D), (B, B, D), ...], 'scale': float,
     'biases': [(1, B), (B, B), ...],                    absent: zeros
     'w_in': (D, hidden), 'w_out': (hidden, D)}          w_in and w_out may be absent
    {'kind': 'per_level', 'u': [(E, E), ...], 'w': [(E, B), ...]}, E = (h - 1) B + D

A leaf is the mixed-radix number of its path, level 1 most significant; None is the
flat index of one leaf. Softmax routing as in EHI (arXiv:2310.08891, section 3.2).
"""

from typing import NamedTuple

import numpy as np

from ehi.index.topk import pack, smallest, unpack


class Routes(NamedTuple):
    """Where queries go: the b best leaves found, best first.

    Attributes:
        leaves: (N, b) int64 leaf numbers.
        log_probs: (N, b) float32 log p(leaf | query).
        nodes_scored: (N,) int64 tree nodes whose score was computed.
    """

    leaves: np.ndarray
    log_probs: np.ndarray
    nodes_scored: np.ndarray


def tree_shape(tree):
    """(height, branching) of a tree; (0, 1) for None."""
    if tree is None:
        return 0, 1
    if tree["kind"] == "per_node":
        return len(tree["nodes"]), tree["nodes"][0].shape[1]
    return len(tree["w"]), tree["w"][0].shape[1]


def route(x, tree, beam):
    """Beam search: a level keeps its min(beam, nodes of the level) best nodes.

    Args:
        x: (N, D) float32.
        tree: see the module's docstring.
        beam: nodes kept at each level, b; equal scores go to the smaller node.

    Returns:
        Routes with b = min(beam, P).
    """
    height, branching = tree_shape(tree)
    num = len(x)
    hidden = _node_input(x, tree)
    nodes = np.zeros((num, 1), np.int64)
    log_probs = np.zeros((num, 1), np.float32)
    scored = 0
    for level in range(height):
        conditional = _child_log_probs(hidden, tree, level, nodes)  # (N, f, B)
        scored += nodes.shape[1] * branching
        grown = (num, nodes.shape[1] * branching)
        joint = (log_probs[:, :, None] + conditional).reshape(grown)
        children = nodes[:, :, None] * branching + np.arange(branching)
        children = children.reshape(grown)  # (N, f B)
        keep = min(beam, branching ** (level + 1))
        if keep < joint.shape[1] or level == height - 1:
            log_probs, nodes = unpack(smallest(pack(joint, children), keep))
        else:
            log_probs, nodes = joint, children
    return Routes(nodes, log_probs, np.full(num, scored, np.int64))


def leaf_log_probs(x, tree):
    """log p(leaf | x), the sum of the levels' log softmaxes, of every leaf: (N, P).

    Args:
        x: (N, D) float32.
    """
    height, branching = tree_shape(tree)
    hidden = _node_input(x, tree)
    log_probs = np.zeros((len(x), 1), np.float32)
    for level in range(height):
        nodes = np.broadcast_to(np.arange(branching**level), log_probs.shape)
        joint = log_probs[:, :, None] + _child_log_probs(hidden, tree, level, nodes)
        log_probs = joint.reshape(len(x), branching ** (level + 1))
    return log_probs


def assign_leaves(x, tree, spill=1):
    """The exact top leaves of documents, best first, in chunks of documents.

    Args:
        x: (N, D) float32.
        spill: leaves a document is stored in, s.

    Returns:
        (N, s) int64; equal probabilities go to the smaller leaf.
    """
    height, branching = tree_shape(tree)
    num_leaves = branching**height
    rows = rows_at_once(tree, num_leaves)
    leaves = np.zeros((len(x), spill), np.int64)
    for start in range(0, len(x) if height else 0, rows):
        log_probs = leaf_log_probs(x[start : start + rows], tree)
        keys = smallest(pack(log_probs, np.arange(num_leaves)), spill)
        leaves[start : start + rows] = unpack(keys)[1]
    return leaves


def rows_at_once(tree, beam, entries=2**23, most=4096):
    """How many rows can be routed together in temporaries of about `entries`."""
    height, branching = tree_shape(tree)
    if not height:
        return most
    frontier = min(beam, branching ** (height - 1))
    width = branching
    if tree["kind"] == "per_level":
        width = max(branching, len(tree["w"][-1]))
    return max(1, min(most, entries // (frontier * width)))


def group_by(values):
    """Distinct values of a 1-D array, and for each the positions where it stands."""
    if not len(values):
        return values, []
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    cuts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    return ordered[np.concatenate([[0], cuts])], np.split(order, cuts)


def _node_input(x, tree):
    """What the nodes see: x, behind the residual layer where the tree has one."""
    if tree is None or tree.get("w_in") is None:
        return x
    return x + np.maximum(x @ tree["w_in"], 0) @ tree["w_out"]


def _child_log_probs(x, tree, level, nodes):
    """log p(child | node, x) of the children of `nodes` (N, f): (N, f, B)."""
    scores = _per_node if tree["kind"] == "per_node" else _per_level
    logits = scores(x, tree, level, nodes)
    logits -= logits.max(axis=2, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=2, keepdims=True))
    return logits


def _per_node(x, tree, level, nodes):
    vectors = tree["nodes"][level]  # (B^level, B, D)
    num_nodes, branching, width = vectors.shape
    num, frontier = nodes.shape
    scale = np.float32(tree["scale"])
    biases = tree["biases"][level] if "biases" in tree else None  # (B^level, B)
    if frontier == num_nodes:  # nothing pruned yet: all nodes, in order, in one GEMM
        logits = x @ vectors.reshape(num_nodes * branching, width).T
        logits = logits.reshape(num, frontier, branching)
        return (logits if biases is None else logits + biases) * scale
    logits = np.empty((num * frontier, branching), np.float32)
    for node, members in zip(*group_by(nodes.ravel()), strict=True):
        logits[members] = x[members // frontier] @ vectors[node].T
    logits = logits.reshape(num, frontier, branching)
    return (logits if biases is None else logits + biases[nodes]) * scale


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
