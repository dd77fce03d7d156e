"""Train one system of a config: its parent, its starts, its phases, its embeddings."""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from ehi.data.rows import Rows, SomeRows
from ehi.encode.stream import stream_rows
from ehi.files import atomic_write_npz
from ehi.index import Index, Shard, build_folder, build_index, open_index
from ehi.index.search.routing import assign_leaves, route
from ehi.model.export import index_arrays
from ehi.model.head import start_from_pca
from ehi.model.params import has_tower, merge_model, split_model
from ehi.train import checkpoint
from ehi.train.batch import drawn_queries
from ehi.train.logs import MetricLog
from ehi.train.loop import run_phase
from ehi.train.negatives import (
    given_negatives,
    mine_from_leaves,
    mine_from_teacher,
    search_whole,
)
from ehi.train.reassign import reassigned_leaves
from ehi.train.starts import (
    before_freezing,
    fit_starts,
    freeze_documents,
    inherit,
    sampled_rows,
)
from experiments.run.models import build_model
from experiments.run.prepare import Inputs, codes_of, embeddings, tower_outputs
from experiments.systems import (
    System,
    config_of,
    freezes_later,
    get_system,
    phase_of,
    phases_of,
)

LOG = logging.getLogger("ehi")
LEAVES = "leaves.npz"  # beside the checkpoints of a run that moves documents
# The head's principal components are those of at most this many tower outputs.
PCA_ROWS = 2**18
# An index of at most this many bytes of embeddings is built in memory.
IN_MEMORY = 2**29


@dataclass(frozen=True)
class Trained:
    """A trained system: its parameters, and the embeddings that they give.

    Attributes:
      run: name of the system and, for PQ leaves, its compression.
      params: 'group/.../name' -> array.
      documents: embeddings (rows, D) of the corpus.
      queries: those of the query table, which are made when they are asked for.
      seconds: training time, including the parent and the fits, but not the run of
        `config.start_from`.
      leaves: (documents, s), if they are not those of the router; else None.
      examples_per_second: speed of the last phase; None if it was not trained here.
    """

    run: str
    graphdef: nnx.GraphDef = field(repr=False)
    params: dict = field(repr=False)
    documents: np.ndarray = field(repr=False)
    queries: Rows = field(repr=False)
    seconds: float
    examples_per_second: float | None = None
    leaves: np.ndarray | None = field(default=None, repr=False)


def run_name(name: str, compression: int | None) -> str:
    """'ehi-pq-64x' for a system with PQ leaves, else the system's name."""
    return name if compression is None else f"{name}-{compression}x"


def train_system(
    config, name: str, compression: int | None, inputs: Inputs, workdir: Path,
    log: MetricLog, trained: dict[str, Trained], source: Path | None = None,
) -> Trained:  # fmt: skip
    """Train a system, its ancestors first; reuse what is complete.

    Args:
      config: the base config.
      name, compression: the system, and the compression of its leaves.
      inputs: from `load_inputs`.
      workdir: folder for checkpoints and fits.
      log: receives the training metrics.
      trained: run name -> system trained so far; this one is added.
      source: workdir of a finished run whose parameters are used without training.

    Raises:
      FileNotFoundError: `source` has no finished parameters of this system.
    """
    run = run_name(name, compression)
    if run in trained:
        return trained[run]
    system, resolved = get_system(name), config_of(config, name)
    model = _model_of(resolved, system, compression, inputs)
    final = finished_folder(source or workdir, run)
    if checkpoint.latest_step(final) is not None:
        graphdef, params = split_model(model)
        saved = checkpoint.restore(final, {"params": params, "seconds": jnp.zeros(())})
        params, seconds = saved["params"], float(saved["seconds"])
    elif source is not None:
        raise FileNotFoundError(
            f"{source} holds no trained {run}; train it there first, or remove it from "
            "--config.systems and --config.budgets"
        )
    else:
        parent = None
        if system.parent is not None:
            parent = train_system(
                config, system.parent, None, inputs, workdir, log, trained
            )
        if resolved.start_from and system.phases:
            graphdef, params = _finished(model, Path(resolved.start_from), run)
            seconds = 0.0 if parent is None else parent.seconds
        else:
            graphdef, params, seconds = _start(
                resolved, system, model, inputs, parent, workdir
            )
        job = Job(resolved, system, run, graphdef, params, inputs, parent, workdir)
        params = _train(job, log)
        seconds += sum(log.seconds(run, phase) for phase in phases_of(config, system))
        done = {"params": params, "seconds": jnp.float32(seconds)}
        checkpoint.save(final, 0, done)
    documents, queries = embeddings(graphdef, params, inputs, workdir / "outputs")
    rate = None
    if system.phases and source is None:
        rate = log.examples_per_second(run, system.phases[-1])
    leaves = saved_leaves(source or workdir, run, inputs)
    trained[run] = Trained(
        run, graphdef, params, documents, queries, seconds, rate, leaves
    )
    return trained[run]


