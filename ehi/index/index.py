"""The index: parameters and documents joined, and everything that can be asked of them.

    build_index -> Index -> save_index -> open_index -> Index.search -> Hits

`build`, `store`, `search`, `drift` and `updates` do the work, and never import this.
"""

import functools
from dataclasses import dataclass

from ehi.index import build, drift, store, updates
from ehi.index.commit import TowerFiles
from ehi.index.contents import Contents
from ehi.index.parameters import Parameters, path_to_leaf
from ehi.index.search import search
from ehi.index.search.search import Hits
from ehi.index.text.encoder import find_tower, load_text_encoder
from ehi.index.tune import tune


def build_index(
    embeddings, doc_ids, *, tree, query_tree=None, rotation=None, codebooks=None,
    assign_codebooks=None, leaf_centroids=None, score="ip", spill=1, leaves=None,
    leaf_dtype="float32", rerank_vectors=False, metadata=None, encoder=None,
    config=None, query_head=None, progress=None,
):  # fmt: skip
    """Routes every document to its top leaves and stores its vector or code there.

    Args:
        embeddings: (N, D) floats.
        doc_ids: N distinct ids, integers >= 0 or strings.
        tree: dict as in `ehi.index.parameters`, or None for a flat index of one leaf.
        query_tree: the queries' own tree of the same height and branching, or None.
        rotation: (D, D) orthogonal, z = x @ rotation; PQ leaves only.
        codebooks: (M, K, S) for PQ leaves, None for raw ones.
        assign_codebooks: (M, K, S) that choose the codes, None for `codebooks`. A code
            keeps its meaning when codebooks are trained after it was given (JPQ).
        leaf_centroids: (P, D), codes are then of x - centroid; PQ leaves only.
        score: how codes are scored: 'ip', 'l2', 'cosine' or 'corrected', see
            `ehi.index.search.codes`. The last two store a byte for each copy of a
            document, and need unit embeddings.
        spill: leaves a document is stored in, s.
        leaves: (N, s) integers, the leaves of each document, all different; None for
            its top s leaves by the tree, which documents that are added later get.
        leaf_dtype: 'float32' or 'float16', of the vectors in raw leaves.
        rerank_vectors: also keep all vectors as float16, for search(rerank=).
        metadata: N dicts, field -> text, number or bool, by which `search(where=)` can
            filter; or None. A field may be missing. Its values are of one kind.
        encoder, config: JSON dicts, the identity of what made the embeddings.
        query_head: dict of arrays kept beside the index, or None.
        progress: called with the number of documents of every block that is done, or
            None. Each document is counted twice: for its leaves, and for its code or
            vector.

    Returns:
        Index, in memory.

    Raises:
        ValueError: an argument that does not fit, an empty corpus, embeddings that are
            not finite or not of unit norm where the score needs that, ids that repeat,
            more leaves than documents.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((100, 8))
    >>> x /= np.linalg.norm(x, axis=1, keepdims=True)
    >>> nodes = [rng.standard_normal((1, 4, 8))]  # a tree of 4 leaves
    >>> tree = {"kind": "per_node", "nodes": nodes, "scale": 1.0}
    >>> index = build_index(x, [f"d{i}" for i in range(100)], tree=tree)
    >>> index.search(x[:2], k=1, beam=1).ids.tolist()
    [['d0'], ['d1']]
    """
    return Index(
        *build.build(
            embeddings, doc_ids, leaf_dtype=leaf_dtype, rerank_vectors=rerank_vectors,
            metadata=metadata,
            tree=tree, query_tree=query_tree, rotation=rotation, codebooks=codebooks,
            assign_codebooks=assign_codebooks, leaf_centroids=leaf_centroids,
            leaves=leaves, score=score, spill=spill, encoder=encoder, config=config,
            query_head=query_head, progress=progress,
        )
    )  # fmt: skip


def open_index(path, *, mmap=True, verify=False):
    """Opens an index folder.

    The manifest, shapes, dtypes and file sizes are always checked.

    Args:
        path: the folder.
        mmap: map the files into memory and read them as needed, else load them.
        verify: also check the sha256 sum of every file, as `Index.verify` does.

    Returns:
        Index, a snapshot: what others write later is seen after `Index.refresh`.

    Raises:
        FileNotFoundError: no index there.
        IndexCorruptError: a file is missing, truncated, altered or does not fit.

    >>> import tempfile, numpy as np
    >>> path = f"{tempfile.mkdtemp()}/index"
    >>> save_index(build_index(np.eye(3), [7, 8, 9], tree=None), path)
    >>> open_index(path, verify=True).num_documents
    3
    """
    return Index(*store.read_index(path, mmap, verify))


