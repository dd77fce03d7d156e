"""A trained system -> its index, and one record for each budget."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import numpy as np

from ehi.eval import provenance
from ehi.eval.baselines.build import WITH_LISTS, build_baseline
from ehi.eval.measure import beam_for_budget, curve, measure, min_prob_for_budget
from ehi.eval.records import Cell, Record, read_records, write_records
from ehi.index import Index, build_index, open_index, save_index
from ehi.model.export import index_arrays, query_head_arrays
from ehi.model.pretrained import resolve, save_tower
from ehi.parallel.processes import is_first
from ehi.train.logs import MetricLog
from experiments.run.prepare import Inputs, known_pairs
from experiments.run.train import Trained, run_name, train_system
from experiments.run.workdir import own_folder
from experiments.systems import SYSTEMS, Budget, get_system

LOG = logging.getLogger("ehi")

# Percent of the documents, or leaves, that a search visits by default.
DEFAULT_PERCENT = 10
# Queries whose leaves say what is probable; in steps, so that all kinds are among them.
CALIBRATION_QUERIES = 2000


@dataclass(frozen=True)
class Built:
    """An index and what it cost."""

    index: Index = field(repr=False)
    path: Path
    seconds: float


def build(config, trained: Trained, inputs: Inputs, path: Path) -> Built:
    """Build and save the index of a trained system, or open the one that is there."""
    if path.exists():
        index = open_index(path)
        # `index` serves the last system of a config, which may have been another.
        if index.encoder["run"] == trained.run:
            return Built(index, path, float(index.config["build_seconds"]))
    identity = identity_of(config, trained, inputs)
    identity |= save_query_tower(inputs, trained.params, path)
    started = monotonic()
    index = build_index(
        trained.documents,
        inputs.dataset.doc_ids,
        **index_arrays(trained.graphdef, trained.params),
        spill=config.tree.spill,
        encoder=identity,
        query_head=query_head_arrays(trained.graphdef, trained.params),
    )
    seconds = monotonic() - started
    parameters = dataclasses.replace(
        index.parameters,
        config={"build_seconds": seconds},
        encoder=identity | _default_search(config, index, trained, inputs),
    )
    index = Index(parameters, index.contents)
    save_index(index, path, documents=shown(inputs.dataset))
    drop_old_towers(path, identity)
    return Built(open_index(path), path, seconds)


def evaluate_budget(
    config, built: Built, trained: Trained, inputs: Inputs, name: str, budget: Budget,
    folder: Path,
) -> Record | None:  # fmt: skip
    """The record of one cell; None where the smallest search is over the budget."""
    index, queries = built.index, trained.queries[inputs.eval_rows]
    setting = {"beam": index.num_leaves}
    if budget.visit is not None:
        setting = _setting(config, index, queries, budget.visit)
        if None in setting.values():
            LOG.warning(
                "%s: the smallest search visits more than %s%% of the documents",
                run_name(name, budget.compression), budget.visit,
            )  # fmt: skip
            return None
    cell = Cell(
        name, config.variant, inputs.dataset.name, config.split, config.seed,
        budget.name,
    )  # fmt: skip
    fields = measure(
        index, queries, inputs.eval_ids, inputs.dataset.qrels[config.split],
        **setting, tower_width=inputs.pretrained.config["width"],
        run_path=folder / f"{cell.stem}.run.gz",
    )  # fmt: skip
    return Record(
        **cell._asdict(),
        **fields,
        examples_per_second=trained.examples_per_second,
        train_seconds=trained.seconds,
        build_seconds=built.seconds,
        config_hash=provenance.config_hash(
            json.loads(config.to_json()), without=("systems", "budgets", "seed")
        ),
        recipe=config.recipe,
        git_commit=provenance.git_commit(Path(__file__).parent),
        versions=provenance.versions(),
        hardware=provenance.hardware(),
        corpus_sha256=inputs.dataset.corpus_sha256,
    )


def _setting(config, index, queries, percent: float) -> dict:
    """How an index is searched within a budget; a value is None where that cannot be.

    Faiss and ScaNN know no probabilities: all queries visit as many of their lists.
    """
    if config.tree.adaptive and isinstance(index, Index):
        min_prob = min_prob_for_budget(index, queries, percent)
        return {"beam": index.num_leaves, "min_prob": min_prob}
    return {"beam": beam_for_budget(index, queries, percent)}


def visited_curve(config, built: Built, trained: Trained, inputs: Inputs, split: str):
    """nDCG@10 against documents visited, from one leaf a query to all documents."""
    index, queries = built.index, trained.queries[inputs.eval_rows]
    least = index.count_visited(queries, 1).mean() / index.num_documents
    least = max(least, 1 / index.num_documents)  # the best leaves may all be empty
    settings = [{"beam": 1}] + [
        _setting(config, index, queries, percent)
        for percent in np.geomspace(100 * least, 100, 12)[1:]
    ]
    return curve(index, queries, inputs.eval_ids, inputs.dataset.qrels[split], settings)


def _default_search(config, index, trained: Trained, inputs: Inputs) -> dict:
    """How `experiments.search` searches, found on the queries of training."""
    if not config.tree.adaptive or index.num_leaves == 1:
        leaves = index.num_leaves * DEFAULT_PERCENT / 100
        return {"default_beam": max(1, round(leaves))}
    rows = np.unique(known_pairs(inputs.training.pairs)[0])
    rows = rows[:: -(-len(rows) // CALIBRATION_QUERIES)]
    min_prob = min_prob_for_budget(index, trained.queries[rows], DEFAULT_PERCENT)
    # One leaf may be too much already: then it is the only one.
    min_prob = 1.0 if min_prob is None else min_prob
    return {"default_beam": index.num_leaves, "default_min_prob": min_prob}


def save_query_tower(inputs: Inputs, params: dict, path: Path) -> dict:
    """Save a trained tower beside the index at `path`: what its identity then says."""
    own = any(name.startswith("query_tower/") for name in params)
    group = "query_tower/" if own else "tower/"  # what a searcher needs
    tower = {
        name.removeprefix(group): value
        for name, value in params.items()
        if name.startswith(group)
    }
    if not tower:
        return {}
    made = path.parent / f".{path.name}-tower"
    save_tower(inputs.pretrained, tower, made)
    sha256 = resolve(made).sha256
    # Named after its weights: an index that is there keeps its own, whatever happens.
    folder = path.parent / f"{path.name}-tower-{sha256[:8]}"
    if folder.exists():
        shutil.rmtree(made)
    else:
        os.rename(made, folder)
    # The index names it relative to itself, so that both can be moved together.
    return {"tower": f"../{folder.name}", "tower_sha256": sha256}


def drop_old_towers(path: Path, identity: dict) -> None:
    """Remove the towers of indexes that stood at `path` before the one there now."""
    kept = Path(identity["tower"]).name
    for folder in path.parent.glob(f"{path.name}-tower-*"):
        if folder.name != kept:
            shutil.rmtree(folder)


def identity_of(config, trained: Trained, inputs: Inputs) -> dict:
    """What a searcher must know to embed a query as this index was built."""
    return {
        "tower": config.tower.name,
        "tower_sha256": inputs.pretrained.sha256,
        "query_length": config.tower.query_length,
        "run": trained.run,
    }


def shown(dataset) -> list[dict]:
    """What a searcher is shown of a document: title and first line."""
    return [
        {
            "id": document.id,
            "title": document.title,
            "line": document.text.strip().split("\n", 1)[0][:200],
        }
        for document in dataset.documents
    ]


# MERGED experiments_library: The indexes that Faiss or ScaNN build and search.


def build_library(
    config, name: str, budget: Budget, parent: Trained, inputs: Inputs
) -> Built:
    """Build a library's index of the parent's embeddings, in memory.

    It gets as many lists as our trees have leaves, and as many bytes as our codes.
    """
    code_bytes = None
    if budget.compression is not None:
        code_bytes = 4 * inputs.pretrained.config["width"] // budget.compression
    started = monotonic()
    index = build_baseline(
        name, parent.documents, doc_ids=inputs.dataset.doc_ids,
        num_leaves=lists_of(config, name, budget),
        code_bytes=code_bytes, seed=config.seed,
    )  # fmt: skip
    return Built(index, Path(), monotonic() - started)


def lists_of(config, name: str, budget: Budget) -> int | None:
    """Inverted lists of a library's index; None for one without lists."""
    asks_all = budget.visit is None and budget.compression is not None
    if name not in WITH_LISTS or (name == "scann" and asks_all):
        return None
    return config.tree.branching**config.tree.height


