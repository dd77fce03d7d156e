"""A tree as the index stores it, and the scores of its nodes.

A tree is a dict of arrays, made by `ehi.model.tree` and read by nobody's framework:

    {'kind': 'per_node', 'nodes': [(1, B, D), (B, B, D), ...], 'scale': float,
     'biases': [(1, B), (B, B), ...],                    absent: zeros
     'w_in': (D, hidden), 'w_out': (hidden, D)}          w_in and w_out may be absent
    {'kind': 'per_level', 'u': [(E, E), ...], 'w': [(E, B), ...]}, E = (h - 1) B + D

None is the flat index of one leaf.
"""

import numpy as np


def tree_shape(tree):
    """(height, branching) of a tree; (0, 1) for None."""
    if tree is None:
        return 0, 1
    if tree["kind"] == "per_node":
        return len(tree["nodes"]), tree["nodes"][0].shape[1]
    return len(tree["w"]), tree["w"][0].shape[1]


def group_by(values):
    """Distinct values of a 1-D array, and for each the positions where it stands."""
    if not len(values):
        return values, []
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    cuts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    return ordered[np.concatenate([[0], cuts])], np.split(order, cuts)


def node_input(x, tree):
    """What the nodes see: x, behind the residual layer where the tree has one."""
    if tree is None or tree.get("w_in") is None:
        return x
    return x + np.maximum(x @ tree["w_in"], 0) @ tree["w_out"]


def child_logits(x, tree, level, nodes):
    """Logits of the children of `nodes` (N, f): (N, f, B)."""
    scores = _per_node if tree["kind"] == "per_node" else _per_level
    return scores(x, tree, level, nodes)


def log_softmax(logits):
    """logits (..., B), overwritten by log p(child | node, x)."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
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
        logits = logits if biases is None else logits + biases
        return logits if scale == 1 else logits * scale
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
