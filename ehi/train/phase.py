"""One phase of training: its length, data, losses and rates, and their checks.

This file is the only one that states the default of an option of training.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from ehi.model.joint import GROUPS
from ehi.model.score import SCORES

SOURCES = ("labelled", "pseudo", "documents", "synthetic")
DECAYS = ("cosine", "linear", "constant")
# Names of the loss terms, by the part of the model that they need.
RAW_TERMS = (
    "semantic",
    "semantic_hinge",
    "distill_raw",
    "anchor",
    "query_anchor",
)
TREE_TERMS = (
    "path",
    "path_hinge",
    "leaf_likelihood",
    "route_distill",
    "intra_leaf",
    "balance",
    "entropy",
)
# These quantise the documents of the pool; `lambda_rank` searches the whole code table.
POOL_LEAF_TERMS = (
    "quantised",
    "distill",
    "codebook",
    "commitment",
    "reconstruction",
)
LEAF_TERMS = (*POOL_LEAF_TERMS, "lambda_rank")
TERMS = RAW_TERMS + TREE_TERMS + LEAF_TERMS
# These compare with the scores of a frozen teacher.
TEACHER_TERMS = (
    "distill_raw",
    "route_distill",
    "distill",
)

# Least value -> the fields that it holds for.
LEAST = {
    1: (
        "batch_size",
        "pool",
        "log_every",
        "checkpoint_every",
        "lambda_cut",
        "top_k",
        "mined_kept",
        "mined_beam",
    ),
    0: (
        "steps",
        "warmup",
        "weight_decay",
        "clip",
        "refresh",
        "mined_per_query",
        "revive_every",
        "chunk",
        "last_n",
        "sinkhorn",
        "hardest",
        "buffer",
        "encoded",
    ),
}
ALLOWED = {
    "negatives": ("leaves", "teacher", "given"),
    "start": ("", "buffer", "reassign", "freeze"),
    "decay": DECAYS,
    "score": ("", *SCORES),
}


@dataclass(frozen=True)
class Phase:
    """One phase of training. The loop compiles one step for it.

    `ehi.train.recipes` has the phases of every method.

    Attributes:
      steps: length of the phase.
      batch_size: N, queries in a step.
      losses: name of a term, of `TERMS`, -> its weight.
      rates: parameter group, of `ehi.model.joint.GROUPS`, -> peak learning rate. A
        group that is absent or has rate 0 is frozen.
      sources: source, of `SOURCES`, -> its share of a batch. 'labelled' are pairs from
        the data set, 'pseudo' are queries made from documents, 'documents' ask for
        themselves, 'synthetic' are documents moved as queries lie from their documents.
      source_weights: source -> weight of its rows in the contrastive terms; 1 if
        absent.
      pool: C, candidate documents of a step; the whole corpus if it is no larger.
      temperature: of the student's softmaxes over scores.
      teacher_temperature: of the teacher's softmaxes.
      margin: gamma of the hinge losses (EHI).
      intra_leaf_threshold: tau of the `intra_leaf` loss (EHI).
      warmup: steps of linear warm-up.
      decay: of the learning rates after it: 'cosine', 'linear' (both to 0 at the end)
        or 'constant'.
      weight_decay: decoupled weight decay of a tower's matrices.
      clip: largest gradient norm of a tower; 0 for no limit.
      refresh: steps between two minings of hard negatives from the leaves.
      mined_per_query: mined documents that enter the pool for each query; 0 for none.
      mined_kept: mined documents that are kept for each query, to draw from. With
        `start` 'reassign', the teacher's best documents that count.
      mined_beam: leaves that a query visits when negatives are mined, or when documents
        are reassigned.
      negatives: 'leaves' mines from the leaves that a query visits (EHI); 'teacher'
        mines the teacher's nearest documents, once (Distill-VQ, RepCONC); 'given' takes
        those that come with the data set, its triples and the documents that a teacher
        scored (see `ehi.data.candidates`).
      hardest: negatives of each query that count in the loss `quantised`: those of the
        pool with the highest scores at this step (RepCONC); 0 for all.
      score: of quantised documents in `quantised`, `distill` and `lambda_rank`, one of
        `ehi.model.score.SCORES`; '' is that of the index. Poeem trains with cosines and
        serves by L2.
      buffer: document embeddings that are kept for the next phase (Poeem).
      start: what happens before the first step. 'buffer' fits tree and leaves to the
        kept embeddings (Poeem); 'reassign' moves documents to the leaves where queries
        look for them (JTR); 'freeze' gives queries a head of their own, and documents
        keep their codes from then on (JPQ after RepCONC); '' nothing.
      log_every: steps between two lines of the log.
      checkpoint_every: steps between two checkpoints.

    Raises:
      ValueError: a field has a value or a name that is not allowed.
    """

    steps: int
    batch_size: int
    losses: Mapping[str, float]
    rates: Mapping[str, float]
    sources: Mapping[str, float]
    source_weights: Mapping[str, float] = field(default_factory=dict)
    pool: int = 1024  # as good on dev splits as the whole corpus
    temperature: float = 0.05
    teacher_temperature: float = 0.05
    margin: float = 0.3
    intra_leaf_threshold: float = 0.9
    warmup: int = 20
    decay: str = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    refresh: int = 0
    mined_per_query: int = 0
    mined_kept: int = 32
    mined_beam: int = 4
    negatives: str = "leaves"
    revive_every: int = 0
    chunk: int = 0
    last_n: int = 0
    encoded: int = 0
    lambda_cut: int = 200
    top_k: int = 200
    sinkhorn: int = 0
    sinkhorn_epsilon: float = 0.003
    hardest: int = 0
    score: str = ""
    buffer: int = 0
    start: str = ""
    log_every: int = 20
    checkpoint_every: int = 100

    def __post_init__(self):
        self._check_names()
        self._check_values()

    def _check_names(self):
        for name, weight in self.losses.items():
            if name not in TERMS:
                raise ValueError(f"unknown loss {name!r}; allowed: {', '.join(TERMS)}")
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"the weight of loss {name!r} is {weight}; must be >= 0, and finite"
                )
        for name in (*self.sources, *self.source_weights):
            if name not in SOURCES:
                raise ValueError(
                    f"unknown source {name!r}; allowed: {', '.join(SOURCES)}"
                )
        for group in self.rates:
            if group not in GROUPS:
                raise ValueError(
                    f"unknown group {group!r} in rates; allowed: {', '.join(GROUPS)}"
                )
        for section in ("rates", "sources", "source_weights"):
            for name, value in getattr(self, section).items():
                if not 0 <= value < math.inf:
                    raise ValueError(
                        f"{section}.{name} is {value}; must be at least 0, and finite"
                    )
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: "
                    f"{', '.join(map(repr, allowed))}"
                )

    def _check_values(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type is int and not isinstance(value, int | np.integer):
                raise ValueError(f"{item.name} is {value!r}; must be a whole number")
            if item.type is float and not math.isfinite(value):
                raise ValueError(f"{item.name} is {value!r}; must be finite")
        for least, names in LEAST.items():
            for name in names:
                if not getattr(self, name) >= least:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}; must be at least {least}"
                    )
        for name in ("temperature", "teacher_temperature", "sinkhorn_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; must be above 0")
        if self.pool < self.batch_size:
            raise ValueError(
                f"pool={self.pool} cannot hold the positives of batch_size="
                f"{self.batch_size} queries; make it at least as large"
            )
        if self.encoded > self.batch_size:
            raise ValueError(
                f"encoded is {self.encoded}; must be at most batch_size="
                f"{self.batch_size}, or 0 for all"
            )
        if self.mined_per_query and self.negatives == "leaves" and not self.refresh:
            raise ValueError("mined_per_query needs refresh > 0, or nothing is mined")

    @property
    def mining_interval(self) -> int:
        """Steps between two minings of documents for the pool; 0 for no mining."""
        if not self.mined_per_query:
            return 0
        return self.refresh if self.negatives == "leaves" else self.steps

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with a frozen teacher's scores."""
        return any(self.losses.get(name) for name in TEACHER_TERMS)

    @property
    def needs_codes(self) -> bool:
        """Whether a term searches the code table of the whole corpus."""
        return bool(self.losses.get("lambda_rank"))

    @property
    def balanced_codes(self) -> dict | None:
        """Options of `JointIndex.quantise` for balanced codes, or None."""
        if not self.sinkhorn:
            return None
        return {"epsilon": self.sinkhorn_epsilon, "iterations": self.sinkhorn}

    @classmethod
    def from_mapping(cls, mapping: Mapping) -> "Phase":
        """A phase from a config section; an unknown field is an error."""
        known = [f.name for f in fields(cls)]
        for name in mapping:
            if name not in known:
                raise ValueError(
                    f"unknown field {name!r} of a phase; allowed: {', '.join(known)}"
                )
        return cls(**mapping)