def fit_starts_of(
    config, name: str, compression: int | None, inputs: Inputs, parent: Trained,
    workdir: Path,
) -> None:  # fmt: skip
    """Make the fits that a system starts from in `workdir/starts`, if they lack.

    `train_system` finds them in a workdir with these `starts`.
    """
    system, resolved = get_system(name), config_of(config, name)
    if not (system.library or resolved.start_from):
        model = _model_of(resolved, system, compression, inputs)
        _start(resolved, system, model, inputs, parent, workdir)


def _model_of(config, system: System, compression: int | None, inputs: Inputs):
    """Return the model of a system as it is initialised; `config` is the system's."""
    return build_model(
        config, system, compression, tower=lambda: inputs.tower,
        tower_width=inputs.tower_width, num_documents=len(inputs.dataset.documents),
        code_width=inputs.code_width,
    )  # fmt: skip


def _finished(model, workdir: Path, run: str):
    """Return the parameters with which a finished run ended."""
    graphdef, params = split_model(model)
    like = {"params": params, "seconds": jnp.zeros(())}
    return graphdef, checkpoint.restore(finished_folder(workdir, run), like)["params"]


def finished_folder(workdir: Path, run: str) -> Path:
    """Return the folder of the parameters with which a run ends."""
    return workdir / "checkpoints" / run / "final"


def _start(config, system, model, inputs, parent, workdir):
    """Return the parameters before the first step: pretrained, inherited or fitted."""
    if parent is None:
        width = model.head.projection.shape[1]
        if width < inputs.tower_width:
            rows = sampled_rows(
                inputs.document_features, config.fit_sample or PCA_ROWS, config.seed
            )
            start = start_from_pca(rows, width)
            model.head.projection[...] = start
        return *split_model(model), 0.0
    seconds = 0.0
    if not any(config[name].start == "buffer" for name in system.phases):
        seconds = fit_starts(
            model, parent.documents, seed=config.seed, cache=workdir / "starts",
            random_tree=config.tree.start == "random", fit_sample=config.fit_sample,
        )  # fmt: skip
    graphdef, params = split_model(model)
    return graphdef, inherit(params, parent.params), seconds + parent.seconds


@dataclass(frozen=True)
class Job:
    """A system that is to be trained, and what its phases need.

    Attributes:
      config: of the system.
      run: its name and, for PQ leaves, its compression.
      graphdef, params: as they are before the first phase.
      parent: the system that it starts from, or None.
    """

    config: ConfigDict
    system: System
    run: str
    graphdef: nnx.GraphDef
    params: dict
    inputs: Inputs
    parent: Trained | None
    workdir: Path

    @property
    def folder(self) -> Path:
        return self.workdir / "checkpoints" / self.run

    @property
    def outputs(self) -> Path:
        """Folder of tower outputs, embeddings and codes."""
        return self.workdir / "outputs"


