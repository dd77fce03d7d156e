"""The index: named plain arrays, and the questions one can ask them."""

import functools
from dataclasses import dataclass

import numpy as np

from ehi.index import search
from ehi.index.documents import Documents, StringIds
from ehi.index.folder import Folder, IndexCorruptError
from ehi.index.route import tree_shape
from ehi.index.score import byte_codebooks

PLAIN_ARRAYS = (
    "leaf_offsets",
    "leaf_rows",
    "vectors",
    "codes",
    "codebooks",
    "assign_codebooks",
    "rotation",
    "leaf_centroids",
    "rerank_vectors",
)


@dataclass(frozen=True, eq=False)
class Hits:
    """Results of N queries.

    Attributes:
        ids: (N, k) external ids, best first: int64 padded with -1, or objects, str
            padded with None.
        scores: (N, k) float32, padded with -inf.
        visited: (N,) int64 copies of documents in the visited leaves; spilled
            duplicates count.
        nodes_scored: (N,) int64 tree nodes whose score was computed.
        leaves: (N, b) int64 leaves visited, best first.
        rows: (N, k) int64 document numbers, in the order of the build, padded with -1.
    """

    ids: np.ndarray
    scores: np.ndarray
    visited: np.ndarray
    nodes_scored: np.ndarray
    leaves: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Index:
    """A searchable corpus of `num_documents` documents in P leaves.

    Copies of documents stand leaf-major, and within a leaf by document row: those of
    leaf p are leaf_offsets[p] .. leaf_offsets[p + 1]. There are C >= N copies, more
    than N where documents are spilled to several leaves. Made by `build_index` or
    `open_index`; arrays may be memory-mapped, none may be written to.

    Attributes:
        width: embedding width D.
        spill: leaves a document is stored in, s.
        leaf_offsets: (P + 1,) int64.
        leaf_rows: (C,) uint32 document rows.
        ids: external ids by row, (N,) int64 or StringIds.
        tree, query_tree: dicts as in `ehi.index.route`; tree is None in a flat index,
            query_tree where queries route as documents do.
        vectors: (C, D) float32 or float16 in raw leaves, else None.
        codes: (C, M) uint8 in PQ leaves, (C, M / 2) where K = 16, else None.
        codebooks: (M, K, S) float32.
        assign_codebooks: (M, K, S) float32 that chose the codes, where these are others
            than `codebooks` (JPQ), or None.
        rotation: (D, D) float32, applied as q @ rotation, or None.
        leaf_centroids: (P, D) float32 where codes are of residuals, or None.
        rerank_vectors: (N, D) float16 by row, or None.
        encoder, config: JSON identity of what made the embeddings and the index.
        query_head: arrays of the query head, for encoders outside this package.
        documents: what to show of each document, or None.
        folder: where it was opened from, or None.
    """

    width: int
    spill: int
    leaf_offsets: np.ndarray
    leaf_rows: np.ndarray
    ids: np.ndarray | StringIds
    tree: dict | None = None
    query_tree: dict | None = None
    vectors: np.ndarray | None = None
    codes: np.ndarray | None = None
    codebooks: np.ndarray | None = None
    assign_codebooks: np.ndarray | None = None
    rotation: np.ndarray | None = None
    leaf_centroids: np.ndarray | None = None
    rerank_vectors: np.ndarray | None = None
    encoder: dict | None = None
    config: dict | None = None
    query_head: dict | None = None
    documents: Documents | None = None
    folder: Folder | None = None

    def search(self, queries, k=10, *, beam=1, rerank=0, threads=1):
        """The k best documents by score in the `beam` best leaves of each query.

        Args:
            queries: (N, D) floats.
            k: results of a query; equal scores go to the smaller row.
            beam: leaves visited, 1 .. P.
            rerank: 0, or how many of the best by quantised score are scored again
                with the stored float16 vectors.
            threads: Python threads over disjoint leaves, for batches.

        Returns:
            Hits.

        Raises:
            ValueError: queries of another width or dtype or not finite; k, beam,
                rerank or threads out of range; rerank without stored vectors.
        """
        found = search.search(
            self, queries, k, beam=beam, rerank=rerank, threads=threads
        )
        return Hits(ids=self.external_ids(found.rows), **found._asdict())

    def count_visited(self, queries, beam):
        """Copies of documents each query would visit, by routing only: (N,) int64."""
        return search.count_visited(self, queries, beam)

    def external_ids(self, rows):
        """External ids of document rows, of any shape; row -1 gives -1 or None."""
        if isinstance(self.ids, StringIds):
            return self.ids.take(rows)
        return np.where(rows < 0, -1, self.ids[np.maximum(rows, 0)])

    def document(self, row):
        """What was stored to show of a document: a dict.

        Raises:
            ValueError: the index was saved without documents.
        """
        if self.documents is None:
            raise ValueError("this index was saved without documents to show")
        return self.documents[row]

    def leaf_path(self, leaf):
        """The child numbers from the root to a leaf: a tuple of H ints."""
        if not 0 <= leaf < self.num_leaves:
            raise ValueError(f"leaf {leaf} is outside the {self.num_leaves} leaves")
        height, branching = tree_shape(self.tree)
        return tuple(
            int(leaf) // branching ** (height - level) % branching
            for level in range(1, height + 1)
        )

    @property
    def num_documents(self):
        return len(self.ids)

    @property
    def num_leaves(self):
        return len(self.leaf_offsets) - 1

    @property
    def routing_tree(self):
        """The tree that queries descend."""
        return self.tree if self.query_tree is None else self.query_tree

    @functools.cached_property
    def leaf_sizes(self):
        """Copies of documents in each leaf: (P,) int64."""
        return np.diff(self.leaf_offsets)

    @functools.cached_property
    def byte_codebooks(self):
        """Codebooks of the bytes in `codes`: see `ehi.index.score`."""
        return byte_codebooks(self.codebooks)

    @property
    def leaf_load_max(self):
        """Copies of documents in the fullest leaf."""
        return int(self.leaf_sizes.max())

    @property
    def leaf_load_cv(self):
        """Standard deviation of the leaf sizes over their mean; 0 is balanced."""
        return float(self.leaf_sizes.std() / self.leaf_sizes.mean())

    @property
    def bytes_per_doc(self):
        """Bytes of codes or vectors, every copy, and re-rank vectors, per document."""
        stored = (self.vectors, self.codes, self.rerank_vectors)
        total = sum(array.nbytes for array in stored if array is not None)
        return total / self.num_documents

    @property
    def index_bytes(self):
        """Bytes of the whole folder, or of all arrays where none was opened."""
        if self.folder is not None:
            return self.folder.num_bytes
        return sum(array.nbytes for array in self.named_arrays().values())

    def named_arrays(self):
        """Every array under a name of its own, as the folder stores them."""
        arrays = {name: getattr(self, name) for name in PLAIN_ARRAYS}
        if isinstance(self.ids, StringIds):
            arrays |= {"id_offsets": self.ids.offsets, "id_text": self.ids.text}
        else:
            arrays["ids"] = self.ids
        for name in ("tree", "query_tree"):
            for key, value in (getattr(self, name) or {}).items():
                if isinstance(value, list):
                    levels = enumerate(value)
                    arrays |= {f"{name}.{key}.{h}": level for h, level in levels}
                elif isinstance(value, np.ndarray):
                    arrays[f"{name}.{key}"] = value
        head = self.query_head or {}
        arrays |= {f"query_head.{key}": value for key, value in head.items()}
        return {name: array for name, array in arrays.items() if array is not None}

    def verify(self):
        """Checks the sha256 sums of the folder, then every stored address.

        Raises:
            IndexCorruptError: naming what was altered.
        """
        if self.folder is not None:
            self.folder.check_sums()
        self.check_addresses()

    def check_addresses(self):
        """Checks that no array points outside another; reads them whole.

        Raises:
            IndexCorruptError: naming the array.
        """
        if self.leaf_rows.max() >= self.num_documents:
            raise IndexCorruptError(
                f"leaf_rows points at row {self.leaf_rows.max()} "
                f"of {self.num_documents} documents"
            )
        if isinstance(self.ids, StringIds) and (np.diff(self.ids.offsets) < 0).any():
            raise IndexCorruptError("id_offsets descend")
        if self.documents is not None and len(self.documents) != self.num_documents:
            raise IndexCorruptError(
                f"{len(self.documents)} documents to show for {self.num_documents} ids"
            )
