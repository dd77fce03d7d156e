"""Run every cell of a table, from nothing, and add its record to the results.

    python -m experiments.reproduce --table=T2 --dataset=pydocs --seeds=3 --workdir=DIR

Every cell prints one line on stdout, with the time left. stderr has the progress within
a cell. The same command resumes an interrupted run (SIGTERM saves the current step and
exits with 75, Ctrl-C exits with 130). A cell whose record is already in --results is
skipped if it was made by the current recipe of its system; --rerun runs it again. So
several machines can share the work by --systems and --seeds=1:2.

T4 shows choices, so it is made on dev. T6 trains on half of the documents and is run
alone. The others are made on test.

Run it in a checkout: --results is `experiments/results` of the current folder unless
given.
"""

import argparse
import functools
import importlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ehi.data.datasets import RetrievalDataset, open_dataset
from ehi.eval.provenance import config_hash
from ehi.eval.records import Cell, read_records
from ehi.files import new_folder
from ehi.parallel import preemption
from ehi.progress import log_to_stderr
from experiments.ablations import apply_variant
from experiments.command import (
    accept_any_text,
    exit_code,
    explain_interrupt,
    user_path,
)
from experiments.paper.definitions import TABLES, cells
from experiments.paper.results import collect
from experiments.run import ageing
from experiments.run.experiment import open_experiment, run_cells
from experiments.run.workdir import described
from experiments.systems import SYSTEMS, Budget, get_system

# The records of a checkout; an installed package has none.
RESULTS = Path("experiments/results")
AGEING = "T6"  # its records are of documents that come and go, not of cells


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_arguments(argv)
    return run_resumable(functools.partial(_run, args))


def run_resumable(work: Callable[[], None]) -> int:
    """Do work that the same command resumes after SIGTERM or Ctrl-C; the exit code.

    Its progress is logged on stderr.
    """
    accept_any_text()
    logging.getLogger("absl").setLevel(logging.ERROR)  # the libraries print a lot
    log_to_stderr()
    preemption.listen()
    try:
        return exit_code(work, explain_interrupt())
    except preemption.Preempted as stopped:
        print(stopped.message, file=sys.stderr)
        return stopped.code


