"""An experiment: opened once, then trained, indexed and scored cell by cell."""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ehi
from ehi.eval.records import Record, read_records, write_records
from ehi.files import arrays_sha256
from ehi.parallel import processes
from ehi.parallel.processes import is_first
from ehi.progress import Progress
from ehi.train import checkpoint
from ehi.train.logs import MetricLog
from experiments.run.checks import check_config, check_corpus
from experiments.run.evaluate import (
    INDEXES,
    Built,
    build,
    evaluate_budget,
)
from experiments.run.library import LibraryBuilds
from experiments.run.prepare import Inputs, load_inputs
from experiments.run.train import Trained, finished_folder, run_name, train_system
from experiments.run.vectors import load_vector_inputs
from experiments.run.workdir import (
    claim,
    claim_inputs,
    own_folder,
    trained_on,
    with_tree_of,
    write_config,
)
from experiments.systems import (
    SYSTEMS,
    Budget,
    config_of,
    fit_to_corpus,
    get_system,
)

LOG = logging.getLogger("ehi")


@dataclass(frozen=True)
class Experiment:
    """The values that all systems of one config share.

    Attributes:
      config: the experiment, fitted to the corpus.
      inputs: from `load_inputs`.
      workdir: folder for everything that is written.
      log: receives the training metrics.
      source: workdir of a finished run whose parameters are used, or None.
      trained, built: run name -> result, so far.
    """

    config: object
    inputs: Inputs
    workdir: Path
    log: MetricLog
    source: Path | None = None
    trained: dict[str, Trained] = field(default_factory=dict)
    built: dict[str, Built] = field(default_factory=dict)


def open_experiment(
    config, workdir: Path, *, source: Path | None = None, tensorboard: bool = False
) -> Experiment:
    """Check a config, claim its workdir, and load its data and tower.

    If several processes call this together, all must have the same config, code and
    data.

    Args:
      config: the base config.
      workdir: folder for everything that is written.
      source: workdir of a finished run whose parameters are used without training.
      tensorboard: also write the metrics as TensorBoard events.

    Raises:
      ValueError: the config cannot run, or the workdir holds another experiment.
      FileNotFoundError: `source`, or `config.start_from`, holds no finished run.
    """
    check_config(config)
    if config.start_from:
        config = _trained_on(config, source)
    processes.agree("config", config.to_json())
    processes.agree("code", _code())
    claim(config, workdir)
    if source is not None:
        config = with_tree_of(config, source)
    # Process 0 downloads and prepares for all processes that share a cache. Each
    # process encodes the outputs of a frozen tower itself; that takes no longer.
    with processes.first_alone():
        of_vectors = "vectors" in config
        inputs = (load_vector_inputs if of_vectors else load_inputs)(config)
    claim_inputs(inputs, workdir, source, config.start_from)
    processes.agree("data", _data(inputs))
    documents = len(inputs.dataset.documents)
    config = fit_to_corpus(config, documents)
    check_corpus(config, documents, inputs.tower_width, inputs.code_width)
    write_config(config, workdir)
    events = workdir / "tensorboard" if tensorboard else None
    log = MetricLog(workdir / "metrics.jsonl", events, writes=is_first())
    return Experiment(config, inputs, workdir, log, source)


def _trained_on(config, source: Path | None):
    """Return the config of a run that trains on, after looking for what it starts from.

    Raises:
      ValueError: `source` is given too, or the finished run has other shapes.
      FileNotFoundError: the finished run lacks a system of the config.
    """
    if source is not None:
        raise ValueError(
            f"--config.start_from={config.start_from} trains on, and "
            f"--checkpoint={source} uses parameters as they are: give one of them"
        )
    config = trained_on(config)
    start = Path(config.start_from)
    runs = dict.fromkeys(run for name in config.systems for run in _runs(config, name))
    lacking = [
        run
        for run in runs
        if checkpoint.latest_step(finished_folder(start, run)) is None
    ]
    if lacking:
        there = sorted(path.parent.name for path in start.glob("checkpoints/*/final"))
        raise FileNotFoundError(
            f"--config.start_from={start} holds no trained {', '.join(lacking)}, but "
            f"{', '.join(there) or 'nothing'}: train it there first, or remove it from "
            "--config.systems and --config.budgets"
        )
    return config


