"""Search results as JSON values and as text, with the leaves that a query visited.

An index stores a JSON object for each document that it can show; 'title' and 'line'
(the first line) are used here.
"""

import json
import re
from typing import Any

import numpy as np

from ehi.index import Hits, Index

MOST_CHARACTERS = 200  # longest title or line that is shown
# A terminal obeys these characters instead of showing them; a tab does no harm.
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def describe_hits(index: Index, hits: Hits, query_number: int = 0) -> dict[str, Any]:
    """Describe the results of one query as JSON values.

    Args:
        index: the one that was searched.
        hits: of N queries.
        query_number: row of the query in `hits`.

    Returns:
        'documents_visited', 'documents', 'leaves' (paths of the visited leaves, best
        first), 'num_leaves' and 'hits'. A hit has its rank, score, id, title, line, the
        path of the leaf that holds it, and its metadata if the index has them. A path
        lists the child numbers from the root; it is '' in a flat index.
    """
    leaves = hits.leaves[query_number]
    found = []
    for rank, row in enumerate(hits.rows[query_number].tolist(), start=1):
        if row < 0:
            break
        title, line = _shown(index.document(row)) if index.has_documents else ("", "")
        doc_id = hits.ids[query_number][rank - 1]
        found.append(
            {
                "rank": rank,
                "score": round(float(hits.scores[query_number][rank - 1]), 6),
                "id": str(doc_id),
                "title": title or str(doc_id),
                "line": line,
                "leaf": _path(index, leaf_of(index, row, leaves)),
            }
        )
        if index.fields is not None:
            found[-1]["metadata"] = index.metadata(row)
    return {
        "documents_visited": int(hits.visited[query_number]),
        "documents": index.num_documents,
        "leaves": [_path(index, leaf) for leaf in leaves.tolist() if leaf >= 0],
        "num_leaves": index.num_leaves,
        "hits": found,
    }


def format_hits(query: str, described: dict[str, Any], *, show_leaves: int = 4) -> str:
    """Format the result of `describe_hits` as lines of text.

    Control characters are shown as escape sequences of Python.
    """
    visited, documents = described["documents_visited"], described["documents"]
    leaves = described["leaves"]
    head = f'"{_printable(query)}"\n    visited {visited:,} of {documents:,} documents'
    if documents:
        head += f" ({100 * visited / documents:.1f}%)"
    if described["num_leaves"] > 1:
        more = ", ..." if len(leaves) > show_leaves else ""
        head += f" in {len(leaves)} of {described['num_leaves']} leaves: "
        head += ", ".join(leaves[:show_leaves]) + more
    lines = [head]
    titles = [_printable(hit["title"]) for hit in described["hits"]]
    width = max(map(len, titles), default=0)
    for hit, title in zip(described["hits"], titles, strict=True):
        leaf = f"  leaf {hit['leaf']}" if hit["leaf"] else ""
        title = title if not leaf else f"{title:{min(width, 60)}}"
        lines.append(f"{hit['rank']:3}  {hit['score']:.4f}  {title}{leaf}")
        # The first line may only repeat the title.
        if hit["line"] and hit["line"] != hit["title"]:
            lines.append(f"             {_printable(hit['line'])}")
    return "\n".join(lines)


def _shown(document: Any) -> tuple[str, str]:
    """Return title and line of a stored document, which may be any JSON value.

    Of a text, the line is the first one that is not blank, as `experiments` stores it.
    """
    if isinstance(document, dict):
        title, line = document.get("title"), document.get("line")
    else:
        title, line = None, document
    return _as_line(title), _as_line(line)


def _as_line(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    first = text.strip().split("\n", 1)[0].rstrip("\r")
    return first[:MOST_CHARACTERS]


def _printable(text: str) -> str:
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def leaf_of(index: Index, row: int, leaves: np.ndarray) -> int:
    """The best visited leaf that holds a document; several may hold copies of it."""
    for leaf in leaves[leaves >= 0].tolist():
        rows = index.contents.rows_in_leaf(leaf)  # sorted
        place = np.searchsorted(rows, row)
        if place < len(rows) and rows[place] == row:
            return leaf
    raise ValueError(f"document row {row} is in none of the leaves {leaves.tolist()}")


def _path(index: Index, leaf: int) -> str:
    return "/".join(map(str, index.leaf_path(leaf)))
