"""Hard negatives of random embeddings, mined by one process or by several together.

Embeddings that several processes compute differ in the last bits. Of the same
embeddings they must mine the same negatives.
"""

import numpy as np

from ehi.index import Index, build_index
from ehi.train.negatives import mine_from_leaves, mine_from_teacher


def mine_random(data) -> dict[str, np.ndarray]:
    """Negatives of random embeddings, and how many queries this process searched."""
    rng, searched, search = np.random.default_rng(1), [], Index.search

    def counting(index, queries, *args, **options):
        searched.append(len(queries))
        return search(index, queries, *args, **options)

    Index.search = counting
    queries = rng.normal(size=(data.num_queries, 16)).astype(np.float32)
    documents = rng.normal(size=(data.num_documents, 16)).astype(np.float32)
    tree = {"kind": "per_node", "nodes": [documents[None, :4]], "scale": 1.0}
    index = build_index(documents, np.arange(len(documents)), tree=tree)
    found = {"leaves": mine_from_leaves(index, queries, data, per_query=4, beam=2)}
    for name, rows in (("odd", np.arange(0, data.num_queries, 3)), ("one", [5])):
        found[name] = mine_from_teacher(
            documents, queries, data, per_query=5, rows=np.array(rows)
        )
    # More than there are documents, of which some are known positives.
    found["most"] = mine_from_leaves(index, queries[:3], data, per_query=70, beam=4)
    return found | {"searched": np.array(searched)}
