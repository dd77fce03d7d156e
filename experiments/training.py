"""Train one system of a config: parent, starts, phases, embeddings."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ehi.index import build_index
from ehi.model.encoder import start_from_pca
from ehi.model.joint import JointIndex, split_model
from ehi.train import checkpoint
from ehi.train.embed import embed
from ehi.train.export import index_arrays
from ehi.train.inherit import fit_starts, inherit
from ehi.train.logs import MetricLog
from ehi.train.loop import run_phase
from ehi.train.negatives import mine_from_leaves
from ehi.train.phase import Phase
from experiments.inputs import Inputs, without_labels
from experiments.systems import config_of, get_system, is_trained, num_subspaces

LOG = logging.getLogger("ehi")


@dataclass(frozen=True)
class Trained:
    """A trained system: its parameters and what they make of the data.

    Attributes:
      run: name of the system and, for PQ leaves, its compression.
      params: 'group/.../name' -> array.
      documents, queries: embeddings (rows, D) of the corpus and of the query table.
      seconds: of training, the parent's and the fits' included.
    """

    run: str
    graphdef: nnx.GraphDef = field(repr=False)
    params: dict = field(repr=False)
    documents: np.ndarray = field(repr=False)
    queries: np.ndarray = field(repr=False)
    seconds: float


def run_name(name: str, compression: int | None) -> str:
    """'ehi-pq-64x' for a system with PQ leaves, else the system's name."""
    return name if compression is None else f"{name}-{compression}x"


def train_system(
    config, name: str, compression: int | None, inputs: Inputs, workdir: Path,
    log: MetricLog, trained: dict[str, Trained], source: Path | None = None,
) -> Trained:  # fmt: skip
    """Train a system, its ancestors first; whatever is complete is reused.

    Args:
      config: the base config.
      name, compression: which system, at which compression of its leaves.
      inputs: from `load_inputs`.
      workdir: checkpoints and fits are kept here.
      log: training metrics go here.
      trained: systems trained so far by run name; this one is added.
      source: workdir of a finished run whose parameters are taken, without training.

    Raises:
      FileNotFoundError: `source` has no finished parameters of this system.
    """
    run = run_name(name, compression)
    if run in trained:
        return trained[run]
    system, resolved = get_system(name), config_of(config, name)
    model = build_model(resolved, system, compression, inputs)
    final = (source or workdir) / "checkpoints" / run / "final"
    if checkpoint.latest_step(final) is not None:
        graphdef, params = split_model(model)
        saved = checkpoint.restore(final, {"params": params, "seconds": jnp.zeros(())})
        params, seconds = saved["params"], float(saved["seconds"])
    elif source is not None:
        raise FileNotFoundError(
            f"{source} holds no trained {run}; train it there first, or leave it out "
            "of --config.systems and --config.budgets"
        )
    else:
        parent = None
        if system.parent is not None:
            parent = train_system(
                config, system.parent, None, inputs, workdir, log, trained
            )
        graphdef, params, seconds = _start(resolved, model, inputs, parent, workdir)
        for phase in system.phases:
            params = _phase(
                resolved, phase, run, graphdef, params, inputs, parent, workdir, log
            )
            seconds += log.seconds(run, phase)
        done = {"params": params, "seconds": jnp.float32(seconds)}
        checkpoint.save(final, 0, done)
    documents, queries = _final_embeddings(graphdef, params, inputs, run, workdir)
    trained[run] = Trained(run, graphdef, params, documents, queries, seconds)
    return trained[run]


