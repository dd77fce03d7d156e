"""The one loss: every term of every method, each a weight in a config.

A step scores N queries against one pool of C candidate documents. Everything a loss
needs follows from that: raw scores, quantised scores, the leaves of both sides and the
teacher's scores. A term whose weight is 0 is not traced, so it costs nothing.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ehi.model.joint import JointIndex
from ehi.model.tree import assign
from ehi.train import losses, tree_losses
from ehi.train.step_search import score_rows, search_codes

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
      batch: see `ehi.train.batch.make_batch`.
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


# MERGED ehi_train_terms: The terms of the objective: which loss, of what, under which
# name.
#
# Each function returns the terms that have a weight, name -> scalar. `contrast` has the
# target, the mask and the weights of the batch, `teacher` the teacher's scores (N, C).
#


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
        terms["anchor"] = losses.anchor(d, origin)
    if "query_anchor" in weights:
        origin = _origin(tables, batch, "queries", q)
        terms["query_anchor"] = losses.anchor(q, origin)
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
    terms["codebook"] = losses.codebook_distortion(z, z_hat)
    if "commitment" in weights:
        terms["commitment"] = losses.commitment_distortion(z, z_hat)
    if "reconstruction" in weights:
        terms["reconstruction"] = losses.codebook_distortion(d, d_plain)
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
