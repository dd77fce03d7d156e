"""The cells of an experiment: train a system, build its index, evaluate it."""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ehi.eval.records import Record, read_records, write_records
from ehi.train.logs import MetricLog
from ehi.train.processes import is_first
from experiments.evaluation import Built, build, evaluate_budget
from experiments.inputs import Inputs
from experiments.library import build_library, lists_of
from experiments.systems import SYSTEMS, Budget, get_system
from experiments.training import Trained, run_name, train_system
from experiments.workdir import own_folder

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
