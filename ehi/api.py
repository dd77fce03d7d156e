"""`ehi.fit`: vectors in, a learned index out."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from ehi.data.rows import Counted
from ehi.data.vectors.checks import check_queries, scan
from ehi.data.vectors.containers import check_rows
from ehi.data.vectors.metric import Metric, metric_of
from ehi.data.vectors.neighbours import exact_neighbours
from ehi.data.vectors.pairs import NEIGHBOURS, query_table, vector_pairs
from ehi.eval.measure import min_prob_for_budget
from ehi.index import build_index
from ehi.model.export import index_arrays
from ehi.model.joint import JointIndex
from ehi.model.params import split_model
from ehi.model.pq import num_subspaces
from ehi.train import recipes
from ehi.train.batch import TrainingSet
from ehi.train.logs import MetricLog
from ehi.train.loop import run_phase
from ehi.train.negatives import mine_from_teacher
from ehi.train.phase import Phase
from ehi.train.starts import fit_starts
from ehi.vector_index import VectorIndex, described

DEFAULT_PERCENT = 10  # of the documents that a search visits if it says nothing
MOST_LABELLED = 50_000  # queries that exact search labels
SYNTHETIC = 2  # synthetic queries of each document
SAMPLE = 2000  # queries that set the default search
DEVICE_TABLES = 2**30  # bytes of tables that are put on the device


def fit(
    documents: np.ndarray,
    queries: np.ndarray | None = None,
    *,
    compression: int = 64,
    ids: Sequence[str] | Sequence[int] | None = None,
    metric: str = "",
    leaves: int = 0,
    steps: int = 400,
    seed: int = 0,
) -> VectorIndex:
    """Learn a tree and product-quantised codes for vectors, and index them.

    The given vectors stay as they are: exact search of them is the teacher. JAX is
    imported by this call, and the index that it returns does not need it.

    Args:
      documents: (N, T) float32 or float16; a memory map is read in chunks.
      queries: (Q, T), such as logged ones; None: documents and synthetic queries train.
      compression: times that a code is smaller than T floats of 4 bytes.
      ids: N distinct ids; None: row numbers.
      metric: 'cosine', 'ip' or 'l2' (see `ehi.data.vectors.metric`); '' for documents
        of unit length, where they are the same.
      leaves: P; 0: at most 2 sqrt(N).
      steps: of training.
      seed: of every random choice.

    Returns:
      the index, whose `search` takes vectors as `documents` are. A search that names no
      setting visits a tenth of the documents; `tune` finds another.

    Raises:
      ValueError: an argument does not fit; a row that cannot be used is named.

    >>> import numpy as np
    >>> import ehi
    >>> x = np.random.default_rng(0).normal(size=(1000, 32)).astype(np.float32)
    >>> x /= np.linalg.norm(x, axis=1, keepdims=True)
    >>> index = ehi.fit(x, x[:200] + 0.01, compression=16, steps=5)
    >>> hits = index.search(x[:3], k=10)
    >>> hits.ids.shape, bool(hits.visited.mean() < 200)
    ((3, 10), True)
    >>> index.save("runs/vectors")  # and ehi.load("runs/vectors") opens it
    """
    name, ids = _check(documents, queries, metric, ids)
    codes = _codes(documents, compression)
    maps = Metric.fit(name, documents, codes["num_subspaces"])
    model = _model(len(documents), maps, codes, leaves, seed)
    phase = Phase.from_mapping(recipes.vectors() | {"steps": steps})
    data, table = _training_data(documents, queries, maps, seed)
    features = maps.documents(np.asarray(documents))  # (N, D)
    with tempfile.TemporaryDirectory() as folder:
        trained = _train(model, data, features, table, phase, seed, Path(folder))
    index = build_index(features, ids, **index_arrays(*trained))
    rows = np.unique(data.pairs["pseudo" if queries is None else "labelled"][0])
    sample = table[rows[:: -(-len(rows) // SAMPLE)]]
    least = min_prob_for_budget(index, sample, DEFAULT_PERCENT)
    encoder = described(maps) | {
        "default_beam": index.num_leaves,
        "default_min_prob": 1.0 if least is None else least,
    }
    parameters = dataclasses.replace(index.parameters, encoder=encoder)
    return VectorIndex(parameters, index.contents, maps)


def _check(documents, queries, metric: str, ids):
    """The name of the metric, and the ids, if all arguments can be used."""
    check_rows(documents, "documents")
    scanned = scan(documents, "documents")
    if queries is not None:
        check_rows(queries, "queries")
        check_queries(queries, documents.shape[1], "queries")
        scan(queries, "queries")
    name = metric_of(metric, scanned.norms, scanned.uneven, "documents")
    if ids is None:
        return name, range(len(documents))
    if len(ids) != len(documents) or len(set(ids)) != len(ids):
        raise ValueError(
            f"ids must be {len(documents):,} different ones, one for each document; "
            f"got {len(ids):,}, of which {len(set(ids)):,} are different"
        )
    return name, list(ids)


def _codes(documents, compression: int) -> dict:
    """Number of sub-spaces and of codewords."""
    rows, width = documents.shape
    if compression not in range(1, 4 * width + 1):
        raise ValueError(
            f"compression is {compression!r}; allowed: whole numbers from 1 to "
            f"{4 * width}, the bytes of a vector"
        )
    codewords = recipes.default_codewords(rows)
    subspaces = num_subspaces(compression, tower_width=width, num_codewords=codewords)
    if width % subspaces:
        raise ValueError(
            f"compression {compression}x gives {subspaces} codes of a document, which "
            f"do not divide the width {width} of a vector"
        )
    return {"num_subspaces": subspaces, "num_codewords": codewords}


def _model(rows: int, maps: Metric, codes: dict, leaves: int, seed: int) -> JointIndex:
    leaves = leaves or recipes.default_leaves(rows)
    if leaves < 2 or rows < max(leaves, codes["num_codewords"]):
        raise ValueError(
            f"{rows} documents for {leaves} leaves and {codes['num_codewords']} "
            "codewords: there must be at least 2 leaves, and as many documents as each"
        )
    tree = {"kind": "per_node", "height": 1, "branching": leaves, "hidden": 256}
    return JointIndex(
        tower_width=maps.width, width=maps.width, head_hidden=0,
        tree=tree | {"scale": 20.0, "query_router": True}, **codes,
        rotation="learned", residual=True, score="cosine", rngs=nnx.Rngs(seed),
    )  # fmt: skip


def _training_data(documents, queries, maps: Metric, seed: int):
    """The training set, and its query table: `Rows` (rows, D)."""
    if queries is not None:
        queries = queries[:MOST_LABELLED]
    num_queries = 0 if queries is None else len(queries)
    labelled = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if num_queries:
        k = min(NEIGHBOURS, len(documents))
        nearest, _ = exact_neighbours(documents, queries, k, metric=maps.name)
        labelled = np.repeat(np.arange(num_queries), k), nearest.ravel()
    pairs, chosen = vector_pairs(
        documents, num_queries, labelled, metric=maps.name,
        rows=Counted(0, len(documents)), per_document=SYNTHETIC, seed=seed,
    )  # fmt: skip
    table = query_table(documents, queries, pairs, chosen, maps, seed=seed)
    return TrainingSet(len(table), len(documents), pairs), table


def _train(model, data, features, table, phase: Phase, seed: int, folder: Path):
    """Fit tree and codes to the documents, then train them: graphdef, parameters."""
    fit_starts(model, features, seed=seed, cache=folder / "starts")
    graphdef, params = split_model(model)
    tables = {
        "features_queries": table,
        "features_documents": features,
        "teacher_queries": table,
        "teacher_documents": features,
    }

    def mine(_, rows):
        return mine_from_teacher(
            features, table, data, per_query=phase.mined_kept, rows=rows
        )

    # The rows of large tables travel with the batch; the numbers are the same.
    large = sum(table.nbytes for table in tables.values()) > DEVICE_TABLES
    done = run_phase(
        graphdef, params, data, {} if large else tables, phase, run="fit", name="joint",
        seed=seed, directory=folder / "joint", log=MetricLog(folder / "metrics.jsonl"),
        mine=mine, host_tables=tables if large else None,
    )  # fmt: skip
    return graphdef, done["params"]
