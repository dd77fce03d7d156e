"""Work of a query and bytes of a document, counted part by part.

Both are counted alike for our indexes and for those of libraries. What all rows of a
table share is left out: the tower, the head, ids, and documents to show.
"""

import numpy as np

from ehi.eval.baselines.base import Baseline, BaselineHits
from ehi.index import Hits, Index
from ehi.index.parameters import tree_shape

# Arrays of a segment that say which document a copy is. A leaf number counts instead.
_IDS = {"leaf_offsets", "leaf_rows", "ids", "id_offsets", "id_text"}
LARGE = 10**6  # documents of the second count of bytes


def work(index: Index | Baseline, hits: Hits | BaselineHits, rerank: int = 0):
    """Products of a query with vectors of width D, as a share of the corpus: (N,).

      work = (documents scored + multiply-adds before and in the leaves / D) / documents

    A document counts as one, whatever its code, and once more if it is scored again.

    Args:
        index: the index that was searched.
        hits: of N queries.
        rerank: documents of each query that were scored again.

    Example:
        >>> import numpy as np
        >>> from ehi.index import build_index
        >>> index = build_index(np.eye(4), range(4), tree=None)
        >>> work(index, index.search(np.eye(4)[:2])).tolist()
        [1.0, 1.0]
    """
    scored = hits.visited + np.minimum(rerank, hits.visited)
    before = multiply_adds(index, hits) / index.width
    return (scored + before) / index.num_documents


def multiply_adds(index: Index | Baseline, hits: Hits | BaselineHits) -> np.ndarray:
    """Multiply-adds of each query before documents are scored: (N,) float64.

    These are the router with all its layers, for the nodes that were scored; the
    rotation; the look-up table; and for codes of residuals, the centroids of the
    visited leaves, which under the score l2 have a table each. Additions of biases and
    softmaxes are left out.

    Args:
        index: the index that was searched.
        hits: of N queries.
    """
    nodes = hits.nodes_scored.astype(np.float64)
    if isinstance(index, Baseline):
        return index.width * nodes + index.query_multiply_adds
    parameters = index.parameters
    total = _of_router(parameters.routing_tree, index.width, nodes)
    if parameters.rotation is not None:
        total += parameters.rotation.size  # D^2
    tables = 1
    if parameters.leaf_centroids is not None:
        leaves = (hits.leaves >= 0).sum(axis=1)
        total += index.width * leaves
        if parameters.score == "l2":  # |x^|^2 has a term of the centroid and codeword
            tables = leaves
    if parameters.codebooks is not None:
        total += parameters.codebooks.size * tables  # M K S = K D
    return total


def _of_router(tree: dict | None, width: int, nodes: np.ndarray) -> np.ndarray:
    """Multiply-adds of a tree of which `nodes` (N,) nodes are scored."""
    if tree is None:
        return np.zeros(len(nodes))
    if tree["kind"] == "per_node":
        hidden = [tree[name].size for name in ("w_in", "w_out") if name in tree]
        return sum(hidden) + width * nodes
    # x times u and w once for each level; for each node above the scored ones relu(.) w
    # of E x B. The levels below the first count with the last E, the widest.
    branching = tree_shape(tree)[1]
    once = sum(width * (u.shape[1] + w.shape[1]) for u, w in _levels(tree))
    first, last = len(tree["w"][0]), len(tree["w"][-1])
    return once + first * branching + last * (nodes - branching)


def _levels(tree):
    return zip(tree["u"], tree["w"], strict=True)


def total_bytes_per_doc(index: Index | Baseline, documents: int | None = None) -> float:
    """Bytes per document of all that a search reads, but ids and documents to show.

    These are codes or vectors with their factors, a leaf number in whole bytes for
    each copy, codebooks, rotation, centroids and routers. The query head is left out.

    Args:
        index: the index.
        documents: count that shares what does not grow with the corpus; None: its own.
    """
    number = _bytes_of_a_number(index.num_leaves)
    if isinstance(index, Baseline):
        number = _bytes_of_a_number(index.num_centroids)
        grows = index.bytes_per_doc + number
        return float(grows + index.fixed_bytes / (documents or index.num_documents))
    if not index.num_documents:
        return 0.0
    grows = sum(
        number * segment.num_copies
        + sum(a.nbytes for name, a in segment.arrays().items() if name not in _IDS)
        for segment in index.segments
    )
    fixed = sum(
        array.nbytes
        for name, array in index.parameter_arrays().items()
        if not name.startswith("query_head.")
    )
    own = index.num_documents
    return float(grows / own + fixed / (documents or own))


def _bytes_of_a_number(leaves: int) -> int:
    """Whole bytes that tell so many leaves apart: 1 up to 256; 0 for one leaf."""
    return -(-(max(leaves, 1) - 1).bit_length() // 8)
