"""The search index: a folder of plain NumPy arrays and the search over it.

    build_index -> Index -> save_index -> open_index -> Index.search -> Hits

Importing this package loads NumPy and threadpoolctl, and nothing else of `ehi`.
Shapes, beside the alphabet in `ehi/__init__.py`: n queries of one leaf, m copies of
documents in one leaf (a document spilled to s leaves has s copies), f frontier nodes.
"""

from ehi.index.build import build_index
from ehi.index.index import Hits, Index
from ehi.index.interop import FaissIndex, from_faiss, to_faiss
from ehi.index.lock import IndexLockedError
from ehi.index.route import assign_leaves, leaf_log_probs
from ehi.index.store import IndexCorruptError, open_index, save_index
from ehi.index.stream import Shard, build_folder

__all__ = [
    "FaissIndex",
    "Hits",
    "Index",
    "IndexCorruptError",
    "IndexLockedError",
    "Shard",
    "assign_leaves",
    "build_folder",
    "build_index",
    "from_faiss",
    "leaf_log_probs",
    "open_index",
    "save_index",
    "to_faiss",
]