def save_index(index, path, documents=None, metadata=None, tower=None):
    """Writes an index folder; if one is there, a crash leaves the old or the new one.

    Segments are merged and deleted documents left out, as `Index.compact` does.

    Args:
        index: the Index. It stays where it is, in memory or in its own folder.
        path: the folder, made if needed. If it is the index's own folder, the index
            then sees what was written.
        documents: JSON values to show, one for each document in order of their rows, or
            None to keep those the index already has.
        metadata: as of `build_index`, one dict for each document in order of their
            rows, or None to keep what the index already has.
        tower: the text tower to carry in the folder, so that `search_text` works where
            it is copied: True for the one that `search_text` finds now, a folder or hub
            id for another place of it, None to keep the one that the index carries
            already, False for none.

    Raises:
        ValueError: the index holds another number of documents, or somebody else wrote
            to its own folder since it was opened or refreshed; the tower has other
            weights than the index was built with.
        FileNotFoundError: there is no such tower.
        FileExistsError: `path` is there and is not an index.
        IndexLockedError: somebody else is writing to it.
        OSError: it cannot be written; what was there is unchanged.

    >>> import tempfile, numpy as np
    >>> path = f"{tempfile.mkdtemp()}/index"
    >>> index = build_index(np.eye(3), [7, 8, 9], tree=None)
    >>> save_index(index, path, documents=[{"title": t} for t in "abc"])
    >>> open_index(path).document(1)
    {'title': 'b'}
    """
    contents = drift.remembering(index.contents)
    arrays, fields = updates.merged_arrays(contents, metadata)
    texts = updates.merged_texts(contents, documents)
    if tower is not None and tower is not False:
        tower = _carried(index, None if tower is True else tower)
    if store.write_index(
        path, index.parameters, contents, arrays, texts, fields=fields, tower=tower
    ):
        index.refresh()


def _carried(index, tower):
    """The TowerFiles of the tower of an index, or of another place of it."""
    folder = find_tower(index, tower)
    if index.folder is not None and folder == index.folder.tower:
        return TowerFiles(folder, link=True)
    return TowerFiles.at(folder)


def _of_parameters(name):
    return property(lambda index: getattr(index.parameters, name))


def _of_contents(name):
    return property(lambda index: getattr(index.contents, name))