def _train(job: Job, log: MetricLog) -> dict:
    """Run all phases of a system; return its parameters."""
    state = {"params": job.params, "stats": {}}
    for name in phases_of(job.config, job.system):
        phase = phase_of(job.config, name, len(job.inputs.dataset.documents))
        graphdef, params = job.graphdef, state["params"]
        if freezes_later(job.config, job.system, name):
            graphdef, params = before_freezing(graphdef, job.params | params)
        elif phase.start == "freeze":
            params = freeze_documents(job.params, params)
        state = {"params": params, "stats": state["stats"]}
        if phase.steps:
            state = _phase(job, name, phase, graphdef, state, log)
    return state["params"]


def _phase(job: Job, name: str, phase, graphdef, state, log) -> dict:
    """Run one phase, or return its final state if it is complete."""
    inputs, config, params = job.inputs, job.config, state["params"]
    if phase.start == "buffer":
        params = _fit_to_buffer(job, graphdef, params, state["stats"]["buffer"])
    tables, host_tables = _placed(job, phase, _tables(job, phase, graphdef, params))
    lengths = (0, 0)
    if has_tower(params):
        lengths = (config.tower.query_length, config.tower.document_length)
    return run_phase(
        graphdef, params, inputs.training, tables, phase,
        run=job.run, name=name, seed=config.seed, directory=job.folder / name, log=log,
        lengths=lengths, mine=_miner(job, phase, graphdef),
        shard_state=config.shard_state, host_tables=host_tables,
    )  # fmt: skip


def _placed(job: Job, phase, tables: dict) -> tuple[dict, dict]:
    """Return the tables for the device, and those whose rows travel with the batch.

    The codes stay on the device, since a step searches all of them.
    """
    if not rows_travel(job.config, tables):
        return tables, {}
    on_device = {name: tables.pop(name) for name in ("codes",) if name in tables}
    if "teacher_queries" in tables:  # embedded once, not in each step again
        rows = drawn_queries(job.inputs.training, phase, seed=job.config.seed)
        table, part = tables["teacher_queries"], job.outputs / "teacher.npy"
        part.unlink(missing_ok=True)  # of other rows
        values = stream_rows(part, len(rows), lambda a, b: table[rows[a:b]])
        tables["teacher_queries"] = SomeRows(rows, values)
    return on_device, tables


def rows_travel(config, tables: dict) -> bool:
    """Return whether the tables, without the codes, are too large for a device.

    Args:
      config: of the system.
      tables: name -> array, or its shape and type.
    """
    sizes = [
        math.prod(table.shape) * table.dtype.itemsize
        for name, table in tables.items()
        if name != "codes"
    ]
    return sum(sizes) > config.device_table_gib * 2**30


def _fit_to_buffer(job: Job, graphdef, params, buffer) -> dict:
    """Fit tree and leaves to the embeddings (rows, D) that a warm-up kept."""
    model, kept = merge_model(graphdef, params), np.asarray(buffer)
    kept = kept[kept.any(axis=1)]  # a short warm-up does not fill the buffer
    fit_starts(
        model, kept, seed=job.config.seed, cache=job.folder / "starts",
        fit_sample=job.config.fit_sample,
    )  # fmt: skip
    return split_model(model)[1]


def saved_leaves(workdir: Path, run: str, inputs: Inputs) -> np.ndarray | None:
    """Return the leaves that a run gave the documents of this corpus, or None."""
    path = workdir / "checkpoints" / run / LEAVES
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        if str(file["corpus_sha256"]) == inputs.dataset.corpus_sha256:
            return file["leaves"]
    LOG.warning(
        "%s moved the documents of another corpus to the leaves where queries look for "
        "them; these documents go where its tree puts them", run,
    )  # fmt: skip
    return None


