"""The search index: a folder of plain NumPy arrays and the search over it.

    build_index -> Index -> save_index -> open_index -> Index.search -> Hits

The files, step by step:

    hold     parameters, contents, columns; check refuses what does not fit
    build    build; stream/ from shards larger than memory
    keep     store, folder, commit
    search   search/; where filters by metadata
    change   updates; drift says how far
    texts    text/: tokens, transformer and head, without JAX
    tune     tune
    ask      index joins them all
    beyond   sharded over Ray, faiss_from and faiss_to

Importing this package loads NumPy and threadpoolctl, and nothing else of `ehi` but
`ehi.files`. Shapes, beside the alphabet in `ehi/__init__.py`: n queries of one leaf,
m copies of documents in one leaf (a document spilled to s leaves has s copies),
f frontier nodes.
"""

from ehi.index.check import IndexCorruptError, IndexLockedError
from ehi.index.drift import Drift
from ehi.index.faiss_from import from_faiss
from ehi.index.faiss_to import FaissIndex, to_faiss
from ehi.index.index import Index, build_index, open_index, save_index
from ehi.index.search.routing import assign_leaves, leaf_log_probs
from ehi.index.search.search import Hits
from ehi.index.stream import Shard, build_folder
from ehi.index.tune import Tuned

__all__ = [
    "Drift",
    "FaissIndex",
    "Hits",
    "Index",
    "IndexCorruptError",
    "IndexLockedError",
    "Shard",
    "Tuned",
    "assign_leaves",
    "build_folder",
    "build_index",
    "from_faiss",
    "leaf_log_probs",
    "open_index",
    "save_index",
    "to_faiss",
]
