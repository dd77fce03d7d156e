"""A tiny corpus with structure: 60 documents around 8 centres, queries near them."""

import numpy as np
from flax import nnx

from ehi.model.joint import JointIndex
from ehi.model.params import split_model
from ehi.model.tower import Tower
from ehi.train.batch import TrainingSet
from ehi.train.phase import Phase
from ehi.train.starts import fit_starts

WIDTH, NUM_DOCUMENTS, NUM_QUERIES = 16, 60, 40


class Tokens:
    """What the loop needs of a `TokenArray`."""

    def __init__(self, rows, seed):
        rng = np.random.default_rng(seed)
        self.ids = rng.integers(3, 50, (rows, 12)).astype(np.int32)
        self.lengths = rng.integers(3, 9, rows)
        self.key = f"{rows}-{seed}"

    def __len__(self):
        return len(self.ids)

    def pad(self, rows, length):
        mask = np.arange(length) < self.lengths[rows][:, None]
        return np.where(mask, self.ids[rows, :length], 0).astype(np.int32), mask


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def make_tiny():
    """A TrainingSet, cached features of both sides, and a teacher."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, WIDTH))
    documents = unit(
        centres[np.arange(NUM_DOCUMENTS) % 8]
        + 0.4 * rng.normal(size=(NUM_DOCUMENTS, WIDTH))
    )
    asked = rng.integers(NUM_DOCUMENTS, size=NUM_QUERIES)
    queries = unit(documents[asked] + 0.2 * rng.normal(size=(NUM_QUERIES, WIDTH)))
    # The first query has two positives.
    pairs = {
        "labelled": (
            np.concatenate([[0], np.arange(NUM_QUERIES)]),
            np.concatenate([[(asked[0] + 1) % NUM_DOCUMENTS], asked]),
        ),
        "documents": (
            NUM_QUERIES + np.arange(NUM_DOCUMENTS),
            np.arange(NUM_DOCUMENTS),
        ),
    }
    rows = NUM_QUERIES + NUM_DOCUMENTS
    data = TrainingSet(rows, NUM_DOCUMENTS, pairs, Tokens(rows, 1), Tokens(60, 2))
    both = np.concatenate([queries, documents])
    tables = {
        "features_queries": both,
        "features_documents": documents,
        "teacher_queries": both,
        "teacher_documents": documents,
    }
    return data, tables


def phase_of(**fields) -> Phase:
    """A phase for the tiny corpus, with constant rates but for the decay."""
    return Phase(**{
        "steps": 50, "batch_size": 12, "pool": 20, "losses": {}, "rates": {},
        "sources": {"labelled": 0.75, "documents": 0.25},
        "warmup": 0, "weight_decay": 0.0,
    } | fields)  # fmt: skip


def make_model(tables, cache, *, tower=False, fitted=True, **options):
    """graphdef, params of a joint index, started from fits to the documents."""
    rngs = nnx.Rngs(0)
    encoder = None
    if tower:
        encoder = Tower(
            vocab_size=50, width=WIDTH, num_layers=2, num_heads=2, mlp_width=32,
            max_positions=12, type_vocab_size=2, rngs=rngs,
        )  # fmt: skip
    options = {
        "tower_width": WIDTH,
        "width": WIDTH,
        "head_hidden": 8,
        "query_head": True,
        "tree": {
            "kind": "per_node", "height": 1, "branching": 4, "hidden": 6,
            "query_router": True,
        },
        "num_subspaces": 4,
        "num_codewords": 16,
        "rotation": "learned",
        "residual": True,
    } | options  # fmt: skip
    model = JointIndex(tower=encoder, rngs=rngs, **options)
    if fitted:
        documents = tables["features_documents"]
        fit_starts(model, documents, seed=0, cache=cache)
    return split_model(model)
