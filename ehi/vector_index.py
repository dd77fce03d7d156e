"""An index of given vectors: it maps them by their metric, then searches.

It needs NumPy only, as `ehi.index` does.
"""

from dataclasses import asdict, dataclass

import numpy as np

from ehi.data.vectors.metric import Metric
from ehi.index import Index, open_index, save_index
from ehi.index.check import check_queries
from ehi.index.text.encoder import apply_head

ENTRY = "vectors"  # of an index's encoder: the maps of its metric
OWN_HEAD = "query_head_of_its_own"  # whether documents have another head than queries


@dataclass(eq=False)
class VectorIndex(Index):
    """An `ehi.index.Index` whose queries and documents are vectors as they were given.

    Every method is that of `Index`; `maps` makes unit vectors of what it takes.

    Attributes:
      maps: of the metric.
    """

    maps: Metric

    def search(self, queries, k=10, **options):
        return super().search(self._queries(queries), k, **options)

    def tune(self, queries, recall=0.95, k=10, **options):
        return super().tune(self._queries(queries), recall, k, **options)

    def drift(self, queries=None, **options):
        queries = None if queries is None else self._queries(queries)
        return super().drift(queries, **options)

    def count_visited(self, queries, beam, min_prob=0.0):
        return super().count_visited(self._queries(queries), beam, min_prob)

    def add(self, embeddings, ids, **options):
        super().add(self._documents(embeddings), ids, **options)

    def update(self, embeddings, ids, **options):
        return super().update(self._documents(embeddings), ids, **options)

    def save(self, path) -> None:
        """Write the index folder; `ehi.load` opens it."""
        save_index(self, path)

    def _queries(self, queries) -> np.ndarray:
        return self._embedded(self.maps.queries(self._given(queries)))

    def _documents(self, documents) -> np.ndarray:
        if (self.encoder or {}).get(OWN_HEAD):
            raise ValueError(
                "queries have a head of their own and that of documents is not stored, "
                "so documents cannot be added: build the index again"
            )
        documents = self._given(documents)
        self.maps.check_documents(documents)
        return self._embedded(self.maps.documents(documents))

    def _given(self, vectors) -> np.ndarray:
        return check_queries(vectors, self.maps.given)

    def _embedded(self, x: np.ndarray) -> np.ndarray:
        return apply_head(self.query_head, x) if self.query_head else x


def load(path, *, mmap: bool = True) -> VectorIndex:
    """Open an index of `ehi.fit`, or of `experiments/configs/vectors.py`.

    Args:
      path: the folder.
      mmap: map the files into memory and read them as needed, else load them.

    Raises:
      FileNotFoundError: no index there.
      ValueError: it was not built of given vectors.
    """
    index = open_index(path, mmap=mmap)
    kept = (index.encoder or {}).get(ENTRY)
    if not isinstance(kept, dict):
        raise ValueError(
            f"the index in {path} was not built of given vectors: open it with "
            "ehi.index.open_index"
        )
    if kept["centre"] is not None:
        kept = kept | {"centre": np.array(kept["centre"], np.float32)}
    return VectorIndex(index.parameters, index.contents, Metric(**kept))


def described(maps: Metric) -> dict:
    """The entry of an index's encoder that `load` reads."""
    kept = asdict(maps)
    if maps.centre is not None:
        kept["centre"] = [float(value) for value in maps.centre]
    return {ENTRY: kept}
