"""The one loss: every term of every method, each a weight in a config.

A step scores N queries against one pool of C candidate documents. Everything a loss
needs follows from that: raw scores, quantised scores, the leaves of both sides and the
teacher's scores. A term whose weight is 0 is not traced, so it costs nothing.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ehi.model.joint import JointIndex
from ehi.train.terms import lambda_rank_term, leaf_terms, raw_terms, tree_terms

# Terms by what they need. The order is the order of the flow.
RAW_TERMS = ("semantic", "semantic_hinge", "distill_raw", "anchor", "query_anchor")
TREE_TERMS = (
    "path",
    "path_hinge",
    "leaf_likelihood",
    "route_distill",
    "intra_leaf",
    "balance",
    "entropy",
)
# Of the pool's documents, which are quantised for them; `lambda_rank` asks the whole
# code table instead.
POOL_LEAF_TERMS = ("quantised", "distill", "codebook", "commitment", "reconstruction")
LEAF_TERMS = (*POOL_LEAF_TERMS, "lambda_rank")
TEACHER_TERMS = ("distill_raw", "route_distill", "distill")
TERMS = RAW_TERMS + TREE_TERMS + LEAF_TERMS


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse an unknown term or a negative weight."""
    for name, weight in weights.items():
        if name not in TERMS:
            raise ValueError(f"unknown loss {name!r}; allowed: {', '.join(TERMS)}")
        if not weight >= 0:
            raise ValueError(f"the weight of loss {name!r} is {weight}; must be >= 0")


def weights_for(model: JointIndex, weights: Mapping[str, float]) -> dict[str, float]:
    """The non-zero weights that apply to a model: no tree terms without a tree, ..."""
    check_weights(weights)
    absent = (() if model.router is not None else TREE_TERMS) + (
        () if model.quantiser is not None else LEAF_TERMS
    )
    return {n: float(w) for n, w in weights.items() if w and n not in absent}


def objective(
    model: JointIndex,
    tables: Mapping[str, jax.Array],
    batch: Mapping[str, jax.Array],
    *,
    weights: Mapping[str, float],
    temperature: float = 0.05,
    teacher_temperature: float = 0.05,
    margin: float = 0.3,
    intra_leaf_threshold: float = 0.9,
    lambda_cut: int = 200,
    top_k: int = 200,
    balance: Mapping | None = None,
    chunk: int = 0,
    mesh: jax.sharding.Mesh | None = None,
):
    """The weighted sum of the terms, and what the step logs and counts.

    Args:
      model: the joint index.
      tables: `features_queries (rows, T)`, `features_documents (rows, T)` when the
        tower is frozen, or for the anchors; `cached_queries (rows, T)`,
        `cached_documents (rows, T)` where a batch has tokens of some rows only, for the
        others; `teacher_queries (rows, D)`,
        `teacher_documents (rows, D)` for the distillation terms; `codes (documents, M)`
        uint8 for `lambda_rank`.
      batch: see `ehi.train.pool.make_batch`.
      weights: term -> weight > 0, as `weights_for` gives them.
      temperature: of the student's softmaxes over scores (cosines).
      teacher_temperature: of the teacher's.
      margin: gamma of the hinge losses.
      intra_leaf_threshold: documents more alike than this may share a path.
      lambda_cut, top_k: of `lambda_rank`: ranks behind the cut weigh nothing; documents
        retrieved for each query.
      balance: see `JointIndex.quantise`.
      chunk: rows a forward of the tower holds activations for; 0 for all.
      mesh: of the devices that share the search of the code table; None for one.

    Returns:
      loss (), and a dict of `terms`, `d` (C, D), `codes` (C, M), `z` (C, D), the
      vectors that were quantised, and `leaf_counts` (P,), documents of the pool in each
      leaf; None where the model has no such part.
    """
    q = _embed(model.embed_queries, tables, batch, "queries", chunk)  # (N, D)
    d = _embed(model.embed_documents, tables, batch, "documents", chunk)  # (C, D)
    options = {
        "contrast": {name: batch[name] for name in ("target", "where", "weights")},
        "teacher": _teacher_scores(tables, batch, weights),
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "margin": margin,
    }
    terms = raw_terms(weights, tables, batch, q, d, **options)
    log_pd = leaf_counts = codes = z = None
    if model.router is not None:
        log_pq, log_pd = model.route_queries(q), model.route_documents(d)  # (., P)
        terms |= tree_terms(
            weights, model, q, d, log_pq, log_pd,
            threshold=intra_leaf_threshold, **options,
        )  # fmt: skip
        leaf_counts = jnp.bincount(log_pd.argmax(-1), length=log_pd.shape[1])  # (P,)
    if any(name in weights for name in POOL_LEAF_TERMS):
        quantised = model.quantise(d, log_pd, balance)
        terms |= leaf_terms(weights, q, d, quantised, **options)
        _, z, _, _, codes = quantised
    if "lambda_rank" in weights:
        terms["lambda_rank"] = lambda_rank_term(
            model, q, tables["codes"], batch,
            temperature=temperature, cut=lambda_cut, top_k=top_k, mesh=mesh,
        )  # fmt: skip
    loss = sum(weight * terms[name] for name, weight in weights.items())
    found = {"d": d, "codes": codes, "z": z, "leaf_counts": leaf_counts}
    return loss, {"terms": terms} | found


def _teacher_scores(tables, batch, weights):
    """Scores (N, C) by the frozen teacher, if a term compares with them."""
    if not any(name in weights for name in TEACHER_TERMS):
        return None
    queries = tables["teacher_queries"][batch["queries"]]  # (N, D)
    return queries @ tables["teacher_documents"][batch["documents"]].T


def _embed(embed, tables, batch, side: str, chunk: int):
    """Embeddings of the batch: of its tokens, then of tower outputs of other rows."""
    rows, name = batch[side], f"{side}_ids"
    if name not in batch:
        return embed(tables[f"features_{side}"][rows])
    read = embed((batch[name], batch[f"{side}_mask"]), chunk)
    if len(read) == len(rows):
        return read
    cached = embed(tables[f"cached_{side}"][rows[len(read) :]])
    return jnp.concatenate([read, cached])
