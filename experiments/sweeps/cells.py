"""The cells of a sweep: run one by one, by any number of processes.

A process holds the lock of the cell that it runs, and the lock of what cells share
while it makes that. A lock ends with its process, so a killed sweep leaves none.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

from ehi.eval.provenance import config_hash
from ehi.files import atomic_write
from ehi.train.logs import MetricLog
from ehi.train.recipes import RECIPES
from experiments import reproduce
from experiments.paper.results import collect
from experiments.run.experiment import Experiment, open_experiment, run_cells
from experiments.run.train import fit_starts_of, train_system
from experiments.run.workdir import described
from experiments.sweeps.plan import Sweep, ancestry
from experiments.sweeps.table import write_tables
from experiments.systems import Budget, get_system

# Fields that `dense` does not depend on, besides the sections of other phases.
NOT_OF_DENSE = (
    "tree", "leaves", "index", "systems", "budgets", "variant", "library_parent",
    "sizes", "ignore_identical_ids", *(name for name in RECIPES if name != "dense"),
)  # fmt: skip


def run_sweep(sweep: Sweep, processes: int = 1) -> None:
    """Run every cell that is not finished and that no other process is running.

    At last, wait for the cells of other processes, and take over from those that end.
    """
    left = sweep.cells()
    progress = reproduce.CellProgress(len(left), processes)
    for wait in (False, True):
        for cell in tuple(left):
            with lock(sweep.folder(*cell), wait) as ours:
                if not ours:
                    continue
                left.remove(cell)
                if sweep.finished(*cell) is not None:
                    progress.skip()
                    continue
                _run_cell(sweep, *cell, progress)
                update_tables(sweep)


def _run_cell(sweep: Sweep, seed: int, system: str, cell: str, progress) -> None:
    """Train and evaluate a cell, and add its record to the results."""
    folder, config = sweep.folder(seed, system, cell), sweep.config(system, cell, seed)
    budget = Budget.parse(sweep.budgets[system])
    end = {"over the budget": True}
    try:
        experiment = open_experiment(config, folder)
        _share(experiment, system, budget, folder.parent)
        for _, record in run_cells(experiment, system, [budget]):
            if record is not None:
                end = {}
                with lock(sweep.workdir / "results"):
                    collect([folder], sweep.workdir / "results")
            progress.line(experiment.config, system, budget, record)
    except FloatingPointError as error:  # the others go on
        end = {"diverged": str(error)}
        print(f"seed {seed} {system}:{cell} diverged: {error}", flush=True)
    path = sweep.end_file(seed, system, cell)
    atomic_write(path, (json.dumps(end) + "\n").encode())


def _share(experiment: Experiment, system: str, budget: Budget, folder: Path) -> None:
    """Train `dense` and fit the starts of a cell, or take those of another cell."""
    config = experiment.config
    if "dense" not in ancestry(config, system):
        return
    shared = folder / f"dense-{dense_key(config)}"
    with lock(shared):  # the others wait for what they need too
        train_system(
            config, "dense", None, experiment.inputs, shared,
            MetricLog(shared / "metrics.jsonl"), experiment.trained,
        )  # fmt: skip
        if get_system(system).parent == "dense":
            fit_starts_of(
                config, system, budget.compression, experiment.inputs,
                experiment.trained["dense"], shared,
            )  # fmt: skip
    starts = experiment.workdir / "starts"
    if not starts.exists():
        starts.unlink(missing_ok=True)
        starts.symlink_to(Path("..") / shared.name / "starts")


def dense_key(config) -> str:
    """Return a hash of the fields that a trained `dense` depends on."""
    return config_hash(described(config), without=NOT_OF_DENSE)


def update_tables(sweep: Sweep) -> str:
    """Write the table of the finished cells; return its Markdown."""
    with lock(sweep.workdir / "results"):
        return write_tables(sweep)


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file or folder; yields False if another process has it.

    The lock ends with the process in any case.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
