"""The one loss: every term of every method, each a weight in a config.

A step scores N queries against one pool of C candidate documents. Everything a loss
needs follows from that: raw scores, quantised scores, the leaves of both sides and the
teacher's scores. A term whose weight is 0 is not traced, so it costs nothing.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ehi.model.joint import JointIndex
from ehi.train import losses

# Terms by what they need. The order is the order of the flow.
RAW_TERMS = ("semantic", "semantic_hinge", "distill_raw", "anchor")
TREE_TERMS = (
    "path",
    "path_hinge",
    "route_distill",
    "intra_leaf",
    "balance",
    "entropy",
)
LEAF_TERMS = ("quantised", "distill", "codebook", "commitment")
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
    chunk: int = 0,
):
    """The weighted sum of the terms, and what the step logs and counts.

    Args:
      model: the joint index.
      tables: `features_queries (rows, T)`, `features_documents (rows, T)` when the
        tower is frozen; `teacher_queries (rows, D)`, `teacher_documents (rows, D)` for
        the distillation terms.
      batch: see `ehi.train.pool.make_batch`.
      weights: term -> weight > 0, as `weights_for` gives them.
      temperature: of the student's softmaxes over scores (cosines).
      teacher_temperature: of the teacher's.
      margin: gamma of the hinge losses.
      intra_leaf_threshold: documents more alike than this may share a path.
      chunk: rows a forward of the tower holds activations for; 0 for all.

    Returns:
      loss (), and a dict of `terms`, `codes` (C, M), `z` (C, D), the vectors that were
      quantised, and `leaf_counts` (P,), documents of the pool in each leaf; None where
      the model has no such part.
    """
    q = model.embed_queries(_inputs(tables, batch, "queries"), chunk)  # (N, D)
    d = model.embed_documents(_inputs(tables, batch, "documents"), chunk)  # (C, D)
    options = {
        "contrast": {name: batch[name] for name in ("target", "where", "weights")},
        "teacher": _teacher_scores(tables, batch, weights),
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "margin": margin,
        "threshold": intra_leaf_threshold,
    }
    raw = q @ d.T  # (N, C)
    terms = _ranking_terms(weights, raw, ("semantic", "distill_raw"), **options)
    if "semantic_hinge" in weights:
        terms["semantic_hinge"] = losses.hinge_contrastive(
            raw, margin=margin, **options["contrast"]
        )
    if "anchor" in weights:
        terms["anchor"] = losses.anchor(d, _origin(tables, batch, d))
    log_pd = leaf_counts = codes = z = None
    if model.router is not None:
        log_pq, log_pd = model.route_queries(q), model.route_documents(d)  # (., P)
        terms |= _tree_terms(weights, model, q, d, log_pq, log_pd, **options)
        leaf_counts = jnp.bincount(log_pd.argmax(-1), length=log_pd.shape[1])  # (P,)
    if model.quantiser is not None:
        d_hat, z, z_hat, codes = model.quantise(d, log_pd)
        quantised = q @ d_hat.T  # (N, C)
        terms |= _ranking_terms(weights, quantised, ("quantised", "distill"), **options)
        # Always reported: the distortion is how one sees that codewords still fit.
        terms["codebook"] = losses.codebook_distortion(z, z_hat)
        if "commitment" in weights:
            terms["commitment"] = losses.commitment_distortion(z, z_hat)
    loss = sum(weight * terms[name] for name, weight in weights.items())
    return loss, {"terms": terms, "codes": codes, "z": z, "leaf_counts": leaf_counts}


def _teacher_scores(tables, batch, weights):
    """Scores (N, C) by the frozen teacher, if a term compares with them."""
    if not any(name in weights for name in TEACHER_TERMS):
        return None
    queries = tables["teacher_queries"][batch["queries"]]  # (N, D)
    return queries @ tables["teacher_documents"][batch["documents"]].T


def _ranking_terms(
    weights, scores, names, *, contrast, teacher, temperature, teacher_temperature, **_
):
    """Contrastive and distillation terms, by their `names`, of scores (N, C)."""
    contrastive, distilled = names
    terms = {}
    if contrastive in weights:
        terms[contrastive] = losses.softmax_contrastive(
            scores, temperature=temperature, **contrast
        )
    if distilled in weights:
        terms[distilled] = losses.distillation(
            teacher,
            scores,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
        )
    return terms


def _tree_terms(
    weights, model, q, d, log_pq, log_pd,
    *, contrast, teacher, teacher_temperature, margin, threshold, **_,
):  # fmt: skip
    """Terms of the leaves of both sides, log_pq (N, P) and log_pd (C, P)."""
    terms = {}
    if "path" in weights:
        terms["path"] = losses.path_agreement(
            log_pq, log_pd[contrast["target"]], weights=contrast["weights"]
        )
    if "path_hinge" in weights or "intra_leaf" in weights:
        query_router = model.query_router or model.router
        path_q, path_d = query_router.path_embedding(q), model.router.path_embedding(d)
    if "path_hinge" in weights:
        terms["path_hinge"] = losses.hinge_contrastive(
            path_q @ path_d.T, margin=margin, **contrast
        )
    if "intra_leaf" in weights:
        terms["intra_leaf"] = losses.intra_leaf(
            d @ d.T, path_d @ path_d.T, threshold=threshold
        )
    if "route_distill" in weights:
        terms["route_distill"] = losses.route_distillation(
            teacher,
            log_pd,
            log_pq,
            teacher_temperature=teacher_temperature,
            document_gradient=True,  # documents move to where queries look for them
        )
    if "balance" in weights:
        terms["balance"] = losses.load_balance(jnp.exp(log_pd))
    if "entropy" in weights:
        terms["entropy"] = losses.leaf_entropy(log_pd)
    return terms


def _origin(tables, batch, d):
    """The frozen tower's own embeddings of the pool, which a head as wide may keep."""
    origin = tables["features_documents"][batch["documents"]]
    if origin.shape != d.shape:
        raise ValueError(
            f"loss 'anchor' needs a head as wide as the tower: embeddings {d.shape}, "
            f"tower outputs {origin.shape}"
        )
    return origin


def _inputs(tables, batch, side: str):
    """Token arrays of the batch, or the cached tower outputs of its rows."""
    if f"{side}_ids" in batch:
        return batch[f"{side}_ids"], batch[f"{side}_mask"]
    return tables[f"features_{side}"][batch[side]]