def build_model(config, system, compression: int | None, inputs: Inputs) -> JointIndex:
    """The module of a system, freshly initialised."""
    tower_width = inputs.pretrained.config["width"]
    trains_tower = config.tower.trainable != "head" and is_trained(system)
    tree = None
    if system.tree:
        tree = {
            "kind": config.tree.kind,
            "height": config.tree.height,
            "branching": config.tree.branching,
            # A per_level router has the paper's residual layers and no other.
            "hidden": config.tree.hidden if config.tree.kind == "per_node" else 0,
            "scale": config.tree.scale,
            "query_router": config.tree.query_router,
        }
        leaves = config.tree.branching**config.tree.height
        if leaves > len(inputs.dataset.documents):
            raise ValueError(
                f"tree.branching^tree.height = {leaves} leaves for "
                f"{len(inputs.dataset.documents)} documents; use at most as many"
            )
    codewords = config.leaves.num_codewords
    subspaces = 0
    if system.pq:
        subspaces = num_subspaces(
            compression, tower_width=tower_width, num_codewords=codewords
        )
    return JointIndex(
        tower_width=tower_width,
        width=config.head.width or tower_width,
        head_hidden=config.head.hidden,
        query_head=config.head.query_head,
        tower=inputs.tower if trains_tower else None,
        tree=tree,
        num_subspaces=subspaces,
        num_codewords=codewords,
        rotation=config.leaves.rotation if system.pq else "none",
        residual=bool(config.leaves.residual and system.pq and system.tree),
        rngs=nnx.Rngs(config.seed),
    )


def _start(config, model, inputs, parent, workdir):
    """Parameters before the first step: pretrained or inherited, fitted to data."""
    if parent is None:
        width = model.head.projection.shape[1]
        if width < inputs.pretrained.config["width"]:
            start = start_from_pca(inputs.document_features, width)
            model.head.projection[...] = start
        return *split_model(model), 0.0
    seconds = fit_starts(
        model, parent.documents, seed=config.seed, cache=workdir / "starts"
    )
    graphdef, params = split_model(model)
    return graphdef, inherit(params, parent.params), seconds + parent.seconds


def _phase(config, phase_name, run, graphdef, params, inputs, parent, workdir, log):
    """Run one phase, or return its end if it is complete."""
    phase = Phase.from_mapping(config[phase_name].to_dict())
    if phase_name == "dense" and without_labels(inputs):
        LOG.info("no train qrels: the pretrained encoder itself is the teacher")
        return params
    trains_tower = any(name.startswith("tower/") for name in params)
    tables = {}
    if not trains_tower:
        tables["features_queries"] = inputs.query_features
    if not trains_tower or phase.losses.get("anchor"):
        tables["features_documents"] = inputs.document_features
    if phase.needs_teacher:
        if parent is None:
            raise ValueError(f"{run}: distillation needs a parent system as teacher")
        tables["teacher_queries"] = parent.queries
        tables["teacher_documents"] = parent.documents
    mine = None
    if phase.refresh:

        def mine(params):
            documents, queries = _embeddings(graphdef, params, inputs)
            index = build_index(
                documents, np.arange(len(documents)), **index_arrays(graphdef, params)
            )
            return mine_from_leaves(
                index, queries, inputs.training,
                per_query=phase.mined_kept, beam=phase.mined_beam,
            )  # fmt: skip

    lengths = (config.tower.query_length, config.tower.document_length)
    return run_phase(
        graphdef, params, inputs.training, tables, phase,
        run=run, name=phase_name, seed=config.seed,
        directory=workdir / "checkpoints" / run / phase_name, log=log,
        lengths=lengths if trains_tower else (0, 0), mine=mine,
    )  # fmt: skip


def _embeddings(graphdef, params, inputs: Inputs):
    """Embeddings of the corpus and of the query table."""
    if any(name.startswith("tower/") for name in params):
        documents = embed(graphdef, params, "documents", inputs.document_tokens)
        queries = embed(graphdef, params, "queries", inputs.query_tokens)
        return documents, np.concatenate([queries, documents])
    documents = embed(graphdef, params, "documents", inputs.document_features)
    return documents, embed(graphdef, params, "queries", inputs.query_features)


def _final_embeddings(graphdef, params, inputs, run, workdir):
    """Embeddings by the trained parameters; kept on disk where a tower made them."""
    if not any(name.startswith("tower/") for name in params):
        return _embeddings(graphdef, params, inputs)
    path = workdir / "embeddings" / f"{run}.npz"
    if not path.exists():
        documents, queries = _embeddings(graphdef, params, inputs)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, documents=documents, queries=queries)
        os.replace(temporary, path)
    with np.load(path, allow_pickle=False) as file:
        return file["documents"], file["queries"]
