"""The terms of the objective: which loss, of what, under which name.

Each function returns the terms that have a weight, name -> scalar. `contrast` has the
target, the mask and the weights of the batch, `teacher` the teacher's scores (N, C).
"""

import jax
import jax.numpy as jnp

from ehi.model.tree import assign
from ehi.train import losses, tree_losses, vector_losses
from ehi.train.code_search import score_rows, search_codes


def raw_terms(weights, tables, batch, q, d, *, contrast, margin, **options):
    """Terms of the embeddings, q (N, D) and d (C, D)."""
    scores = q @ d.T  # (N, C)
    names = ("semantic", "distill_raw")
    terms = _ranking_terms(weights, scores, names, contrast=contrast, **options)
    if "semantic_hinge" in weights:
        terms["semantic_hinge"] = losses.hinge_contrastive(
            scores, margin=margin, **contrast
        )
    if "anchor" in weights:
        origin = _origin(tables, batch, "documents", d)
        terms["anchor"] = vector_losses.anchor(d, origin)
    if "query_anchor" in weights:
        origin = _origin(tables, batch, "queries", q)
        terms["query_anchor"] = vector_losses.anchor(q, origin)
    return terms


def tree_terms(
    weights, model, q, d, log_pq, log_pd,
    *, contrast, teacher, teacher_temperature, margin, threshold, **_,
):  # fmt: skip
    """Terms of the leaves of both sides, log_pq (N, P) and log_pd (C, P)."""
    terms = {}
    if "path" in weights:
        terms["path"] = tree_losses.path_agreement(
            log_pq, log_pd[contrast["target"]], weights=contrast["weights"]
        )
    if "leaf_likelihood" in weights:
        home = assign(jax.lax.stop_gradient(log_pd))[:, 0]  # (C,)
        terms["leaf_likelihood"] = tree_losses.leaf_likelihood(
            log_pq, home[contrast["target"]], weights=contrast["weights"]
        )
    if "path_hinge" in weights or "intra_leaf" in weights:
        query_router = model.query_router or model.router
        path_q, path_d = query_router.path_embedding(q), model.router.path_embedding(d)
    if "path_hinge" in weights:
        terms["path_hinge"] = losses.hinge_contrastive(
            path_q @ path_d.T, margin=margin, **contrast
        )
    if "intra_leaf" in weights:
        terms["intra_leaf"] = tree_losses.intra_leaf(
            d @ d.T, path_d @ path_d.T, threshold=threshold
        )
    if "route_distill" in weights:
        terms["route_distill"] = tree_losses.route_distillation(
            teacher,
            log_pd,
            log_pq,
            teacher_temperature=teacher_temperature,
            document_gradient=True,  # documents move to where queries look for them
        )
    if "balance" in weights:
        terms["balance"] = tree_losses.load_balance(jnp.exp(log_pd))
    if "entropy" in weights:
        terms["entropy"] = tree_losses.leaf_entropy(log_pd)
    return terms


def leaf_terms(weights, q, d, quantised, **options):
    """Terms of what the codes keep of d (C, D): see `JointIndex.quantise`."""
    d_hat, z, z_hat, d_plain, _ = quantised
    names = ("quantised", "distill")
    terms = _ranking_terms(weights, q @ d_hat.T, names, **options)
    # Always reported: the distortion is how one sees that codewords still fit.
    terms["codebook"] = vector_losses.codebook_distortion(z, z_hat)
    if "commitment" in weights:
        terms["commitment"] = vector_losses.commitment_distortion(z, z_hat)
    if "reconstruction" in weights:
        terms["reconstruction"] = vector_losses.codebook_distortion(d, d_plain)
    return terms


def lambda_rank_term(model, q, codes, batch, *, temperature, cut, top_k, mesh=None):
    """JPQ: what the current codebooks retrieve from the whole code table, re-ranked.

    The negatives are the first `top_k` documents of the index as it is at this step;
    positives that are not among them are appended, with a rank behind the cut.
    """
    rotation = None if model.rotation is None else model.rotation.matrix()  # (D, D)
    q = q if rotation is None else q @ rotation
    codebooks = model.quantiser.codebooks[...]  # (M, K, S)
    top_k = min(top_k, len(codes))
    _, found = search_codes(q, codebooks, codes, k=top_k, mesh=mesh)  # (N, k)
    known = batch["positives"]  # (N, A), padded with -1
    # A positive that was retrieved stands among the found already.
    twice = (known[:, :, None] == found[:, None]).any(-1)  # (N, A)
    rows = jnp.concatenate([found, known], 1)  # (N, k + A)
    where = jnp.concatenate([jnp.ones_like(found, bool), (known >= 0) & ~twice], 1)
    relevant = (rows[:, :, None] == known[:, None]).any(-1) & (rows >= 0)
    ranks = jnp.broadcast_to(1 + jnp.arange(rows.shape[1]), rows.shape)
    ranks = jnp.where(jnp.arange(rows.shape[1]) < top_k, ranks, cut + top_k + 1)
    scores = score_rows(q, codebooks, codes, rows) / temperature  # (N, k + A)
    return losses.lambda_rank(
        scores, ranks, relevant, where, cut=cut, weights=batch["weights"]
    )


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


def _origin(tables, batch, side: str, rows):
    """The frozen tower's own embeddings of a side, which a head as wide may keep."""
    origin = tables[f"features_{side}"][batch[side]]
    if origin.shape != rows.shape:
        raise ValueError(
            f"an anchor of {side} needs a head as wide as the tower: embeddings "
            f"{rows.shape}, tower outputs {origin.shape}"
        )
    return origin
