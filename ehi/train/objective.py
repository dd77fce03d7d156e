"""The one loss: the weighted sum of the terms of all methods.

A step scores N queries against one pool of C candidate documents. Every term follows
from that: from the scores of the embeddings and of the quantised documents, from the
leaves of both sides, and from a teacher's scores. A term of weight 0 is not traced, so
it costs nothing.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ehi.model.joint import JointIndex
from ehi.model.score import score_quantised
from ehi.model.tree import assign
from ehi.train import losses, tree_losses
from ehi.train.batch import side_of
from ehi.train.phase import (
    LEAF_TERMS,
    POOL_LEAF_TERMS,
    TEACHER_TERMS,
    TREE_TERMS,
    Phase,
)
from ehi.train.step_search import score_rows, search_codes


def objective(
    model: JointIndex,
    tables: Mapping[str, jax.Array],
    batch: Mapping[str, jax.Array],
    phase: Phase,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, dict]:
    """The weighted sum of the terms, and what the step logs and counts.

    Args:
      model: the joint index.
      tables: arrays that the batch's row numbers point into. `features_queries (rows,
        T)` and `features_documents (rows, T)` when the tower is frozen, or for the
        anchors; `cached_queries (rows, T)` and `cached_documents (rows, T)` when only a
        part of the batch has tokens; `teacher_queries (rows, D)` and
        `teacher_documents (rows, D)` for the distillation terms; `codes (documents, M)`
        uint8 for `lambda_rank`; `leaves (documents, s)` where they are not those of the
        router, for `leaf_likelihood`. A table that is too large for a device is not
        here: its rows are in the batch, under its name. `codes` are always here.
      batch: from `ehi.train.batch.make_batch`.
      phase: weights of the terms, temperatures, margins.
      mesh: devices that share the search of the code table; None for one device.

    Returns:
      loss (), and a dict: `terms`, name -> (); `d` (C, D), embeddings of the pool's
      documents; `codes` (C, M) and `z` (C, D), their codes and the vectors that were
      quantised; `leaf_counts` (P,), documents of the pool in each leaf. The last three
      are None where the model has no such part.
    """
    weights = weights_for(model, phase.losses)
    q = _embed(model.embed_queries, tables, batch, "queries", phase.chunk)  # (N, D)
    d = _embed(model.embed_documents, tables, batch, "documents", phase.chunk)  # (C, D)
    teacher = _teacher_scores(tables, batch, weights)  # (N, C)
    terms = raw_terms(weights, phase, tables, batch, q, d, teacher)
    log_pd = leaf_counts = codes = z = None
    if model.router is not None:
        log_pq, log_pd = model.route_queries(q), model.route_documents(d)  # (., P)
        batch = {**batch, "leaves": _leaves_of(tables, batch, log_pd)}  # (C, s)
        terms |= path_terms(weights, phase, batch, model, q, d, log_pq, log_pd)
        terms |= leaf_terms(weights, phase, log_pq, log_pd, teacher)
        leaf_counts = jnp.bincount(log_pd.argmax(-1), length=log_pd.shape[1])  # (P,)
    if any(name in weights for name in POOL_LEAF_TERMS):
        quantised = model.quantise(d, log_pd, phase.balanced_codes)
        score = phase.score or model.score
        scores = score_quantised(q, quantised[0], d, score)  # (N, C)
        terms |= code_terms(weights, phase, batch, scores, d, quantised, teacher)
        _, z, _, _, codes = quantised
    if "lambda_rank" in weights:
        terms["lambda_rank"] = lambda_rank_term(
            phase, batch, model, q, tables["codes"], mesh
        )
    loss = sum(weight * terms[name] for name, weight in weights.items())
    found = {"d": d, "codes": codes, "z": z, "leaf_counts": leaf_counts}
    return loss, {"terms": terms} | found


def weights_for(model: JointIndex, weights: Mapping[str, float]) -> dict[str, float]:
    """The weights above 0 of terms that apply: no tree terms without a tree, ..."""
    absent = (() if model.router is not None else TREE_TERMS) + (
        () if model.quantiser is not None else LEAF_TERMS
    )
    return {n: float(w) for n, w in weights.items() if w and n not in absent}


def _embed(embed, tables, batch, side: str, chunk: int):
    """Embeddings of one side of the batch: first rows with tokens, then cached rows."""
    rows, name = batch[side], f"{side}_ids"
    if name not in batch:
        return embed(_rows(tables, batch, f"features_{side}"))
    read = embed((batch[name], batch[f"{side}_mask"]), chunk)
    if len(read) == len(rows):
        return read
    cached = embed(_rows(tables, batch, f"cached_{side}", skip=len(read)))
    return jnp.concatenate([read, cached])


def _rows(tables, batch, name: str, skip: int = 0):
    """Rows of a table: those that came with the batch, or gathered from the device."""
    if name in batch:
        return batch[name]
    return tables[name][batch[side_of(name)][skip:]]


def _teacher_scores(tables, batch, weights):
    """Scores (N, C) by the frozen teacher; None if no term compares with them."""
    if not any(name in weights for name in TEACHER_TERMS):
        return None
    queries = _rows(tables, batch, "teacher_queries")  # (N, D)
    return queries @ _rows(tables, batch, "teacher_documents").T


def _leaves_of(tables, batch, log_pd):
    """The leaves of the pool's documents (C, s): given ones, or the best by itself."""
    if "leaves" in tables or "leaves" in batch:
        return _rows(tables, batch, "leaves")
    return assign(jax.lax.stop_gradient(log_pd))[:, None]


# The functions below return the terms that have a weight, name -> scalar.


def raw_terms(weights, phase: Phase, tables, batch, q, d, teacher) -> dict:
    """Terms of the embeddings q (N, D) and d (C, D)."""
    scores = q @ d.T  # (N, C)
    names = ("semantic", "distill_raw")
    terms = _ranking_terms(weights, phase, batch, scores, names, teacher)
    if "semantic_hinge" in weights:
        terms["semantic_hinge"] = losses.hinge_contrastive(
            scores, margin=phase.margin, **_contrast(batch)
        )
    if "anchor" in weights:
        origin = _tower_outputs(tables, batch, "documents", d)
        terms["anchor"] = losses.anchor(d, origin)
    if "query_anchor" in weights:
        origin = _tower_outputs(tables, batch, "queries", q)
        terms["query_anchor"] = losses.anchor(q, origin)
    return terms


def path_terms(weights, phase: Phase, batch, model, q, d, log_pq, log_pd) -> dict:
    """Terms that let a query and its documents take the same path down the tree."""
    terms, target, rows = {}, batch["target"], {"weights": batch["weights"]}
    if "path" in weights:
        terms["path"] = tree_losses.path_agreement(log_pq, log_pd[target], **rows)
    if "leaf_likelihood" in weights:
        terms["leaf_likelihood"] = tree_losses.leaf_likelihood(
            log_pq, batch["leaves"][target], **rows
        )
    if "path_hinge" in weights or "intra_leaf" in weights:
        query_router = model.query_router or model.router
        path_q, path_d = query_router.path_embedding(q), model.router.path_embedding(d)
    if "path_hinge" in weights:
        terms["path_hinge"] = losses.hinge_contrastive(
            path_q @ path_d.T, margin=phase.margin, **_contrast(batch)
        )
    if "intra_leaf" in weights:
        terms["intra_leaf"] = tree_losses.intra_leaf(
            d @ d.T, path_d @ path_d.T, threshold=phase.intra_leaf_threshold
        )
    return terms


def leaf_terms(weights, phase: Phase, log_pq, log_pd, teacher) -> dict:
    """Terms of the leaf distributions of both sides, log_pq (N, P), log_pd (C, P)."""
    terms = {}
    if "route_distill" in weights:
        terms["route_distill"] = tree_losses.route_distillation(
            teacher, log_pd, log_pq, teacher_temperature=phase.teacher_temperature
        )
    if "balance" in weights:
        terms["balance"] = tree_losses.load_balance(jnp.exp(log_pd))
    if "entropy" in weights:
        terms["entropy"] = tree_losses.leaf_entropy(log_pd)
    return terms


def code_terms(weights, phase: Phase, batch, scores, d, quantised, teacher) -> dict:
    """Terms of the quantised pool: its scores (N, C), and what `quantise` returned."""
    _, z, z_hat, d_plain, _ = quantised
    if phase.hardest:
        where = losses.hardest_negatives(
            scores, batch["target"], batch["where"], count=phase.hardest
        )
        batch = {**batch, "where": where}
    names = ("quantised", "distill")
    terms = _ranking_terms(weights, phase, batch, scores, names, teacher)
    # Reported whatever its weight: it shows whether the codewords still fit.
    terms["codebook"] = losses.codebook_distortion(z, z_hat)
    if "commitment" in weights:
        terms["commitment"] = losses.commitment_distortion(z, z_hat)
    if "reconstruction" in weights:
        terms["reconstruction"] = losses.codebook_distortion(d, d_plain)
    return terms


def lambda_rank_term(phase: Phase, batch, model: JointIndex, q, codes, mesh=None):
    """JPQ: re-rank what the current codebooks retrieve from the whole code table.

    The negatives are the first `top_k` documents of the index as it is at this step.
    Positives that are not among them are appended with a rank beyond the cut.

    Raises:
      ValueError: the score is 'corrected'. The table holds codes and no embeddings, and
        another score in its place would not be the one that was asked for.
    """
    rotation = None if model.rotation is None else model.rotation.matrix()  # (D, D)
    q = q if rotation is None else q @ rotation
    codebooks = model.quantiser.codebooks[...]  # (M, K, S)
    top_k = min(phase.top_k, len(codes))
    how = {"score": phase.score or model.score}
    _, found = search_codes(q, codebooks, codes, k=top_k, mesh=mesh, **how)  # (N, k)
    known = batch["positives"]  # (N, A), padded with -1
    # A positive that was retrieved is in `found` already.
    twice = (known[:, :, None] == found[:, None]).any(-1)  # (N, A)
    rows = jnp.concatenate([found, known], 1)  # (N, k + A)
    where = jnp.concatenate([jnp.ones_like(found, bool), (known >= 0) & ~twice], 1)
    relevant = (rows[:, :, None] == known[:, None]).any(-1) & (rows >= 0)
    ranks = jnp.broadcast_to(1 + jnp.arange(rows.shape[1]), rows.shape)
    beyond = phase.lambda_cut + top_k + 1
    ranks = jnp.where(jnp.arange(rows.shape[1]) < top_k, ranks, beyond)
    scores = score_rows(q, codebooks, codes, rows, **how)  # (N, k + A)
    scores = scores / phase.temperature
    return losses.lambda_rank(
        scores, ranks, relevant, where,
        cut=phase.lambda_cut, weights=batch["weights"],
    )  # fmt: skip


def _ranking_terms(weights, phase: Phase, batch, scores, names, teacher) -> dict:
    """A contrastive and a distillation term, called `names`, of scores (N, C)."""
    contrastive, distilled = names
    terms = {}
    if contrastive in weights:
        terms[contrastive] = losses.softmax_contrastive(
            scores, temperature=phase.temperature, **_contrast(batch)
        )
    if distilled in weights:
        terms[distilled] = losses.distillation(
            teacher,
            scores,
            temperature=phase.temperature,
            teacher_temperature=phase.teacher_temperature,
        )
    return terms


def _contrast(batch) -> dict:
    """Arguments of the contrastive losses."""
    return {name: batch[name] for name in ("target", "where", "weights")}


def _tower_outputs(tables, batch, side: str, embeddings):
    """Outputs of the frozen tower for one side, which an anchor compares with."""
    outputs = _rows(tables, batch, f"features_{side}")
    if outputs.shape != embeddings.shape:
        raise ValueError(
            f"an anchor of {side} needs a head as wide as the tower: embeddings "
            f"{embeddings.shape}, tower outputs {outputs.shape}"
        )
    return outputs
