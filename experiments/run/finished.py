"""A finished run -> the job that encodes a corpus in shards, and the shards' index."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ehi.data.datasets import open_dataset
from ehi.data.tfds_builder import READ_AHEAD
from ehi.data.tokens import tokenizer_sha256
from ehi.encode.documents import DocumentEncoder
from ehi.encode.shards import EncodingJob, index_shards
from ehi.files import arrays_sha256
from ehi.index.folder import MANIFEST, read_folder
from ehi.index.stream import build_folder
from ehi.model.export import index_arrays, query_head_arrays
from ehi.model.params import has_tower, split_model
from ehi.progress import Progress
from ehi.train import checkpoint
from experiments.run.checks import check_lengths
from experiments.run.evaluate import (
    carried_tower,
    drop_old_towers,
    identity_of,
    shown,
)
from experiments.run.experiment import default_budgets
from experiments.run.models import build_model
from experiments.run.prepare import Inputs, read_metadata, resolve_tower
from experiments.run.train import LEAVES, Trained, run_name
from experiments.run.workdir import OF_TOWER_FILES, check_tower, with_tree_of
from experiments.systems import config_of, fit_to_corpus, get_system

LOG = logging.getLogger("ehi")


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A trained system, and the corpus to encode, which has not been read yet.

    Attributes:
      config: the config, with the tree of the run.
      inputs: data set and tower only; no tokens, no pairs.
      trained: parameters only; no embeddings.
      source: workdir of the run.
    """

    config: object
    inputs: Inputs
    trained: Trained
    source: Path


def open_run(config, name: str, source: Path) -> FinishedRun:
    """Load the parameters of a system that a finished run trained.

    Args:
      config: the base config, of the run or with another data set.
      name: the system; the last budget that applies to it sets its compression.
      source: workdir of the run.

    Raises:
      ValueError: a library builds the system, no budget applies to it, or documents
        are not where its tree puts them.
      FileNotFoundError: `source` holds no such run.
    """
    system = get_system(name)
    if config.start_from:
        raise ValueError(
            f"--config.start_from={config.start_from} trains on, and nothing is "
            "trained here: leave it out"
        )
    if system.library:
        raise ValueError(f"{name} cannot be encoded in shards: a library builds it")
    budgets = default_budgets(config, name)
    if not budgets:
        raise ValueError(
            f"no budget of {', '.join(config.budgets)} applies to {name!r}: a tree "
            "needs 'visit-...', PQ leaves need '...-64x'"
        )
    compression = budgets[-1].compression
    run = run_name(name, compression)
    config = with_tree_of(config, source)
    _compare_towers(config, source)
    if "vectors" in config:
        raise ValueError(
            "a config of vectors has no texts to encode: experiments.main indexes its "
            "vectors"
        )
    nothing = np.zeros(0, np.int64)
    inputs = Inputs(
        open_dataset(config.dataset), resolve_tower(config), config.tower.dtype,
        config.tower.remat, query_tokens=None, document_tokens=None, training=None,
        num_synthetic=0, eval_rows=nothing,
    )  # fmt: skip
    check_tower(inputs, source)
    check_lengths(config, inputs.pretrained)
    config = fit_to_corpus(config, len(inputs.dataset.documents))
    final = source / "checkpoints" / run / "final"
    if checkpoint.latest_step(final) is None:
        raise FileNotFoundError(
            f"{source} holds no trained {run}; train it there first"
        )
    if (source / "checkpoints" / run / LEAVES).exists():
        raise ValueError(
            f"{run} in {source} has moved documents to the leaves where its queries "
            "look for them, and shards put a document where the tree does: train it "
            "with --config.jtr_reassigned.steps=0 to encode it"
        )
    model = build_model(
        config_of(config, name), system, compression, tower=lambda: inputs.tower,
        tower_width=inputs.tower_width, num_documents=len(inputs.dataset.documents),
    )  # fmt: skip
    graphdef, params = split_model(model)
    saved = checkpoint.restore(final, {"params": params, "seconds": jnp.zeros(())})
    trained = Trained(
        run, graphdef, saved["params"], documents=None, queries=None,
        seconds=float(saved["seconds"]),
    )  # fmt: skip
    return FinishedRun(config_of(config, name), inputs, trained, source)


