"""A slow search of one query at a time, sharing no code with `ehi.index`.

It works on what `build_index` is given, in float64, with Python loops, explicit
one-hots and explicit reconstructions.
"""

import itertools

import numpy as np


def make_tree(kind, height, branching, width, rng, hidden=0):
    """A random tree dict, as `build_index` takes it."""

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    if kind == "per_node":
        tree = {
            "kind": kind,
            "nodes": [normal(branching**h, branching, width) for h in range(height)],
            "scale": 1.5,
        }
        if hidden:
            tree |= {"w_in": normal(width, hidden), "w_out": normal(hidden, width)}
        return tree
    wide = [h * branching + width for h in range(height)]
    return {
        "kind": kind,
        "u": [normal(e, e) / e for e in wide],
        "w": [normal(e, branching) for e in wide],
    }


def make_rotation(width, rng):
    return np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)


def child_log_probs(x, tree, path):
    """log p(child | path, x), one number for each child."""
    x = np.asarray(x, np.float64)
    if tree["kind"] == "per_node":
        if "w_in" in tree:
            x = x + np.maximum(x @ tree["w_in"], 0) @ tree["w_out"]
        branching = tree["nodes"][0].shape[1]
        node = 0
        for child in path:
            node = node * branching + child
        logits = tree["scale"] * (tree["nodes"][len(path)][node] @ x)
    else:
        branching = tree["w"][0].shape[1]
        one_hots = [np.eye(branching)[child] for child in path]
        x = np.concatenate([*one_hots, x])
        logits = (x + np.maximum(x @ tree["u"][len(path)], 0)) @ tree["w"][len(path)]
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def shape_of(tree):
    if tree is None:
        return 0, 1
    levels = tree["nodes"] if tree["kind"] == "per_node" else tree["w"]
    return len(levels), levels[0].shape[-1 if tree["kind"] == "per_level" else 1]


def leaf_log_probs(x, tree):
    """log p(leaf | x) of every leaf in order."""
    height, branching = shape_of(tree)
    return np.array(
        [
            sum(child_log_probs(x, tree, path[:h])[path[h]] for h in range(height))
            for path in itertools.product(range(branching), repeat=height)
        ]
    )


def beam_search(x, tree, beam):
    """(leaves best first, nodes scored)."""
    height, branching = shape_of(tree)
    frontier, scored = [(0.0, ())], 0
    for _ in range(height):
        children = []
        for log_prob, path in frontier:
            step = child_log_probs(x, tree, path)
            scored += branching
            children += [(log_prob + step[c], (*path, c)) for c in range(branching)]
        children.sort(key=lambda child: (-child[0], child[1]))
        frontier = children[:beam]
    leaves = [
        sum(c * branching ** (height - 1 - h) for h, c in enumerate(path))
        for _, path in frontier
    ]
    return leaves, scored


def reconstruct(x, leaf, rotation=None, codebooks=None, leaf_centroids=None):
    """The vector that the index reconstructs of a document in a leaf."""
    if codebooks is None:
        return x
    width = len(x)
    centroid = np.zeros(width) if leaf_centroids is None else leaf_centroids[leaf]
    rotation = np.eye(width) if rotation is None else rotation
    z = (x - centroid) @ rotation
    parts = []
    for m, codewords in enumerate(codebooks):
        part = z[m * codewords.shape[1] : (m + 1) * codewords.shape[1]]
        distances = ((codewords - part) ** 2).sum(axis=1)
        parts.append(codewords[distances.argmin()])
    return centroid + np.concatenate(parts) @ rotation.T


class SlowIndex:
    """Leaves of (row, reconstruction), searched by sorting."""

    def __init__(self, embeddings, tree, query_tree=None, spill=1, **quantiser):
        self.query_tree = tree if query_tree is None else query_tree
        self.leaves = {}
        for row, x in enumerate(embeddings):
            best = np.argsort(-leaf_log_probs(x, tree), kind="stable")[:spill]
            for leaf in best.tolist():
                known = reconstruct(x, leaf, **quantiser)
                self.leaves.setdefault(leaf, []).append((row, known))

    def search(self, query, beam):
        """(score of each visited row, copies visited, nodes scored, leaves)."""
        leaves, scored = beam_search(query, self.query_tree, beam)
        copies = [copy for leaf in leaves for copy in self.leaves.get(leaf, [])]
        scores = {}
        for row, known in copies:
            score = float(query.astype(np.float64) @ known)
            scores[row] = max(score, scores.get(row, -np.inf))
        return scores, len(copies), scored, leaves


def assert_same_results(rows, scores, expected, k):
    """One query's results are the k best of `expected` {row: score}, to 1e-5."""
    best = sorted(expected.values(), reverse=True)[:k]
    found = [row for row in rows.tolist() if row >= 0]
    assert len(found) == len(set(found)) == len(best)
    np.testing.assert_allclose(scores[: len(best)], best, rtol=0, atol=1e-5)
    np.testing.assert_allclose([expected[row] for row in found], best, atol=1e-5)
    assert (rows[len(best) :] == -1).all()
    assert np.isneginf(scores[len(best) :]).all()
