"""An Index as an index of Faiss, and a search of it in the leaves that we choose.

Raw leaves become the inverted lists of an IndexIVFFlat, float16 vectors as float32.
Codes become those of an IndexIVFPQ, byte for byte. The metric is L2 if the score is
'l2', else the inner product, and ids in the lists are document rows. A rotation comes
first, in an IndexPreTransform.

Faiss has no factors. It finds candidates by their inner products, and the stored
factors score these again: see `FaissIndex.search`.

The functions import Faiss when they run.
"""

import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ehi.files import new_file
from ehi.index.check import IndexCorruptError, check_queries, check_results
from ehi.index.index import Index
from ehi.index.search.blas import one_blas_thread
from ehi.index.search.codes import decode, factor_table
from ehi.index.search.routing import route, rows_at_once
from ehi.index.search.search import Request, check_beam, row_mask
from ehi.index.search.ties import score_again, settle
from ehi.index.search.topk import drop_duplicates, keys_of, smallest, unpack

_VALUES = 2**22  # size of the largest temporary array of a search
_GROWTH = 8  # times the candidates, where the first ones prove nothing
_ROUNDING = 1e-5  # of scores, relative


def to_faiss(index, *, fastscan=False):
    """Copies the documents of an index into an index of Faiss.

    Deleted documents are left out, and later changes of the index are not seen. The
    vectors of the coarse quantiser are the leaf centroids if codes are of residuals,
    the nodes of a tree of height 1 without residual layer and biases, or else the mean
    of each leaf. Faiss's own `search` visits the leaves that ours visits only if these
    are the nodes, so search through the wrapper.

    Args:
        index: an Index.
        fastscan: True makes an IndexIVFPQFastScan of 4-bit codes. It is several times
            faster, and its 8-bit tables round the scores: see `rerank` of
            `FaissIndex.search`.

    Returns:
        FaissIndex.

    Raises:
        ImportError: Faiss is not installed.
        ValueError: fastscan of leaves other than 4-bit codes.
        IndexCorruptError: leaves point at rows that do not exist.

    Example:
        >>> import faiss, numpy as np
        >>> from ehi.index import build_index
        >>> index = build_index(np.eye(4), ["a", "b", "c", "d"], tree=None)
        >>> ids, scores = to_faiss(index).search(np.array([[0.25, 0.5, 0, 0]]), k=2)
        >>> ids.tolist(), scores.tolist()
        ([['b', 'a']], [[0.5, 0.25]])
    """
    faiss = import_faiss()
    source = replace(index)
    for segment in source.segments:
        segment.check_layout()
    width, codebooks = index.width, index.codebooks
    if fastscan and (codebooks is None or codebooks.shape[1] != 16):
        leaves = "raw vectors" if codebooks is None else f"K = {codebooks.shape[1]}"
        raise ValueError(f"fastscan needs codes of K = 16 codewords, got {leaves}")
    metric = _metric(faiss, index)
    shape = (faiss.IndexFlatIP(width), width, index.num_leaves)
    if codebooks is None:
        lists = faiss.IndexIVFFlat(*shape, metric)
    else:
        num_subspaces, num_codewords, _ = codebooks.shape
        bits = num_codewords.bit_length() - 1
        lists = faiss.IndexIVFPQ(*shape, num_subspaces, bits, metric)
        faiss.copy_array_to_vector(codebooks.ravel(), lists.pq.centroids)
        lists.by_residual = index.leaf_centroids is not None
    shape[0].add(_fill(faiss, lists, source))
    lists.is_trained = True
    if fastscan:
        lists = faiss.IndexIVFPQFastScan(lists)
    if index.rotation is None:
        return FaissIndex(lists, source)
    rotation = faiss.LinearTransform(width, width, False)
    faiss.copy_array_to_vector(index.rotation.T.ravel(), rotation.A)
    rotation.is_trained = rotation.is_orthonormal = True
    return FaissIndex(faiss.IndexPreTransform(rotation, lists), source)