def _reassign(job: Job, phase, graphdef, params) -> np.ndarray:
    """Return the leaves (documents, s) where queries of the phase look for documents.

    A file keeps them, since the index is built from them.
    """
    leaves = saved_leaves(job.workdir, job.run, job.inputs)
    if leaves is not None:
        return leaves
    inputs, teacher = job.inputs, job.parent
    rows = drawn_queries(inputs.training, phase, seed=job.config.seed)
    wanted = min(phase.mined_kept, len(teacher.documents))
    documents, queries = embeddings(graphdef, params, inputs, job.outputs)
    arrays, copies = index_arrays(graphdef, params), job.config.tree.spill
    of_queries = arrays["query_tree"] or arrays["tree"]
    leaves = reassigned_leaves(
        search_whole(teacher.documents, teacher.queries[rows], wanted),
        route(queries[rows], of_queries, phase.mined_beam, normalise=False).leaves,
        assign_leaves(documents, arrays["tree"], copies),
        copies=copies,
    )
    sha256 = np.str_(inputs.dataset.corpus_sha256)
    kept = {"leaves": leaves, "corpus_sha256": sha256}
    atomic_write_npz(job.folder / LEAVES, kept)
    return leaves


def _miner(job: Job, phase, graphdef):
    """Return a function: parameters, rows -> hard negatives (n, m) of them; or None."""
    if not phase.mining_interval:
        return None
    inputs, parent = job.inputs, job.parent

    def from_teacher(_, rows):
        return mine_from_teacher(
            parent.documents, parent.queries, inputs.training,
            per_query=phase.mined_kept, rows=rows,
        )  # fmt: skip

    def given(_, rows):
        return given_negatives(
            inputs.dataset.candidates, inputs.training, per_query=phase.mined_kept,
            rows=rows,
        )  # fmt: skip

    def from_leaves(params, rows):
        with _index_now(job, graphdef, params) as (index, queries):
            return mine_from_leaves(
                index, queries[rows], inputs.training, per_query=phase.mined_kept,
                beam=phase.mined_beam, rows=rows, threads=len(os.sched_getaffinity(0)),
            )  # fmt: skip

    sources = {"teacher": from_teacher, "given": given, "leaves": from_leaves}
    return sources[phase.negatives]


@contextlib.contextmanager
def _index_now(job: Job, graphdef, params) -> Iterator[tuple[Index, Rows]]:
    """The index of the present parameters, and the embeddings of the query table.

    Those of a large corpus are in a folder, which is removed at the end.
    """
    inputs, arrays = job.inputs, index_arrays(graphdef, params)
    ids = np.arange(len(inputs.dataset.documents))
    if not is_large(len(ids) * params["head/projection"].shape[1]):
        documents, queries = embeddings(graphdef, params, inputs)
        yield build_index(documents, ids, **arrays), queries
        return
    folder = job.outputs / "mining"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        documents, queries = embeddings(graphdef, params, inputs, folder)
        build_folder(folder / "index", [Shard(documents.filename, ids)], **arrays)
        yield open_index(folder / "index"), queries
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_large(values: int) -> bool:
    """Return whether so many numbers are kept in files rather than in memory."""
    return 4 * values > IN_MEMORY


def _tables(job: Job, phase, graphdef, params) -> dict:
    """Return the read-only arrays that the steps of a phase gather from."""
    inputs, parent = job.inputs, job.parent
    tables = {}
    if not has_tower(params) or phase.losses.get("query_anchor"):
        tables["features_queries"] = inputs.query_features
    if not has_tower(params) or phase.losses.get("anchor"):
        tables["features_documents"] = inputs.document_features
    if has_tower(params) and phase.encoded:
        if parent is None and not job.config.start_from:  # the pretrained tower still
            cached = inputs.document_features, inputs.query_features
        else:
            cached = tower_outputs(graphdef, params, inputs, job.outputs)
        tables["cached_documents"], tables["cached_queries"] = cached
    if phase.needs_teacher:
        if parent is None:
            raise ValueError(f"{job.run} distils, but has no parent system as teacher")
        tables["teacher_queries"] = parent.queries
        tables["teacher_documents"] = parent.documents
    if phase.needs_codes:
        tables["codes"] = codes_of(graphdef, params, inputs, job.outputs)
    if phase.start == "reassign":
        tables["leaves"] = _reassign(job, phase, graphdef, params)
    return tables