def _runs(config, name: str) -> list[str]:
    """Return the runs that train a system: its ancestors' and its own."""
    system = get_system(name)
    parent = config.library_parent if system.library else system.parent
    runs = [] if parent is None else _runs(config, parent)
    if not system.phases:
        return runs
    if not system.pq:
        return [*runs, name]
    budgets = default_budgets(config, name)
    return runs + [run_name(name, budget.compression) for budget in budgets]


def default_budgets(config, name: str) -> list[Budget]:
    """Return the budgets of a config that apply to a system."""
    budgets = map(Budget.parse, config.budgets)
    return [budget for budget in budgets if budget.applies_to(get_system(name))]


def run_cells(
    experiment: Experiment, name: str, budgets: list[Budget]
) -> Iterator[tuple[Budget, Record | None]]:
    """Train and build what the budgets of a system need, then evaluate each budget.

    Results that are complete in the workdir are reused. Several processes train
    together; process 0 alone builds and evaluates.

    Yields:
      each budget and its record. The record is None if one leaf already exceeds the
      budget, if the corpus has no evaluated queries, or in a process other than 0.
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
    """Return the trained system, and a function: budget -> the one index of all."""
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
    # The index routes every document, then encodes it: both are counted.
    total, unit = 2 * len(trained.documents), "readings of documents"
    with Progress(f"{run}: index", total, unit, bar=False) as progress:
        built = build(
            config_of(config, name), trained, inputs, path, progress=progress.update
        )
        experiment.built[run] = built
    return trained, lambda budget: built


def _by_library(experiment: Experiment, name: str, compression: int | None):
    """Return the system that is the parent, and a function: budget -> library index."""
    config, inputs = experiment.config, experiment.inputs
    parent = train_system(
        config, config.library_parent, None, inputs, own_folder(experiment.workdir),
        experiment.log, experiment.trained, experiment.source,
    )  # fmt: skip
    run = run_name(name, compression)
    builds = LibraryBuilds(
        config, name, compression, parent, inputs, experiment.workdir
    )

    def built_for(budget: Budget) -> Built:
        LOG.info("%s: build", run)
        with Progress(f"{run}: builds of {len(parent.documents):,} documents"):
            return builds.best_for(budget)

    # The library trains on no examples, so the parent's speed is not its own.
    return dataclasses.replace(parent, examples_per_second=None), built_for


def _once(experiment: Experiment, name: str, budget: Budget, evaluate):
    """Return the record of a cell; evaluate and write it if it is not there yet."""
    path = experiment.workdir / "results.jsonl"
    if not len(experiment.inputs.eval_rows):
        return None
    for record in read_records(path) if path.exists() else ():
        if (record.system, record.budget) == (name, budget.name):
            LOG.info("%s %s: already evaluated, reused", name, budget.name)
            return record
    LOG.info("%s %s: evaluate", name, budget.name)
    queries = len(experiment.inputs.eval_rows)
    with Progress(f"{name} {budget.name}: evaluation of {queries:,} queries"):
        record = evaluate()
    if record is not None:
        write_records(path, [record])
    return record


def _index_path(config, workdir: Path, run: str) -> Path:
    """Return `index` for the last run of a config, `indexes/RUN` for the others."""
    ours = [name for name in config.systems if not SYSTEMS[name].library]
    last = None
    if ours and (budgets := default_budgets(config, ours[-1])):
        last = run_name(ours[-1], budgets[-1].compression)
    return workdir / "index" if run == last else workdir / INDEXES / run


def _code() -> str:
    experiments = Path(__file__).parents[1]
    return processes.code_version(Path(ehi.__file__).parent, experiments)


def _data(inputs: Inputs) -> str:
    """Return digests of what batches are made of, and of the tower that reads them."""
    pairs = {
        f"{name}/{side}": rows
        for name, both in inputs.training.pairs.items()
        for side, rows in zip(("queries", "documents"), both, strict=True)
    }
    parts = inputs.dataset.corpus_sha256, *inputs.source_keys, arrays_sha256(pairs)
    return " ".join(parts)