# MERGED experiments_cells: The cells of an experiment: train a system, build its
# index, evaluate it.

LOG = logging.getLogger("ehi")


@dataclass(frozen=True)
class Experiment:
    """What the systems of one config share.

    Attributes:
      config: of the experiment, fitted to the corpus.
      inputs: from `load_inputs`.
      workdir: for everything that is written.
      log: training metrics go here.
      source: workdir of a finished run whose parameters are taken, or None.
      trained, built: by run name, so far.
    """

    config: object
    inputs: Inputs
    workdir: Path
    log: MetricLog
    source: Path | None = None
    trained: dict[str, Trained] = field(default_factory=dict)
    built: dict[str, Built] = field(default_factory=dict)


def default_budgets(config, name: str) -> list[Budget]:
    """The budgets of a config that apply to a system."""
    budgets = map(Budget.parse, config.budgets)
    return [budget for budget in budgets if budget.applies_to(get_system(name))]


def run_cells(
    experiment: Experiment, name: str, budgets: list[Budget]
) -> Iterator[tuple[Budget, Record | None]]:
    """Train and build what the budgets of a system need, and evaluate them.

    What is complete in the workdir is reused. Several processes train together, and
    process 0 alone builds and evaluates.

    Yields:
      each budget with its record; None where one leaf is already too much, or nothing
      is asked of the corpus, or in a process that does not evaluate.
    """
    for compression in dict.fromkeys(budget.compression for budget in budgets):
        some = [budget for budget in budgets if budget.compression == compression]
        make = _by_library if get_system(name).library else _train_and_build
        trained, built_for = make(experiment, name, compression)
        for budget in some:
            if not is_first():
                yield budget, None
                continue

            def evaluate(budget=budget, trained=trained, built_for=built_for):
                return evaluate_budget(
                    experiment.config, built_for(budget), trained, experiment.inputs,
                    name, budget, experiment.workdir / "trec",
                )  # fmt: skip

            yield budget, _once(experiment, name, budget, evaluate)


