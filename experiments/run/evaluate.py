"""A trained system -> its index, and a record for each budget."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import numpy as np

from ehi.eval import provenance
from ehi.eval.baselines.base import Baseline
from ehi.eval.measure import (
    beam_for_budget,
    curve,
    measure,
    min_prob_for_budget,
    shared_beam_for_budget,
)
from ehi.eval.metrics import unlabelled_queries
from ehi.eval.records import Cell, Record
from ehi.files import atomic_write, new_folder
from ehi.index import (
    Index,
    Shard,
    build_folder,
    build_index,
    open_index,
    save_index,
)
from ehi.index.folder import MANIFEST
from ehi.model.export import index_arrays, query_head_arrays
from ehi.model.pretrained import resolve, save_tower
from ehi.vector_index import OWN_HEAD
from ehi.vector_index import described as described_maps
from experiments.run.prepare import Inputs, known_pairs
from experiments.run.train import Trained, is_large, run_name
from experiments.run.vectors import VectorInputs
from experiments.run.workdir import FREE_FIELDS, described, identity_of_start
from experiments.systems import Budget

LOG = logging.getLogger("ehi")

# A search visits this percentage of the documents, or leaves, by default.
DEFAULT_PERCENT = 10
INDEXES = "indexes"  # folder of the indexes of a run but the last, which is `index`
# At most about this many queries set the search of a budget. They are evenly spaced, so
# that all kinds of queries are among them.
CALIBRATION_QUERIES = 2000


@dataclass(frozen=True)
class Built:
    """An index, its folder, and the seconds it took to build."""

    index: Index = field(repr=False)
    path: Path
    seconds: float


def build(
    config, trained: Trained, inputs: Inputs, path: Path,
    progress: Callable[[int], None] | None = None,
) -> Built:  # fmt: skip
    """Build and save the index of a trained system, or open the one that is there."""
    if path.exists():
        index = open_index(path)
        # `index` belongs to the last system of a config; that may have changed.
        if index.encoder["run"] == trained.run:
            return Built(index, path, float(index.config["build_seconds"]))
    identity = identity_of(config, trained, inputs)
    carried = carried_tower(inputs, trained.params, path, config.index.tower)
    with carried as (tower, changed):
        identity |= changed
        seconds = _build(config, trained, inputs, path, identity, tower, progress)
    drop_old_towers(path)
    return Built(open_index(path), path, seconds)


def _build(
    config, trained: Trained, inputs: Inputs, path: Path, identity: dict,
    tower: Path | None, progress,
) -> float:  # fmt: skip
    """Build and save an index; return the seconds without those of saving it."""
    head = query_head_arrays(trained.graphdef, trained.params)
    if is_large(trained.documents.size) and trained.leaves is None:
        return _in_folder(
            config, trained, inputs, path, identity, head, tower, progress
        )
    started = monotonic()
    index = in_memory(
        config, trained, inputs.dataset.doc_ids, encoder=identity, query_head=head,
        metadata=inputs.metadata, progress=progress,
    )  # fmt: skip
    seconds = monotonic() - started
    parameters = dataclasses.replace(
        index.parameters,
        config={"build_seconds": seconds},
        encoder=identity | _default_search(config, index, trained, inputs),
    )
    index = Index(parameters, index.contents)
    lines = _lines(config, inputs)
    save_index(index, path, documents=lines and list(lines()), tower=tower)
    return seconds


def _in_folder(
    config, trained: Trained, inputs: Inputs, path: Path, identity: dict, head, tower,
    progress,
) -> float:  # fmt: skip
    """Build the index of a large corpus from the file of its embeddings.

    Memory does not grow with the documents, but for their ids. Return the seconds.
    """
    started = monotonic()
    shard = Shard(
        trained.documents.filename, inputs.dataset.doc_ids,
        documents=_lines(config, inputs), metadata=inputs.metadata,
    )  # fmt: skip
    with new_folder(path, exists="replace") as made:
        build_folder(
            made, [shard], **index_arrays(trained.graphdef, trained.params),
            spill=config.tree.spill, encoder=identity, query_head=head,
            tower=tower, progress=progress, threads=len(os.sched_getaffinity(0)),
        )  # fmt: skip
        seconds = monotonic() - started
        default = _default_search(config, open_index(made), trained, inputs)
        manifest = json.loads((made / MANIFEST).read_bytes())
        manifest["config"] = {"build_seconds": seconds}
        manifest["encoder"] = identity | default
        atomic_write(made / MANIFEST, json.dumps(manifest, indent=1).encode())
    return seconds


def in_memory(config, trained: Trained, doc_ids: list[str], **options) -> Index:
    """Build the index of a trained system; `options` go to `build_index`."""
    return build_index(
        trained.documents,
        doc_ids,
        **index_arrays(trained.graphdef, trained.params),
        spill=config.tree.spill,
        leaves=trained.leaves,
        **options,
    )


def evaluate_budget(
    config, built: Built, trained: Trained, inputs: Inputs, name: str, budget: Budget,
    folder: Path,
) -> Record | None:  # fmt: skip
    """Return the record of one cell; None if the smallest search is over the budget."""
    index, queries = built.index, trained.queries[inputs.eval_rows]
    setting, setters = {"beam": index.num_leaves}, None
    if budget.visit is not None:
        setters, rows = budget_queries(inputs, config.split)
        setting = search_setting(config, index, trained.queries[rows], budget.visit)
        if None in setting.values():
            LOG.warning(
                "%s %s: the smallest search visits %.2f%% of the documents",
                run_name(name, budget.compression), budget.name,
                100 * smallest_visited(index, trained.queries[rows]),
            )  # fmt: skip
            return None
    cell = Cell(
        name, config.variant, inputs.dataset.name, config.split, config.seed,
        budget.name,
    )  # fmt: skip
    qrels = inputs.dataset.qrels
    fields = measure(
        index, queries, inputs.eval_ids, qrels[config.split],
        **setting, tower_width=inputs.code_width, exact=inputs.exact,
        run_path=folder / f"{cell.stem}.run.gz",
        ignore_identical_ids=inputs.identical_ids,
        unlabelled=unlabelled_queries(qrels[config.split], qrels.get("train", {})),
    )  # fmt: skip
    fields |= {"budget_queries": setters, "build_seconds": built.seconds}
    return record_of(config, inputs, trained, cell, fields)


def record_of(
    config, inputs: Inputs, trained: Trained, cell: Cell, fields: dict
) -> Record:
    """Return the record of a cell: the measured values and their origin.

    Args:
      config: the experiment.
      inputs: the data that it was trained on.
      trained: the system.
      cell: what the record is of.
      fields: from `measure`, with `budget_queries` and `build_seconds`.
    """
    return Record(
        **cell._asdict(),
        **fields,
        examples_per_second=trained.examples_per_second,
        train_seconds=trained.seconds,
        config_hash=_config_hash(config, inputs),
        recipe=config.recipe,
        git_commit=provenance.git_commit(Path(__file__).parent),
        versions=provenance.versions(),
        hardware=provenance.hardware(),
        corpus_sha256=inputs.dataset.corpus_sha256,
    )


def budget_queries(inputs: Inputs, split: str) -> tuple[str, np.ndarray]:
    """Return the name and the rows of the queries that set the search of a budget.

    They are those of train; without train those of dev, of the pseudo-queries, or the
    documents themselves, but never those of the evaluated split.
    """
    dataset = inputs.dataset
    row_of = {name: row for row, name in enumerate(dataset.query_ids)}
    for other in ("train", "dev"):
        if other != split and dataset.qrels.get(other):
            rows = np.array([row_of[name] for name in dataset.qrels[other]], np.int64)
            return other, spaced(rows)
    pseudo = np.unique(inputs.training.pairs["pseudo"][0])
    if len(pseudo):
        return "pseudo", spaced(pseudo)
    return "documents", spaced(inputs.training.pairs["documents"][0])


def spaced(rows: np.ndarray) -> np.ndarray:
    """Return at most about `CALIBRATION_QUERIES` rows, evenly spaced."""
    return rows[:: -(-len(rows) // CALIBRATION_QUERIES)]


def _config_hash(config, inputs: Inputs) -> str:
    """Return the hash of a config; `ignore_identical_ids` counts if it drops any."""
    values = described(config) | {"ignore_identical_ids": len(inputs.identical_ids)}
    without = (*FREE_FIELDS, "seed")
    if config.start_from:  # the same for every seed, wherever the finished run lies
        values["start_from"] = identity_of_start(Path(config.start_from), without)
    if not inputs.identical_ids:
        without += ("ignore_identical_ids",)
    return provenance.config_hash(values, without=without)


def search_setting(config, index, queries, percent: float) -> dict:
    """Return the search settings that meet a budget; a value is None if none does.

    ScaNN has no probabilities: there, all queries visit as many lists, but for one more
    in a part of them.
    """
    library = isinstance(index, Baseline)
    if config.tree.adaptive and (not library or index.scale is not None):
        min_prob = min_prob_for_budget(index, queries, percent)
        return {"beam": index.num_leaves, "min_prob": min_prob}
    if library and index.num_centroids:
        return {"beam": shared_beam_for_budget(index, queries, percent)}
    return {"beam": beam_for_budget(index, queries, percent)}


def smallest_visited(index, queries) -> float:
    """Return the mean fraction of documents that a search of one leaf visits."""
    return float(index.count_visited(queries, 1).mean()) / index.num_documents


def visited_curve(config, built: Built, trained: Trained, inputs: Inputs, split: str):
    """nDCG@10 against documents visited, from one leaf per query to all documents."""
    index, queries = built.index, trained.queries[inputs.eval_rows]
    setters = trained.queries[budget_queries(inputs, split)[1]]
    # The best leaf of every query may be empty.
    least = max(smallest_visited(index, setters), 1 / index.num_documents)
    settings = [{"beam": 1}] + [
        search_setting(config, index, setters, percent)
        for percent in np.geomspace(100 * least, 100, 12)[1:]
    ]
    return curve(
        index, queries, inputs.eval_ids, inputs.dataset.qrels[split], settings,
        ignore_identical_ids=inputs.identical_ids,
    )  # fmt: skip


def _default_search(config, index, trained: Trained, inputs: Inputs) -> dict:
    """Return the default of `experiments.search`, chosen on the training queries."""
    if not config.tree.adaptive or index.num_leaves == 1:
        leaves = index.num_leaves * DEFAULT_PERCENT / 100
        return {"default_beam": max(1, round(leaves))}
    rows = spaced(np.unique(known_pairs(inputs.training.pairs)[0]))
    min_prob = min_prob_for_budget(index, trained.queries[rows], DEFAULT_PERCENT)
    # If one leaf already exceeds the percentage, a search visits one leaf.
    min_prob = 1.0 if min_prob is None else min_prob
    return {"default_beam": index.num_leaves, "default_min_prob": min_prob}


@contextlib.contextmanager
def carried_tower(
    inputs: Inputs, params: dict, path: Path, frozen: bool
) -> Iterator[tuple[Path | None, dict]]:
    """Yield the tower that the index at `path` carries, and its part of the identity.

    An index carries the tower that its system trained. A frozen one is the same in all
    indexes of a run, so it is carried by `index` only, unless `frozen` is false; the
    others name it. What is carried has a name without a path of this machine.
    """
    named = {} if is_of_vectors(inputs) else {"tower": inputs.pretrained.name}
    own = any(name.startswith("query_tower/") for name in params)
    group = "query_tower/" if own else "tower/"  # a searcher encodes queries only
    tower = {
        name.removeprefix(group): value
        for name, value in params.items()
        if name.startswith(group)
    }
    if tower:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tower.", dir=path.parent) as scratch:
            made = Path(scratch) / "tower"
            save_tower(inputs.pretrained, tower, made)
            yield made, named | {"tower_sha256": resolve(made).sha256}
    elif frozen and path.parent.name != INDEXES and not is_of_vectors(inputs):
        yield inputs.pretrained.folder, named
    else:
        yield None, {}


def is_of_vectors(inputs: Inputs) -> bool:
    """Return whether a run was given vectors, not texts."""
    return isinstance(inputs, VectorInputs)


def drop_old_towers(path: Path) -> None:
    """Remove the towers beside the index at `path`, where older versions put them."""
    for folder in path.parent.glob(f"{path.name}-tower-*"):
        shutil.rmtree(folder)


def identity_of(config, trained: Trained, inputs: Inputs) -> dict:
    """Return what a searcher needs to embed a query as this index expects it."""
    if is_of_vectors(inputs):
        own = any(name.startswith("query_head/") for name in trained.params)
        return described_maps(inputs.maps) | {OWN_HEAD: own, "run": trained.run}
    return {
        "tower": config.tower.name,
        "tower_sha256": inputs.tower_sha256,
        "query_length": config.tower.query_length,
        "run": trained.run,
    } | inputs.tower_settings


def _lines(config, inputs: Inputs):
    """Return a function that reads what a search shows of the documents, or None."""
    if is_of_vectors(inputs) or config.index.documents == "none":
        return None
    kind = config.index.documents
    return lambda: (shown(document, kind) for document in inputs.dataset.documents)


def shown(document, kind: str = "title") -> dict:
    """Return what a search shows of a document: id, title and first line.

    Args:
      document: of a data set.
      kind: 'title', or 'full' for its text as well.
    """
    kept = {
        "id": document.id,
        "title": document.title,
        "line": document.text.strip().split("\n", 1)[0][:200],
    }
    return kept | {"text": document.text} if kind == "full" else kept