def _metric(faiss, index):
    """The metric that orders documents as the score of an Index does, if one does."""
    l2 = index.score == "l2"
    return faiss.METRIC_L2 if l2 else faiss.METRIC_INNER_PRODUCT


def _fill(faiss, lists, index):
    """Fills the inverted lists; returns the coarse centroids (P, D), rotated."""
    coarse = np.zeros((index.num_leaves, index.width), np.float32)
    given = _given_centroids(index)
    if given is not None:
        coarse[:] = given if index.rotation is None else given @ index.rotation
    for leaf in range(index.num_leaves):
        rows = np.ascontiguousarray(index.contents.rows_in_leaf(leaf), np.int64)
        if not len(rows):
            continue
        stored, vectors = _stored(index, leaf)
        lists.invlists.add_entries(
            leaf, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(stored)
        )
        lists.ntotal += len(rows)
        if given is None:
            coarse[leaf] = vectors().mean(axis=0)
    return coarse


def _given_centroids(index):
    """(P, D) vectors that the index has of its leaves, or None."""
    if index.leaf_centroids is not None:
        return index.leaf_centroids
    tree = index.routing_tree
    plain = tree is not None and tree.keys() == {"kind", "nodes", "scale"}
    if plain and len(tree["nodes"]) == 1 and tree["scale"] > 0:
        return tree["nodes"][0][0]
    return None


def _stored(index, leaf):
    """The bytes of a leaf as Faiss stores them, and a function: () -> their vectors."""
    deleted = index.contents.deleted
    parts = []
    for segment in index.segments:
        start, stop = segment.leaf_offsets[leaf : leaf + 2].tolist()
        part = (segment.vectors if segment.codes is None else segment.codes)[start:stop]
        if deleted is not None:
            part = part[~deleted[segment.rows(start, stop)]]
        parts.append(part)
    stored = np.concatenate(parts)
    if index.codebooks is None:
        stored = stored.astype(np.float32, copy=False)
        return stored.view(np.uint8), lambda: stored
    return stored, lambda: decode(stored, index.byte_codebooks)


