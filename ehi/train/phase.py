"""What one phase of training is: lengths, data, losses and rates, checked at once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ehi.model.joint import GROUPS
from ehi.train.objective import TEACHER_TERMS, check_weights
from ehi.train.optimizer import DECAYS

SOURCES = ("labelled", "pseudo", "documents", "synthetic")
# What the fields of a phase may be: the least value, and the words.
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
        "buffer",
        "encoded",
    ),
}
ALLOWED = {
    "negatives": ("leaves", "teacher"),
    "start": ("", "buffer"),
    "decay": DECAYS,
}


@dataclass(frozen=True)
class Phase:
    """One phase; the loop compiles one step for it.

    Attributes:
      steps, batch_size, pool: length; N queries a step; C candidate documents
        (the whole corpus if it is no larger).
      losses: term of `ehi.train.objective.TERMS` -> weight.
      rates: parameter group -> peak learning rate; absent or 0 is frozen.
      sources: share of a batch that is 'labelled' pairs, 'pseudo' queries,
        'documents' asked for by themselves, and 'synthetic' queries (documents moved
        as labelled queries lie from theirs).
      source_weights: weight of a source's rows in the contrastive terms.
      temperature, teacher_temperature: softmax temperatures of student and teacher.
      margin, intra_leaf_threshold: gamma and tau of the EHI losses.
      warmup, decay, weight_decay, clip: see `make_optimizer`.
      refresh: steps between minings of hard negatives from the leaves.
      mined_per_query, mined_kept, mined_beam: documents that are mined for each query
        and enter the pool, 0 for none; out of how many kept; from how many visited
        leaves.
      revive_every: steps between revivals of dead codewords; 0 for never.
      chunk: rows per forward of a trained tower (gradient caching); 0 for all.
      last_n: train only the last n layers of the tower; 0 for all.
      negatives: mined from the 'leaves' that a query visits (EHI), or the 'teacher's
        own nearest documents (Distill-VQ), once, as these do not change.
      lambda_cut, top_k: of the `lambda_rank` term (JPQ).
      sinkhorn, sinkhorn_epsilon: iterations and temperature of balanced codes
        (RepCONC); 0 iterations for the nearest codewords.
      buffer: document embeddings kept for a later phase to start from (Poeem).
      encoded: where the tower trains, queries of a batch and documents of its pool that
        a step encodes; the others are taken as the tower gave them before the phase,
        a memory as of Wang et al. (2020, arXiv 1912.06798) of all rows. 0 encodes all.
      start: '' to go on, 'buffer' to fit tree and leaves to the kept embeddings first.
      log_every, checkpoint_every: steps.
    """

    steps: int
    batch_size: int
    pool: int
    losses: Mapping[str, float]
    rates: Mapping[str, float]
    sources: Mapping[str, float]
    source_weights: Mapping[str, float]
    temperature: float = 0.05
    teacher_temperature: float = 0.05
    margin: float = 0.3
    intra_leaf_threshold: float = 0.9
    warmup: int = 0
    decay: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    refresh: int = 0
    mined_per_query: int = 0
    mined_kept: int = 32
    mined_beam: int = 4
    revive_every: int = 0
    chunk: int = 0
    last_n: int = 0
    negatives: str = "leaves"
    lambda_cut: int = 200
    top_k: int = 200
    sinkhorn: int = 0
    sinkhorn_epsilon: float = 0.003
    buffer: int = 0
    encoded: int = 0
    start: str = ""
    log_every: int = 20
    checkpoint_every: int = 100

    def __post_init__(self):
        check_weights(self.losses)
        for least, names in LEAST.items():
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}; must be at least {least}"
                    )
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: "
                    f"{', '.join(map(repr, allowed))}"
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
        for field in ("rates", "sources", "source_weights"):
            for name, value in getattr(self, field).items():
                if not value >= 0:
                    raise ValueError(f"{field}.{name} is {value}; must be at least 0")
        if self.mined_per_query and self.negatives == "leaves" and not self.refresh:
            raise ValueError("mined_per_query needs refresh > 0, or nothing is mined")

    @property
    def mining_interval(self) -> int:
        """Steps between minings of documents for the pool; 0 where none are mined."""
        if not self.mined_per_query:
            return 0
        return self.steps if self.negatives == "teacher" else self.refresh

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with a frozen teacher's scores."""
        return any(self.losses.get(name) for name in TEACHER_TERMS)

    @property
    def needs_codes(self) -> bool:
        """Whether a term searches the code table of the whole corpus."""
        return bool(self.losses.get("lambda_rank"))

    @property
    def objective_options(self) -> dict:
        """What the step hands on to the objective."""
        names = ("temperature", "teacher_temperature", "margin")
        names += ("intra_leaf_threshold", "lambda_cut", "top_k", "chunk")
        balance = {"epsilon": self.sinkhorn_epsilon, "iterations": self.sinkhorn}
        return {name: getattr(self, name) for name in names} | {
            "balance": balance if self.sinkhorn else None
        }

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