def _train_and_build(experiment: Experiment, name: str, compression: int | None):
    """The trained system, and budget -> its index, one for all budgets."""
    config, inputs, workdir = experiment.config, experiment.inputs, experiment.workdir
    run = run_name(name, compression)
    LOG.info("%s: train", run)
    trained = train_system(
        config, name, compression, inputs, own_folder(workdir), experiment.log,
        experiment.trained, experiment.source,
    )  # fmt: skip
    if not is_first():
        return trained, None
    LOG.info("%s: index", run)
    path = _index_path(config, workdir, run)
    built = experiment.built[run] = build(config, trained, inputs, path)
    return trained, lambda budget: built


def _by_library(experiment: Experiment, name: str, compression: int | None):
    """The system whose embeddings a library indexes, and budget -> index of them."""
    config, inputs = experiment.config, experiment.inputs
    parent = train_system(
        config, config.library_parent, None, inputs, own_folder(experiment.workdir),
        experiment.log, experiment.trained, experiment.source,
    )  # fmt: skip
    built = {}

    def built_for(budget: Budget) -> Built:
        lists = lists_of(config, name, budget)
        if lists not in built:
            LOG.info("%s: build", run_name(name, compression))
            built[lists] = build_library(config, name, budget, parent, inputs)
        return built[lists]

    # The library trained on no examples, whatever its parent did.
    return dataclasses.replace(parent, examples_per_second=None), built_for


def _once(experiment: Experiment, name: str, budget: Budget, evaluate):
    """The record of a cell: the one that is there, or a new one, which is kept."""
    path = experiment.workdir / "results.jsonl"
    if not len(experiment.inputs.eval_rows):
        return None
    for record in read_records(path) if path.exists() else ():
        if (record.system, record.budget) == (name, budget.name):
            LOG.info("%s %s: already evaluated, reused", name, budget.name)
            return record
    LOG.info("%s %s: evaluate", name, budget.name)
    record = evaluate()
    if record is not None:
        write_records(path, [record])
    return record


def _index_path(config, workdir: Path, run: str) -> Path:
    """The last run of a config is the one that is served: its index is `index`."""
    ours = [name for name in config.systems if not SYSTEMS[name].library]
    last = None
    if ours and (budgets := default_budgets(config, ours[-1])):
        last = run_name(ours[-1], budgets[-1].compression)
    return workdir / "index" if run == last else workdir / "indexes" / run
