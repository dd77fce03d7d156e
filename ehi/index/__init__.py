"""The search index: a folder of plain NumPy arrays and the search over it.

    build_index -> Index -> save_index -> open_index -> Index.search -> Hits

The files, step by step:

    build    build, route, leaves; stream/ from shards larger than memory
    hold     index, segment, documents, hits
    keep     store, layout, fit, folder, commit, atomic, lock
    search   search, job, route, nodes, by_leaf, by_query, score, topk, threads
    change   updates, merge
    words    text/: tokens, transformer and head, without JAX
    Faiss    interop, interop_to, interop_search

Importing this package loads NumPy and threadpoolctl, and nothing else of `ehi`.
Shapes, beside the alphabet in `ehi/__init__.py`: n queries of one leaf, m copies of
documents in one leaf (a document spilled to s leaves has s copies), f frontier nodes.
"""

from ehi.index.build import build_index
from ehi.index.faiss_from import FaissIndex, from_faiss, to_faiss
from ehi.index.folder import IndexLockedError
from ehi.index.index import Index
from ehi.index.search.routing import assign_leaves, leaf_log_probs
from ehi.index.search.search import Hits
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
