"""Embeddings for the search benchmark, synthetic or real, and their exact answers."""

from dataclasses import dataclass

import numpy as np

from ehi.data.datasets import open_dataset
from ehi.data.tokens import tokenise
from ehi.encode.encode import cached_encode
from ehi.files import cache_folder
from ehi.model.pretrained import load_tower, resolve

REAL_DATASETS = ("pydocs", "beir/scifact")
_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_LENGTHS = {"queries": 32, "documents": 128}  # tokens; enough to measure speed
_CHUNK = 2**16  # rows drawn at once
# Lengths of the noise added to vectors of length about 1. The mixture is easy for lists
# and hard for codes: with 200,000 x 384, 8 of 512 lists find 0.99 of the top 10, and
# 48-byte codes find 0.25.
_WITHIN_CLUSTER, _QUERY_NOISE = 0.7, 0.5
_COPY_NOISE = 0.4


@dataclass(frozen=True)
class Collection:
    """Documents to index, and queries.

    Attributes:
        name: 'mixture' or 'real'.
        documents: (N, D) float32 unit rows.
        queries: (Q, D) float32 unit rows.
    """

    name: str
    documents: np.ndarray
    queries: np.ndarray


def gaussian_mixture(
    num: int,
    width: int,
    *,
    num_queries: int,
    num_clusters: int = 500,
    seed: int = 0,
    out: np.ndarray | None = None,
) -> Collection:
    """Draw uneven Gaussian clusters of decaying spectrum, on the sphere.

    Coordinate i of centres and noise has a standard deviation of i^-0.35. The sizes of
    the clusters are uniform on the simplex. Queries are documents with noise. Every
    chunk of rows has a random generator of its own, so rows can be drawn in chunks.

    Args:
        num: documents N.
        width: D.
        num_queries: Q.
        num_clusters: clusters.
        seed: seed of all random numbers.
        out: array (N, D) float32 to fill, such as a memory map; None: a new array.
    """
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, width + 1, dtype=np.float32) ** -0.35
    spectrum /= np.linalg.norm(spectrum)  # noise of length about 1
    centres = rng.standard_normal((num_clusters, width), np.float32) * spectrum
    ends = np.cumsum(rng.dirichlet(np.ones(num_clusters)))
    documents = np.empty((num, width), np.float32) if out is None else out
    for start in range(0, num, _CHUNK):
        chunk = np.random.default_rng([seed, 1, start])
        rows = min(_CHUNK, num - start)
        cluster = np.searchsorted(ends[:-1], chunk.random(rows))
        noise = chunk.standard_normal((rows, width), np.float32) * spectrum
        noise *= _WITHIN_CLUSTER
        documents[start : start + rows] = unit(centres[cluster] + noise)
    asked = np.sort(rng.integers(num, size=num_queries))
    noise = rng.standard_normal((num_queries, width), np.float32) * spectrum
    queries = unit(documents[asked] + _QUERY_NOISE * noise)
    return Collection("mixture", documents, queries)


def real_embeddings(num: int, *, num_queries: int, seed: int = 0) -> Collection:
    """Return MiniLM embeddings of pydocs and SciFact, repeated with noise up to N.

    The first copy is exact. The noise has the covariance of the documents, so a copy
    resembles the embedding of a similar text. The texts are encoded once, then read
    from the cache folder.
    """
    documents, queries = (
        np.concatenate([_embed(name, side) for name in REAL_DATASETS])
        for side in ("documents", "queries")
    )
    rng = np.random.default_rng(seed)
    width = documents.shape[1]
    covariance = np.cov(documents.T).astype(np.float32)
    shape = np.linalg.cholesky(covariance + 1e-6 * np.eye(width, dtype=np.float32))
    shape *= _COPY_NOISE / np.sqrt(np.trace(covariance))
    rows = np.arange(num) % len(documents)
    copies = documents[rows]
    for start in range(len(documents), num, _CHUNK):
        part = slice(start, min(start + _CHUNK, num))
        noise = rng.standard_normal((part.stop - start, width), np.float32)
        copies[part] = unit(copies[part] + noise @ shape.T)
    asked = rng.permutation(len(queries))[:num_queries]
    return Collection("real", copies, queries[asked])


def _embed(dataset_name: str, side: str) -> np.ndarray:
    """Return embeddings of the documents or the queries of a data set (rows, D)."""
    dataset = open_dataset(dataset_name)
    texts = dataset.query_texts
    if side == "documents":
        texts = [document.content for document in dataset.documents]
    pretrained = resolve(_MODEL)
    tokens = tokenise(
        texts, tokenizer_file=pretrained.tokenizer_file, max_length=_LENGTHS[side],
        cache_dir=cache_folder() / "tokens", name=f"{dataset.name} {side}",
    )  # fmt: skip
    tower = load_tower(pretrained)
    return unit(cached_encode(pretrained, tower, tokens, desc=f"encode {dataset.name}"))


def exact_top(documents: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Return rows of the k largest inner products of each query, unordered (Q, k)."""
    scores = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(documents), _CHUNK // 4):
        block = queries @ documents[start : start + _CHUNK // 4].T
        numbers = np.broadcast_to(start + np.arange(block.shape[1]), block.shape)
        scores = np.concatenate([scores, block], axis=1)
        rows = np.concatenate([rows, numbers], axis=1)
        best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        scores = np.take_along_axis(scores, best, axis=1)
        rows = np.take_along_axis(rows, best, axis=1)
    return rows


def overlap(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the mean share of a row of `wanted` that the row of `found` has."""
    pairs = zip(wanted, found, strict=True)
    return float(np.mean([np.isin(rows, others).mean() for rows, others in pairs]))


def unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows (N, D) to length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