def _run(args: argparse.Namespace) -> None:
    """Run the chosen cells."""
    results = results_folder(args.results)
    if AGEING in args.table:
        systems, split = systems_of_ageing(args), args.split or "test"
        reproduce_ageing(
            args.dataset, args.seeds, args.workdir, results, systems, split=split
        )
        return
    split = split_of(args.table, args.split)
    wanted = wanted_cells(args.table, args.systems, args.variants)
    reproduce(
        args.dataset, wanted, args.seeds, args.workdir, results,
        split=split, rerun=args.rerun,
    )  # fmt: skip


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake ends the program with a usage message."""
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce")
    parser.add_argument(
        "--table", required=True, nargs="+", choices=(*TABLES, AGEING), help="T1 ... T6"
    )
    parser.add_argument(
        "--dataset", required=True, help="pydocs, beir/<name>, or a path"
    )
    parser.add_argument(
        "--seeds",
        type=seed_range,
        default=range(3),
        help="number of seeds, or from:to (3)",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=user_path,
        help="folder for checkpoints and indexes",
    )
    parser.add_argument(
        "--results", type=user_path,
        help="folder of records, which receives every finished cell (default: "
        f"{RESULTS} of the current folder)",
    )  # fmt: skip
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, help="run only these systems"
    )
    parser.add_argument(
        "--variants", nargs="+", help="run only these variants; '' is the default"
    )
    parser.add_argument(
        "--split",
        help="split to evaluate: 'test', or 'dev' to choose (default: that of the "
        "tables)",
    )
    parser.add_argument(
        "--rerun", action="store_true",
        help="also run cells that --results has; reuse only what --workdir has",
    )  # fmt: skip
    return parser.parse_args(argv)


def results_folder(given: Path | None) -> Path:
    """Return the folder of records: the given one, or that of the checkout.

    Raises:
      ValueError: none was given, and the current folder is no checkout.
    """
    if given is not None:
        return given
    if not RESULTS.is_dir():
        raise ValueError(
            f"there is no folder {RESULTS} here; give --results=DIR, or run this in a "
            "checkout of the repository"
        )
    return RESULTS


def seed_range(text: str) -> range:
    first, _, last = text.rpartition(":")
    try:
        seeds = range(int(first or 0), int(last))
    except ValueError:
        seeds = range(0)
    if not seeds:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of seeds nor from:to"
        )
    return seeds


def systems_of_ageing(args) -> tuple[str, ...]:
    """Return the systems of T6 that were asked for.

    Raises:
      ValueError: other tables are asked for too, or none of its systems is.
    """
    if len(args.table) > 1:
        raise ValueError(f"{AGEING} has a data set of its own halves: run it alone")
    if args.variants:
        raise ValueError(f"{AGEING} runs all of its variants: leave out --variants")
    asked = args.systems or ageing.SYSTEMS
    systems = tuple(name for name in ageing.SYSTEMS if name in asked)
    if not systems:
        raise ValueError(
            f"{AGEING} has no cell of --systems={args.systems}; it has "
            f"{', '.join(ageing.SYSTEMS)}"
        )
    return systems


def reproduce_ageing(
    dataset: str, seeds, workdir: Path, results: Path, systems, *, split: str
) -> None:
    """Run T6, seed by seed, and add each record to the results."""
    for seed in seeds:
        config = config_for(dataset, "", seed, split)
        name = Path(dataset).name
        folder = workdir / name / f"seed{seed}" / "ageing"
        for part, record in ageing.age(config, folder, systems):
            print(
                f"{name} seed {seed} {record.system} {record.variant or 'whole'} "
                f"{record.split}: nDCG@10 {record.ndcg_at_10:.4f}, "
                f"{100 * record.docs_visited:.1f}% visited",
                flush=True,
            )
            collect([part], results)


def split_of(tables, given: str | None) -> str:
    """Return the split of tables: the given one, or that of their definition.

    Raises:
      ValueError: a table of choices would look at test, or the tables are of two
        splits.
    """
    splits = {name: TABLES[name].split for name in tables}
    chosen = [name for name, split in splits.items() if split == "dev"]
    if chosen and given == "test":
        raise ValueError(
            f"{', '.join(chosen)} shows choices, which are made on dev: leave out "
            "--split=test"
        )
    if given is None and len(set(splits.values())) > 1:
        named = ", ".join(f"{name} on {split}" for name, split in splits.items())
        raise ValueError(f"tables of one split at a time, not {named}")
    return given or next(iter(splits.values()))


def wanted_cells(tables, systems=None, variants=None) -> list[tuple[str, str, str]]:
    """Return (system, variant, budget) of every cell of tables, variant by variant."""
    found = [cell for name in tables for cell in cells(TABLES[name])]
    found = [
        (system, variant, budget)
        for system, variant, budget in dict.fromkeys(found)
        if (systems is None or system in systems)
        and (variants is None or variant in variants)
    ]
    if not found:
        raise ValueError(
            f"{', '.join(tables)} has no cell of --systems={systems} and "
            f"--variants={variants}"
        )
    order = list(dict.fromkeys(variant for _, variant, _ in found))
    return sorted(found, key=lambda cell: (cell[1] != "", order.index(cell[1])))


def reproduce(
    dataset: str, wanted, seeds, workdir: Path, results: Path, *,
    split: str = "test", rerun: bool = False,
) -> None:  # fmt: skip
    """Run cells, seed by seed, and add each record to the results.

    Args:
      dataset: an argument of `open_dataset`.
      wanted: (system, variant, budget) of every cell; see `wanted_cells`.
      seeds: the seeds.
      workdir: receives a folder for each (data set, seed, variant).
      results: folder of records.
      split: split to evaluate.
      rerun: also run cells that the results have.

    Raises:
      ValueError: the data set has no judgements, or the results are of another corpus.
    """
    data = open_dataset(dataset)
    name = data.name
    if not data.qrels:
        raise ValueError(
            f"{dataset} has no judgements to score; index it with experiments.main"
        )
    recipes = _recipes(results, data)
    there = {} if rerun else recipes
    progress = CellProgress(len(wanted) * len(seeds))
    for seed in seeds:
        for variant in dict.fromkeys(variant for _, variant, _ in wanted):
            config = config_for(dataset, variant, seed, split)
            todo: dict[str, list[Budget]] = {}
            for system, of, budget in wanted:
                cell = Cell(system, variant, name, split, seed, budget)
                if of != variant:
                    continue
                if there.get(cell, -1) >= get_system(system).recipe:
                    progress.skip()
                else:
                    todo.setdefault(system, []).append(Budget.parse(budget))
            folder = workdir / name / f"seed{seed}" / (variant or "default")
            if todo:
                run_variant(config, todo, folder, results, progress)


def config_for(dataset: str, variant: str, seed: int, split: str):
    """Return the config of a data set, or that of `own.py`, with a variant applied."""
    modules = {"pydocs": "pydocs", "beir/scifact": "scifact", "scifact": "scifact"}
    module = modules.get(dataset, "own")
    config = importlib.import_module(f"experiments.configs.{module}").get_config()
    config.dataset, config.seed, config.split = dataset, seed, split
    return apply_variant(config, variant)


def run_variant(config, todo, folder: Path, results: Path, progress) -> None:
    """Run the cells of one seed and variant, which share data, `dense` and fits."""
    config.systems = tuple(todo)
    experiment = open_experiment(config, folder)
    shared = folder.parent / f"dense-{_dense_key(config)}"
    _copy_dense(shared, folder)
    for system, budgets in todo.items():
        for budget, record in run_cells(experiment, system, budgets):
            progress.line(experiment.config, system, budget, record)
            if record is not None:
                collect([folder], results)
    _copy_dense(folder, shared)


def _dense_key(config) -> str:
    """Return a hash of all fields that `dense` depends on.

    Variants with the same hash share one trained `dense`.
    """
    names = ("dataset", "split", "dev_fraction", "seed", "recipe")
    names += ("tower", "pseudo", "head", "dense")
    everything = described(config)
    return config_hash({name: everything[name] for name in names}, without=())


def _copy_dense(source: Path, target: Path) -> None:
    """Copy the trained `dense`, and the fits to its embeddings, if they are new."""
    for part in ("checkpoints/dense", "starts"):
        if (source / part).exists() and not (target / part).exists():
            with new_folder(target / part, exists="keep") as made:
                shutil.copytree(source / part, made, dirs_exist_ok=True)


def _recipes(results: Path, data: RetrievalDataset) -> dict[Cell, int]:
    """Return the recipe of every record of a data set in a folder."""
    path = results / f"{data.name}.jsonl"
    records = read_records(path) if path.exists() else []
    for record in records:
        if record.corpus_sha256 != data.corpus_sha256:
            raise ValueError(
                f"{path} is of another corpus called {data.name!r}, with sha256 "
                f"{record.corpus_sha256[:12]}... instead of "
                f"{data.corpus_sha256[:12]}...; choose another --results (pydocs "
                "depends on the version of Python)"
            )
    return {record.cell: record.recipe for record in records}


class CellProgress:
    """Prints a line for every cell: its name, its result, and the time left."""

    def __init__(self, total: int, processes: int = 1):
        self._total, self._done, self._ran = total, 0, 0
        self._processes = processes  # that share the cells
        self._started = time.monotonic()

    def skip(self) -> None:
        """Count a cell that was run before, or by another process."""
        self._done += 1

    def line(self, config, system: str, budget: Budget, record) -> None:
        """Print the line of a cell that has just run."""
        self._done, self._ran = self._done + 1, self._ran + 1
        each = (time.monotonic() - self._started) / self._ran
        left = (self._total - self._done) * each / 60 / self._processes
        name = ":".join(part for part in (system, config.variant) if part)
        outcome = "over the budget"
        if record is not None:
            visited = record.docs_visited
            outcome = f"nDCG@10 {record.ndcg_at_10:.4f}, {record.bytes_per_doc:g} bytes"
            outcome += "" if visited is None else f", {100 * visited:.1f}% visited"
            if (most := record.docs_visited_max) is not None and budget.visit:
                outcome += f" (p95 {100 * record.docs_visited_p95:.1f}%, most "
                outcome += f"{100 * most:.1f}%, set on {record.budget_queries})"
        print(
            f"[{self._done}/{self._total}] {Path(config.dataset).name} seed "
            f"{config.seed} {name} {budget.name}: {outcome}; {left:.0f} min left",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