@dataclass(eq=False)
class Index:
    """A searchable corpus in P leaves. Made by `build_index` or `open_index`.

    Its parameters never change. Its documents are one object, `contents`, which updates
    replace: a search sees all of an update or nothing of it.

    Attributes:
        parameters: the Parameters. All of them are attributes of the index as well:
            `index.width` is `index.parameters.width`.
        contents: the documents. `segments`, `leaf_sizes`, `num_documents`, `folder` and
            `fields` (field -> kind of the metadata, or None) are attributes of the
            index as well.

    >>> import numpy as np
    >>> tree = {"kind": "per_node", "nodes": [np.eye(2)[None]], "scale": 1.0}
    >>> index = build_index(np.eye(2)[[0, 1, 1]], ["a", "b", "c"], tree=tree)
    >>> index.num_documents, index.leaf_sizes.tolist(), index.bytes_per_doc
    (3, [1, 2], 8.0)
    >>> list(index.parameter_arrays())
    ['tree.nodes.0']
    >>> index.check_addresses()  # nothing to complain about
    """

    parameters: Parameters
    contents: Contents

    width = _of_parameters("width")
    spill = _of_parameters("spill")
    tree = _of_parameters("tree")
    query_tree = _of_parameters("query_tree")
    routing_tree = _of_parameters("routing_tree")
    num_leaves = _of_parameters("num_leaves")
    codebooks = _of_parameters("codebooks")
    assign_codebooks = _of_parameters("assign_codebooks")
    byte_codebooks = _of_parameters("byte_codebooks")
    rotation = _of_parameters("rotation")
    leaf_centroids = _of_parameters("leaf_centroids")
    score = _of_parameters("score")
    encoder = _of_parameters("encoder")
    config = _of_parameters("config")
    query_head = _of_parameters("query_head")
    segments = _of_contents("segments")
    leaf_sizes = _of_contents("leaf_sizes")
    num_documents = _of_contents("num_documents")
    folder = _of_contents("folder")
    fields = _of_contents("fields")

    def search(
        self, queries, k=10, *, beam=None, min_prob=None, rerank=None, threads=1,
        allow=None, deny=None, where=None,
    ):  # fmt: skip
        """The k best documents by score in the `beam` best leaves of each query.

        A search that names neither beam nor min_prob has the setting that the index
        stores: that of `tune`, or else that of its training, or else one leaf.

        Args:
            queries: (N, D) floats.
            k: results of a query; equal scores go to the smaller row.
            beam: leaves visited, 1 .. P; with `min_prob` the most of them.
            min_prob: only leaves with p(leaf | query) >= min_prob are visited, 0 .. 1,
                but always the best one. Queries that the tree is sure of visit fewer
                leaves, so others can visit more. `tune` finds the value.
            rerank: 0, or how many of the best by quantised score are scored again
                with the stored float16 vectors.
            threads: Python threads over disjoint leaves, for batches.
            allow: ids of the only documents to consider, or a bool mask by row. Ids
                that the index does not have are ignored.
            deny: ids of documents to leave out, or a mask.
            where: a condition on metadata that documents must meet, such as
                "lang == 'en' and year >= 2020": see `ehi.index.where`.

        Returns:
            Hits.

        Raises:
            ValueError: queries of another width or dtype or not finite; k, beam,
                min_prob, rerank or threads out of range; rerank without stored vectors;
                a mask of another length or ids of another kind than those of the index;
                a condition that cannot be read or does not fit the metadata.

        >>> import numpy as np
        >>> index = build_index(np.eye(3), ["a", "b", "c"], tree=None)
        >>> hits = index.search(np.array([[0.1, 0.9, 0.5]]), k=2, deny=["b"])
        >>> hits.ids.tolist(), hits.scores.round(1).tolist(), hits.visited.tolist()
        ([['c', 'a']], [[0.5, 0.10000000149011612]], [2])
        """
        contents = self.contents
        setting = search.chosen_setting(
            self.parameters, contents, k, beam, min_prob, rerank
        )
        found = search.search(
            self.parameters, contents, queries, k, threads=threads,
            mask=search.row_mask(contents, allow, deny, where), **setting,
        )  # fmt: skip
        rows, *others = found
        return Hits(contents.external_ids(rows), *others, rows)

    def where(self, condition):
        """The documents that meet a condition on their metadata: (R,) bool by row.

        `search(where=)` reads a condition at each call; a mask that several searches
        need is made here once, for `search(allow=)`, and holds until the next update.

        Args:
            condition: such as "lang == 'en' and year >= 2020": see `ehi.index.where`.

        Raises:
            ValueError: it cannot be read, does not fit the metadata, or there are none.

        >>> import numpy as np
        >>> about = [{"lang": "en", "year": 2021}, {"lang": "de", "year": 2019}, {}]
        >>> index = build_index(np.eye(3), [7, 8, 9], tree=None, metadata=about)
        >>> index.where("year < 2020 or lang is None").tolist()
        [False, True, True]
        >>> index.search(np.eye(3)[:1], k=1, where="year < 2020").ids.tolist()
        [[8]]
        """
        return self.contents.where(condition)

    def metadata(self, row):
        """The metadata of the document in a row: a dict without missing fields.

        Raises:
            ValueError: the index was built without metadata.
            IndexError: no such row.

        >>> import numpy as np
        >>> about = [{"lang": "en", "year": 2021}, {"lang": "de"}]
        >>> build_index(np.eye(2), [7, 8], tree=None, metadata=about).metadata(1)
        {'lang': 'de'}
        """
        return self.contents.metadata(row)

    tune = tune
    drift = drift.drift

    @property
    def setting(self):
        """The stored beam, min_prob and rerank of a search that names none, or None."""
        return search.default_setting(self.parameters, self.contents)

    def search_text(self, texts, k=10, *, threads=1, **search_arguments):
        """Searches with texts. Needs tokenizers and safetensors, but no JAX.

        Args:
            texts: N strings, or one.
            k, threads, search_arguments: as of `search`.

        Raises:
            ValueError: something is not a str; the index names no encoder, since it was
                built from embeddings; or the encoder found is another one.
            FileNotFoundError: the tower is not on this machine.

        >>> import numpy as np
        >>> encoder = {"tower": "tests/fixtures/bert_tiny", "query_length": 12}
        >>> index = build_index(np.eye(32), range(32), tree=None, encoder=encoder)
        >>> index.search_text(["a b c", "hello"], k=3).ids.shape
        (2, 3)
        """
        queries = self.text_encoder(texts, threads=threads)
        return self.search(queries, k, threads=threads, **search_arguments)

    @functools.cached_property
    def text_encoder(self):
        """Texts -> unit embeddings: see `ehi.index.text`."""
        return load_text_encoder(self)

    def count_visited(self, queries, beam, min_prob=0.0):
        """Copies of documents that each query would visit: (N,) int64.

        Queries are routed; nothing is scored.

        >>> import numpy as np
        >>> index = build_index(np.eye(3), ["a", "b", "c"], tree=None)
        >>> index.count_visited(np.eye(3)[:2], beam=1).tolist()
        [3, 3]
        """
        return search.count_visited(
            self.parameters, self.contents, queries, beam, min_prob
        )

    add = updates.add
    delete = updates.delete
    update = updates.update
    compact = updates.compact
    refresh = updates.refresh

    def external_ids(self, rows):
        """External ids of document rows of any shape; row -1 gives -1 or None.

        Raises:
            IndexError: no such row.

        >>> import numpy as np
        >>> index = build_index(np.eye(3), ["a", "b", "c"], tree=None)
        >>> index.external_ids(np.array([2, -1])).tolist()
        ['c', None]
        """
        contents = self.contents
        return contents.external_ids(contents.check_rows(rows))

    def document(self, row):
        """The value stored to show the document in a row.

        Raises:
            ValueError: the index was saved without documents.
            IndexError: no such row.

        >>> import tempfile, numpy as np
        >>> path = f"{tempfile.mkdtemp()}/index"
        >>> index = build_index(np.eye(2), [7, 8], tree=None)
        >>> save_index(index, path, documents=["a text", {"title": "another"}])
        >>> open_index(path).document(1)
        {'title': 'another'}
        """
        return self.contents.document(row)

    def leaf_path(self, leaf):
        """The child numbers from the root to a leaf: a tuple of H ints.

        >>> import numpy as np
        >>> nodes = [np.ones((1, 3, 2)), np.ones((3, 3, 2))]  # H = 2, B = 3
        >>> tree = {"kind": "per_node", "nodes": nodes, "scale": 1.0}
        >>> build_index(np.ones((9, 2)), range(9), tree=tree).leaf_path(5)
        (1, 2)
        """
        return path_to_leaf(self.tree, leaf)

    @property
    def has_documents(self):
        """Whether there is something to show of each document."""
        return self.segments[0].documents is not None

    @property
    def leaf_load_max(self):
        """Copies of documents in the fullest leaf."""
        return int(self.leaf_sizes.max())

    @property
    def leaf_load_cv(self):
        """Standard deviation of the leaf sizes over their mean; 0 is balanced."""
        return drift.imbalance(self.leaf_sizes)

    @property
    def bytes_per_doc(self):
        """Bytes per document of codes or vectors and factors, and of re-rank vectors.

        Every copy counts, and deleted documents until `compact`. An empty index has 0.
        """
        return self._per_doc(segment.leaf_bytes for segment in self.segments)

    @property
    def code_bytes_per_doc(self):
        """Bytes per document of codes or vectors only; counted as `bytes_per_doc`."""
        return self._per_doc(segment.code_bytes for segment in self.segments)

    def _per_doc(self, sizes):
        return sum(sizes) / self.num_documents if self.num_documents else 0.0

    @property
    def index_bytes(self):
        """Bytes of the whole folder, or of all arrays if the index has no folder."""
        if self.folder is not None:
            return self.folder.num_bytes
        arrays = [self.parameter_arrays(), *(s.arrays() for s in self.segments)]
        return sum(array.nbytes for part in arrays for array in part.values())

    def parameter_arrays(self):
        """Every array of the parameters under its name in the manifest of a folder."""
        return self.parameters.arrays()

    def verify(self):
        """Checks the sha256 sums of the folder, then every stored address.

        Raises:
            IndexCorruptError: naming what was altered.
            ValueError: somebody has written to the folder since it was opened, and
                files of this snapshot are gone: `refresh` first.

        >>> import tempfile, numpy as np
        >>> path = f"{tempfile.mkdtemp()}/index"
        >>> save_index(build_index(np.eye(3), ["a", "b", "c"], tree=None), path)
        >>> open_index(path).verify()  # nothing was altered
        """
        if self.folder is not None:
            self.folder.verify()
        self.check_addresses()

    def check_addresses(self):
        """Checks that no array points outside another: see `Segment`."""
        self.contents.check_addresses()
