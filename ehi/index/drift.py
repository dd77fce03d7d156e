"""How far an index has moved since it was built.

Contents keep a history for that, a dict of

    documents, distortion        those of the build; |x - x^|^2, mean over copies
    added, added_distortion      the same of all documents that were added since
    leaf_sizes                   (P,) of the build, once its segment was merged

where a distortion is None for vectors, or if it is not known.
"""

from dataclasses import dataclass, replace

import numpy as np

from ehi.index.build import mean_square
from ehi.index.search.search import as_queries, chosen_setting, routed


@dataclass(frozen=True)
class Drift:
    """How far an index has moved since it was built. `print` explains it.

    Shares are of the documents at that time; None where something is not known.

    Attributes:
        documents_built, documents_now: their numbers.
        documents_added: all that were added since, also if they are deleted by now.
        visited_built, visited_now: mean share of the documents that the given queries
            visit: in the leaves as they were built, and as they are.
        visited_tuned: the share that the queries of `Index.tune` visited then.
        distortion_built, distortion_added: mean |x - x^|^2 of a document x and its code
            x^, of the documents of the build and of those added since. None for
            vectors.
        imbalance_built, imbalance_now: standard deviation of the leaf sizes over their
            mean; 0 is balanced.

    Example:
        >>> print(Drift(1000, 1100, 150, 0.1, 0.12, None, 0.2, 0.31, 0.4, 0.52))
        documents: 1,000 built, 1,100 now, 150 added since
        visited: 10% built, 12% now
        distortion of codes: 0.2 built, 0.31 added
        imbalance of leaves: 0.4 built, 0.52 now
    """

    documents_built: int
    documents_now: int
    documents_added: int
    visited_built: float | None
    visited_now: float | None
    visited_tuned: float | None
    distortion_built: float | None
    distortion_added: float | None
    imbalance_built: float
    imbalance_now: float

    def __str__(self):
        lines = [
            f"documents: {self.documents_built:,} built, {self.documents_now:,} now, "
            f"{self.documents_added:,} added since"
        ]
        if self.visited_now is not None:
            line = (
                f"visited: {100 * self.visited_built:.3g}% built, "
                f"{100 * self.visited_now:.3g}% now"
            )
            if self.visited_tuned is not None:
                line += f", {100 * self.visited_tuned:.3g}% of other queries when tuned"
            lines.append(line)
        known = self.distortion_built, self.distortion_added
        if known != (None, None):
            built, added = ("unknown" if x is None else f"{x:.3g}" for x in known)
            if not self.documents_added:
                added = "nothing"
            lines.append(f"distortion of codes: {built} built, {added} added")
        lines.append(
            f"imbalance of leaves: {self.imbalance_built:.3g} built, "
            f"{self.imbalance_now:.3g} now"
        )
        return "\n".join(lines)


def drift(index, queries=None, *, beam=None, min_prob=None):
    """Says how far documents and leaves have moved since the index was built: Drift.

    Queries that visit a larger share than they did search slower; added documents of
    higher distortion have codes that do not suit them. Both, and growing imbalance,
    call for training the index anew.

    A folder that was written before this was kept, or by `from_faiss`, does not know
    its build: its first segment stands for it, and distortions are None.

    Args:
        queries: (N, D) floats, or N texts if the index names its text encoder; None
            leaves visited shares out. They are routed, and nothing is scored.
        beam, min_prob: as of `Index.search`; by default the stored setting.

    Returns:
        Drift.

    Raises:
        ValueError: queries, beam or min_prob do not fit, as in `Index.search`; an empty
            list of queries.

    Example:
        >>> import numpy as np
        >>> from ehi.index import build_index
        >>> tree = {"kind": "per_node", "nodes": [np.eye(2)[None]], "scale": 1.0}
        >>> index = build_index(np.eye(2), range(2), tree=tree)
        >>> index.add(np.eye(2)[[0, 0]], [2, 3])
        >>> drift = index.drift(np.eye(2)[:1], beam=1)
        >>> drift.visited_built, drift.visited_now, drift.imbalance_now
        (0.5, 0.75, 0.5)
    """
    parameters, contents = index.parameters, index.contents
    history = _history_of(contents)
    then, now = _sizes_built(contents), contents.leaf_sizes
    visited = None, None
    if queries is not None:
        queries = as_queries(index, queries)
        setting = chosen_setting(parameters, contents, 1, beam, min_prob, 0)
        counts = np.zeros(2)
        for _, routes in routed(
            parameters, queries, setting["beam"], setting["min_prob"]
        ):
            leaves = routes.leaves[routes.leaves >= 0]
            counts += then[leaves].sum(), now[leaves].sum()
        numbers = history["documents"], contents.num_documents
        shares = counts / np.maximum(numbers, 1) / len(queries)
        visited = shares.tolist()
    return Drift(
        documents_built=history["documents"], documents_now=contents.num_documents,
        documents_added=history["added"],
        visited_built=visited[0], visited_now=visited[1],
        visited_tuned=(contents.setting or {}).get("visited"),
        distortion_built=history["distortion"],
        distortion_added=history["added_distortion"],
        imbalance_built=imbalance(then), imbalance_now=imbalance(now),
    )  # fmt: skip


def imbalance(sizes):
    """Standard deviation of leaf sizes (P,) over their mean; 0 is balanced."""
    return float(sizes.std() / sizes.mean()) if sizes.any() else 0.0


def _history_of(contents):
    """The history; if there is none, what the first segment says of it."""
    if contents.history is not None:
        return contents.history
    first, *others = map(len, contents.segments)
    return {"documents": first, "distortion": None, "added": sum(others),
            "added_distortion": None}  # fmt: skip


def _sizes_built(contents):
    """Copies in each leaf when the index was built: (P,) int64."""
    sizes = _history_of(contents).get("leaf_sizes")
    return contents.segments[0].leaf_sizes() if sizes is None else sizes


def remembering(contents):
    """Contents whose history has what a merge of their segments would lose."""
    if len(contents.segments) == 1 and contents.deleted is None:
        return contents
    sizes = _sizes_built(contents)
    history = {**_history_of(contents), "leaf_sizes": sizes}
    return replace(contents, history=history)


def grown(contents, segment, squares):
    """Contents with another segment, of documents with these squares."""
    old, num = _history_of(contents), len(segment)
    total, distortion = old["added"] + num, mean_square(squares)
    if old["added_distortion"] is not None:
        share = num / total
        distortion = share * distortion + (1 - share) * old["added_distortion"]
    history = {**old, "added": total, "added_distortion": distortion}
    return replace(contents.with_segment(segment), history=history)