@dataclass(frozen=True, eq=False)
class FaissIndex:
    """An index of Faiss, and the Index that routes queries and knows external ids.

    Made by `to_faiss` or `read`.

    Attributes:
        index: the faiss index; its ids are rows of `source`.
        source: the Index as it was when exported. Its leaves are read only to score
            candidates again, so an index that is mapped into memory takes little.

    Example:
        >>> import faiss, tempfile, numpy as np
        >>> from ehi.index import build_index
        >>> source = build_index(np.eye(4), ["a", "b", "c", "d"], tree=None)
        >>> path = f"{tempfile.mkdtemp()}/index.faiss"
        >>> to_faiss(source).write(path)
        >>> index = FaissIndex.read(path, source)
        >>> index.search(np.eye(4)[2:], k=1)[0].tolist()
        [['c'], ['d']]
    """

    index: Any
    source: Index

    @functools.cached_property
    def exact(self):
        """Whether Faiss's own scores are those of `source`, up to rounding.

        They are not if the score has factors, or if fast-scan rounds its tables.
        """
        faiss = import_faiss()
        rounds = isinstance(self._lists, faiss.IndexIVFPQFastScan)
        return not (self.source.parameters.has_factors or rounds)

    def search(self, queries, k=10, *, beam=1, rerank=0):
        """The k best documents in the `beam` best leaves of each query.

        Without `rerank`, ids are those of `source.search` at the time of the export, in
        the same order, and scores are within 1e-4; a fast-scan may miss some. If the
        score has factors, candidates are scored again with them, 4 k and at least 100,
        then 8 times as many. No other document can be better if its inner product times
        the largest factor is too small; queries without this proof ask `source`.

        With `rerank`, that many candidates of Faiss are scored again with the codes and
        factors of `source`, and a document is missed only if it is not among them.

        Args:
            queries: (N, D) floats.
            k: results of a query.
            beam: leaves visited, 1 .. P.
            rerank: how many candidates to score again; 0 is as many as are needed, or
                4 k and at least 100 of a fast-scan with factors.

        Returns:
            ids (N, k), external ones, padded with -1 or None; scores (N, k) float32,
            padded with -inf.

        Raises:
            ValueError: queries of another width or dtype or not finite; k, beam or
                rerank out of range.
        """
        source = self.source
        queries = check_queries(queries, source.width)
        k = check_results("k", k, source.num_documents)
        beam = check_beam(source, beam)
        rerank = check_results("rerank", rerank, source.num_documents, least=0)
        if 0 < rerank < k:
            raise ValueError(f"rerank={rerank} candidates are fewer than k={k}")
        prove = source.parameters.has_factors and not rerank
        if prove:
            rerank = max(k, min(max(4 * k, 100), source.num_documents))
            prove = not isinstance(self._lists, import_faiss().IndexIVFPQFastScan)
        keys, last = self._search_parts(queries, k, beam, rerank)
        for growth in (_GROWTH, 0) if prove else ():
            todo = np.flatnonzero(self._unproven(keys, last))
            if not len(todo):
                break
            some = queries[todo]
            if growth and growth * rerank < source.num_documents:
                found = self._search_parts(some, k, beam, growth * rerank)
                keys[todo], last[todo] = found
            else:
                hits = source.search(some, k, beam=beam)
                keys[todo], last[todo] = keys_of(hits.scores, hits.rows), -np.inf
        scores, rows = unpack(keys)
        return source.external_ids(rows), scores

    def _search_parts(self, queries, k, beam, rerank):
        """`_search_part` of all queries, as many at once as memory allows."""
        source = self.source
        most = max(beam, rerank * source.spill) * source.width
        step = max(1, _VALUES // most)
        step = min(step, rows_at_once(source.routing_tree, beam))
        parts = [
            self._search_part(queries[start : start + step], k, beam, rerank)
            for start in range(0, max(len(queries), 1), step)
        ]
        return tuple(map(np.concatenate, zip(*parts, strict=True)))

    def _unproven(self, keys, last):
        """Queries whose k-th document may be worse than one that is no candidate: (N,).

        Args:
            keys: (N, k) of the best candidates.
            last: (N,) inner product of the last candidate, -inf if all were.
        """
        bytes_ = [part.factors for part in self.source.segments if part.num_copies]
        ends = [(part.min(), part.max()) for part in bytes_]
        factors = factor_table()[np.unique(ends)] if ends else np.ones(1, np.float32)
        worst, more = unpack(keys)[0][:, -1], last > -np.inf
        last = np.where(more, last, 0)
        bound = np.maximum(last * factors[0], last * factors[-1])
        return more & (worst <= bound + _ROUNDING * np.abs(bound) + 1e-6)

    def write(self, path):
        """Writes the faiss index to a file, and replaces an old file as a whole.

        Raises:
            OSError: it cannot be written; an old file is unchanged.
        """
        faiss = import_faiss()
        with new_file(path) as part, part.open("wb") as file:
            writer = faiss.PyCallbackIOWriter(file.write)
            faiss.write_index(self.index, writer)

    @classmethod
    def read(cls, path, source):
        """Reads a file of `write`.

        Args:
            path: the file.
            source: the Index that was exported, with the same documents.

        Raises:
            FileNotFoundError: there is no file.
            IndexCorruptError: Faiss cannot read it.
            ValueError: `source` has other documents or other leaves.
        """
        faiss = import_faiss()
        if not Path(path).is_file():
            raise FileNotFoundError(f"no Faiss index at {path}: it does not exist")
        try:
            found = faiss.read_index(os.fspath(path))
        except RuntimeError as error:  # its last line says why
            reason = str(error).strip().splitlines()[-1]
            raise IndexCorruptError(f"Faiss cannot read {path}: {reason}") from None
        read = cls(found, replace(source))
        lists = read._lists
        if (lists.d, lists.nlist) != (source.width, source.num_leaves):
            raise ValueError(
                f"{path} has {lists.nlist} lists of width {lists.d}, the index "
                f"{source.num_leaves} leaves of width {source.width}"
            )
        if lists.metric_type != _metric(faiss, source):
            raise ValueError(
                f"{path} has the metric number {lists.metric_type}, which is not that "
                f"of the score {source.score!r}: export the index again"
            )
        for leaf in range(lists.nlist):
            ids = list_ids(faiss, lists.invlists, leaf)
            if not np.array_equal(ids, source.contents.rows_in_leaf(leaf)):
                raise ValueError(
                    f"{path} and the index have different documents in leaf {leaf}: "
                    "export the index again"
                )
        return read

    @functools.cached_property
    def _lists(self):
        """The faiss index after the rotation."""
        faiss = import_faiss()
        if isinstance(self.index, faiss.IndexPreTransform):
            return faiss.downcast_index(self.index.index)
        return self.index

    def _search_part(self, queries, k, beam, rerank):
        """Keys and the last candidates of some queries.

        Returns:
            (N, k) ascending keys, see `ehi.index.search.topk`; (N,) float32 score that
            Faiss gives to the last of `rerank` candidates, -inf if there are fewer.
        """
        source = self.source
        with one_blas_thread():
            leaves = route(queries, source.routing_tree, beam).leaves
            rotated = queries if source.rotation is None else queries @ source.rotation
            norms = np.vecdot(queries, queries)[:, None]  # (N, 1), of l2
            offsets = np.zeros(leaves.shape, np.float32)  # (N, b)
            if source.leaf_centroids is not None:
                centroids = source.leaf_centroids[leaves]  # (N, b, D)
                offsets = np.matmul(centroids, queries[:, :, None])[:, :, 0]
                if source.score == "l2":  # |q - c|^2 instead of q.c
                    half = source.parameters.half_centroid_norms[leaves]
                    offsets = norms + 2 * (half - offsets)
        wanted = rerank or k + 1  # one more than needed: see `settle`
        scores, rows = self._search_leaves(
            rotated, wanted * source.spill, leaves, offsets
        )
        if source.score == "l2":
            scores = (1 + norms - scores) / 2
        keys = keys_of(scores, rows)
        scores, rows = unpack(drop_duplicates(np.sort(keys, axis=1), wanted))
        last = scores[:, -1]
        parameters, contents = source.parameters, source.contents
        if rerank:
            scores = score_again(parameters, contents, queries, leaves, rows)
        elif self.exact:
            mask = row_mask(contents)
            request = Request(parameters, contents, mask, k, beam, 0.0, 0, 1)
            scores, rows = settle(request, queries, rotated, leaves, scores, rows)
        return smallest(keys_of(scores, rows), k), last

    def _search_leaves(self, rotated, wanted, leaves, offsets):
        """Scores and rows (N, wanted) of the best copies in the leaves (N, b)."""
        faiss = import_faiss()
        num, beam = leaves.shape
        scores = np.empty((num, wanted), np.float32)
        rows = np.empty((num, wanted), np.int64)
        rotated, leaves, offsets = map(np.ascontiguousarray, (rotated, leaves, offsets))
        # The method without `_c` reads the number of leaves from the index, and setting
        # it there would disturb other threads.
        self._lists.search_preassigned_c(
            num, faiss.swig_ptr(rotated), wanted, faiss.swig_ptr(leaves),
            faiss.swig_ptr(offsets), faiss.swig_ptr(scores), faiss.swig_ptr(rows),
            False, faiss.SearchParametersIVF(nprobe=beam),
        )  # fmt: skip
        return scores, rows


def list_ids(faiss, invlists, number):
    """The ids in one inverted list, a copy: (m,) int64."""
    pointer = invlists.get_ids(number)
    ids = faiss.rev_swig_ptr(pointer, invlists.list_size(number)).copy()
    invlists.release_ids(number, pointer)
    return ids


def import_faiss():
    """The module `faiss`, or an ImportError that says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("this needs Faiss: pip install 'ehi[faiss]'") from error
    return faiss
