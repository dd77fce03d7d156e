"""The index: trained parameters, the documents they place, and what one can ask."""

import functools
from dataclasses import dataclass

import numpy as np

from ehi.index.contents import Contents
from ehi.index.folder import IndexCorruptError
from ehi.index.search import search
from ehi.index.search.codes import byte_codebooks, codeword_columns
from ehi.index.search.routing import tree_shape
from ehi.index.search.search import Hits

PARAMETER_ARRAYS = ("codebooks", "assign_codebooks", "rotation", "leaf_centroids")


@dataclass(eq=False)
class Index:
    """A searchable corpus in P leaves. Made by `build_index` or `open_index`.

    Its parameters never change. Its documents are one object, `contents`, which updates
    replace: a search sees all of an update or nothing of it.

    Attributes:
        width: embedding width D.
        spill: leaves a document is stored in, s.
        tree, query_tree: dicts as in `ehi.index.search.routing`; tree is None in a
        flat index,
            query_tree where queries route as documents do.
        codebooks: (M, K, S) float32, or None in raw leaves.
        assign_codebooks: (M, K, S) float32 that choose the codes, where these are
            others than `codebooks` (JPQ), or None.
        rotation: (D, D) float32, applied as q @ rotation, or None.
        leaf_centroids: (P, D) float32 where codes are of residuals, or None.
        encoder, config: JSON identity of what made the embeddings and the index.
        query_head: arrays of the query head, for encoders outside this package.
        mmap: whether files are mapped into memory, in an index of a folder.
        contents: the documents.
    """

    width: int
    spill: int
    tree: dict | None = None
    query_tree: dict | None = None
    codebooks: np.ndarray | None = None
    assign_codebooks: np.ndarray | None = None
    rotation: np.ndarray | None = None
    leaf_centroids: np.ndarray | None = None
    encoder: dict | None = None
    config: dict | None = None
    query_head: dict | None = None
    mmap: bool = True
    contents: Contents | None = None

    def search(
        self, queries, k=10, *, beam=1, min_prob=0.0, rerank=0, threads=1, allow=None,
        deny=None,
    ):  # fmt: skip
        """The k best documents by score in the `beam` best leaves of each query.

        Args:
            queries: (N, D) floats.
            k: results of a query; equal scores go to the smaller row.
            beam: leaves visited, 1 .. P; with `min_prob` the most of them.
            min_prob: p(leaf | query) from which on a leaf is visited, 0 .. 1; the best
                one always is. Queries that the tree is sure of visit less, so that the
                others can visit more: `ehi.eval.measure` finds it for a mean.
            rerank: 0, or how many of the best by quantised score are scored again
                with the stored float16 vectors.
            threads: Python threads over disjoint leaves, for batches.
            allow: ids of the only documents to consider, or a bool mask by row; ids
                that the index does not have are no error.
            deny: ids, or a mask, of documents to leave out.

        Returns:
            Hits.

        Raises:
            ValueError: queries of another width or dtype or not finite; k, beam,
                min_prob, rerank or threads out of range; rerank without stored vectors;
                a mask of another length or ids of another kind than those of the index.
        """
        contents = self.contents
        found = search.search(
            self, contents, queries, k, beam=beam, min_prob=min_prob, rerank=rerank,
            threads=threads, mask=search.row_mask(contents, allow, deny),
        )  # fmt: skip
        rows, *others = found
        return Hits(contents.external_ids(rows), *others, rows)

    def search_text(self, texts, k=10, *, threads=1, **search_arguments):
        """`search` by words: needs tokenizers and safetensors, and no JAX.

        Args:
            texts: N strings, or one.
            k, threads, search_arguments: as of `search`.

        Raises:
            ValueError: something is not a str; the index was built from embeddings and
                names no encoder, or another one than is found.
            FileNotFoundError: the tower is not on this machine.
        """
        queries = self.text_encoder(texts, threads=threads)
        return self.search(queries, k, threads=threads, **search_arguments)

    @functools.cached_property
    def text_encoder(self):
        """Texts -> unit embeddings: see `ehi.index.text`."""
        from ehi.index.text import load_text_encoder  # reads files, not only arrays

        return load_text_encoder(self)

    def count_visited(self, queries, beam, min_prob=0.0):
        """Copies of documents each query would visit, by routing only: (N,) int64."""
        return search.count_visited(self, self.contents, queries, beam, min_prob)

    def add(self, embeddings, ids, *, documents=None, encoder=None):
        """Adds documents: routes and encodes them as the trained parameters say.

        Each call makes a segment, which every search reads: add many at once, and
        `compact` from time to time.

        Args:
            embeddings: (N, D) floats.
            ids: N ids that the index does not have, of the kind it has.
            documents: N JSON values to show, where the index stores them.
            encoder: identity of what made the embeddings, compared with the index's.

        Raises:
            ValueError: what does not fit the index, or ids that are there already.
            IndexLockedError: somebody else is writing to the folder.
            OSError: the folder cannot be written; the index is as it was.
        """
        from ehi.index import updates  # it imports this module

        updates.add(self, embeddings, ids, documents=documents, encoder=encoder)

    def delete(self, ids, *, missing="raise"):
        """Deletes documents; returns how many there were.

        Args:
            ids: external ids.
            missing: 'raise', or 'ignore' ids that are not there.

        Raises:
            LookupError: ids that are not there.
            IndexLockedError, OSError: as in `add`.
        """
        from ehi.index import updates

        return updates.delete(self, ids, missing=missing)

    def update(self, embeddings, ids, *, documents=None, encoder=None, missing="raise"):
        """Replaces documents, all of them or none; returns how many were replaced.

        Args:
            embeddings, ids, documents, encoder: as in `add`.
            missing: 'raise', or 'add' documents that are not there.

        Raises:
            LookupError: ids that are not there.
            ValueError, IndexLockedError, OSError: as in `add`.
        """
        from ehi.index import updates

        return updates.update(
            self, embeddings, ids, documents=documents, encoder=encoder, missing=missing
        )

    def compact(self):
        """Merges all segments leaf-major and drops deleted documents.

        Results stay the same; documents of equal codes may trade places, where their
        scores differ by rounding. Rows are numbered anew. Memory: `ehi.index.compact`.

        Raises:
            IndexLockedError, OSError: as in `add`.
        """
        from ehi.index import updates

        updates.compact(self)

    def refresh(self):
        """Sees what others wrote to the folder since; returns whether they did.

        Raises:
            ValueError: the folder holds an index of other parameters now.
            IndexCorruptError: as `open_index`.
        """
        from ehi.index import store

        return store.refresh(self)

    def external_ids(self, rows):
        """External ids of document rows, of any shape; row -1 gives -1 or None."""
        return self.contents.external_ids(rows)

    def document(self, row):
        """What was stored to show of a document: see `Contents.document`."""
        return self.contents.document(row)

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
    def segments(self):
        return self.contents.segments

    @property
    def folder(self):
        """Where it was opened from, or None."""
        return self.contents.folder

    @property
    def num_documents(self):
        return self.contents.num_documents

    @property
    def has_documents(self):
        """Whether there is something to show of each document."""
        return self.segments[0].documents is not None

    @functools.cached_property
    def num_leaves(self):
        height, branching = tree_shape(self.tree)
        return branching**height

    @property
    def routing_tree(self):
        """The tree that queries descend."""
        return self.tree if self.query_tree is None else self.query_tree

    @functools.cached_property
    def byte_codebooks(self):
        """Codebooks of the bytes in `codes`: see `ehi.index.search.codes`."""
        return byte_codebooks(self.codebooks)

    @functools.cached_property
    def codeword_columns(self):
        """The same as columns: see `ehi.index.search.codes`."""
        return codeword_columns(self.byte_codebooks)

    @property
    def leaf_sizes(self):
        """Copies of documents in each leaf: (P,) int64."""
        return self.contents.leaf_sizes

    @property
    def leaf_load_max(self):
        """Copies of documents in the fullest leaf."""
        return int(self.leaf_sizes.max())

    @property
    def leaf_load_cv(self):
        """Standard deviation of the leaf sizes over their mean; 0 is balanced."""
        sizes = self.leaf_sizes
        return float(sizes.std() / sizes.mean()) if sizes.any() else 0.0

    @property
    def bytes_per_doc(self):
        """Bytes of codes or vectors, every copy, and re-rank vectors, per document.

        Those of deleted documents count until `compact`; 0 in an empty index.
        """
        total = sum(segment.leaf_bytes for segment in self.segments)
        return total / self.num_documents if self.num_documents else 0.0

    @property
    def index_bytes(self):
        """Bytes of the whole folder, or of all arrays where none was opened."""
        if self.folder is not None:
            return self.folder.num_bytes
        arrays = [self.parameter_arrays(), *(s.arrays() for s in self.segments)]
        return sum(array.nbytes for part in arrays for array in part.values())

    def parameter_arrays(self):
        """Every array of the parameters under the name the folder gives it."""
        arrays = {name: getattr(self, name) for name in PARAMETER_ARRAYS}
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
            ValueError: somebody wrote to the folder since it was opened, and removed
                files of this snapshot: `refresh` first.
        """
        if self.folder is not None:
            try:
                self.folder.check_sums()
            except IndexCorruptError:
                if not self.folder.is_newest():
                    raise ValueError(
                        f"{self.folder.path} was written to since this index was "
                        "opened, and files of then are gone: refresh() first"
                    ) from None
                raise
        self.check_addresses()

    def check_addresses(self):
        """Checks that no array points outside another: see `Segment`."""
        for segment in self.segments:
            segment.check_addresses()