def make_job(run: FinishedRun, folder: Path, num_shards: int) -> EncodingJob:
    """Return the job that encodes the corpus into `num_shards` shards in `folder`."""
    config, inputs, params = run.config, run.inputs, run.trained.params
    dataset, pretrained = inputs.dataset, inputs.pretrained
    encoder = DocumentEncoder(
        run.trained.graphdef, params,
        tower=None if has_tower(params) else inputs.tower,
        tokenizer_file=pretrained.tokenizer_file,
        prefix=pretrained.document_prefix,
        length=config.tower.document_length,
        num_documents=len(dataset.documents),
        spill=config.tree.spill,
    )  # fmt: skip
    identity = {
        "run": run.trained.run,
        "parameters": arrays_sha256(params),
        "tower": pretrained.sha256,
        "tokenizer": tokenizer_sha256(
            pretrained.tokenizer_file, pretrained.document_prefix
        ),
        "dtype": config.tower.dtype,
        "document_length": config.tower.document_length,
        "spill": config.tree.spill,
        "corpus": dataset.corpus_sha256,
    } | pretrained.own_settings
    return EncodingJob(
        folder, num_shards, dataset.documents, dataset.doc_ids, encoder, identity
    )


def load_job(config, name: str, source: Path, folder: Path, num_shards: int):
    """Make the same job from arguments that can be sent to another machine."""
    return make_job(open_run(config, name, source), folder, num_shards)


def build_from_shards(run: FinishedRun, job: EncodingJob, path: Path) -> None:
    """Build the index of finished shards: that of `experiments.main` but for rounding.

    Raises:
      ValueError: a shard is missing, altered, or of another job.
    """
    config, inputs, trained = run.config, run.inputs, run.trained
    kind, metadata = config.index.documents, read_metadata(config, inputs.dataset)

    def lines(rows: range) -> Iterator[dict]:
        for start in range(rows.start, rows.stop, READ_AHEAD):
            part = inputs.dataset.documents[start : min(start + READ_AHEAD, rows.stop)]
            yield from (shown(document, kind) for document in part)

    def fields(rows: range) -> Iterator[dict]:
        return (metadata[row] for row in rows)

    shards = index_shards(
        job, None if kind == "none" else lines, None if metadata is None else fields
    )
    identity = identity_of(config, trained, inputs)
    carried = carried_tower(inputs, trained.params, path, config.index.tower)
    # Both readings of a document are counted.
    counted = Progress("index", 2 * len(job.ids), "readings of documents")
    with counted as progress, carried as (tower, changed):
        build_folder(
            path, shards,
            **index_arrays(trained.graphdef, trained.params),
            spill=config.tree.spill,
            encoder=identity | changed | _default_search(run),
            query_head=query_head_arrays(trained.graphdef, trained.params),
            tower=tower,
            progress=progress.update,
        )  # fmt: skip
    drop_old_towers(path)


def _compare_towers(config, source: Path) -> None:
    """Warn of every `tower` field, such as a length, that differs from the run's."""
    ours = json.loads(config.to_json())["tower"]
    theirs = json.loads((source / "config.json").read_text())["tower"]
    for name in sorted(ours.keys() & theirs.keys() | set(OF_TOWER_FILES)):
        if ours.get(name) != theirs.get(name):
            LOG.warning(
                "tower.%s is %r, but the run in %s was trained with %r",
                name, ours.get(name), source, theirs.get(name),
            )  # fmt: skip


def _default_search(run: FinishedRun) -> dict:
    """Return the default search of the run's own index, or {} if it has none."""
    source, name = run.source, run.trained.run
    for path in (source / "index", source / "indexes" / name):
        if (path / MANIFEST).exists():
            encoder = read_folder(path).manifest["encoder"] or {}
            if encoder.get("run") == name:
                defaults = ("default_beam", "default_min_prob")
                return {key: encoder[key] for key in defaults if key in encoder}
    return {}
