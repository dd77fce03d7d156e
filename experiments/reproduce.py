"""The records of a table, from nothing.

python -m experiments.reproduce --table=T2 --dataset=pydocs --seeds=3 --workdir=DIR

One line a cell, with what is left. Stopped and started again it goes on where it was
(SIGTERM saves the step under way and exits with 75); a cell that --results has already,
made since the recipe of its system last changed, is not run again unless --rerun says
so, so several machines can share the work (--systems, --seeds=1:2).
"""

import argparse
import importlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ehi.data.datasets import RetrievalDataset, open_dataset
from ehi.eval.provenance import config_hash
from ehi.eval.records import Cell, read_records
from ehi.parallel import preemption
from ehi.train.logs import MetricLog
from experiments.ablations import apply_variant
from experiments.paper.definitions import TABLES, cells
from experiments.paper.results import collect
from experiments.run.checks import check_config, check_corpus
from experiments.run.evaluate import Experiment, run_cells
from experiments.run.prepare import load_inputs
from experiments.run.workdir import claim, claim_inputs, write_config
from experiments.systems import SYSTEMS, Budget, fit_to_corpus, get_system

LOG = logging.getLogger("ehi")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = parse_arguments(argv)
    # The libraries below have more to say than anybody wants to read.
    logging.getLogger("absl").setLevel(logging.ERROR)
    preemption.listen()
    try:
        wanted = wanted_cells(args.table, args.systems, args.variants)
        reproduce(
            args.dataset, wanted, args.seeds, args.workdir, args.results,
            split=args.split, rerun=args.rerun,
        )  # fmt: skip
    except preemption.Preempted as stopped:
        print(stopped.message, file=sys.stderr)
        return stopped.code
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the program with a usage message."""
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce")
    parser.add_argument(
        "--table", required=True, nargs="+", choices=tuple(TABLES), help="T1 ... T5"
    )
    parser.add_argument(
        "--dataset", required=True, help="pydocs, beir/<name>, a BEIR folder or zip"
    )
    parser.add_argument(
        "--seeds", type=_seeds, default=range(3), help="how many, or from:to"
    )
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder of committed records, to which every finished cell is added",
    )
    parser.add_argument("--systems", nargs="+", help="only these", choices=SYSTEMS)
    parser.add_argument("--variants", nargs="+", help="only these; '' is the default")
    parser.add_argument("--split", default="test", help="'dev' while choosing")
    parser.add_argument(
        "--rerun", action="store_true",
        help="also cells that --results has; what --workdir has is still reused",
    )  # fmt: skip
    return parser.parse_args(argv)


def _seeds(text: str) -> range:
    first, _, last = text.rpartition(":")
    try:
        seeds = range(int(first or 0), int(last))
    except ValueError:
        seeds = range(0)
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seeds, nor from:to")
    return seeds


def wanted_cells(tables, systems=None, variants=None) -> list[tuple[str, str, str]]:
    """(system, variant, budget) of tables, those of one variant together."""
    found = [cell for name in tables for cell in cells(TABLES[name])]
    found = [
        (system, variant, budget)
        for system, variant, budget in dict.fromkeys(found)
        if (systems is None or system in systems)
        and (variants is None or variant in variants)
    ]
    if not found:
        raise ValueError(
            f"no cell of {', '.join(tables)} is of --systems={systems} and "
            f"--variants={variants}"
        )
    order = list(dict.fromkeys(variant for _, variant, _ in found))
    return sorted(found, key=lambda cell: (cell[1] != "", order.index(cell[1])))


def reproduce(
    dataset: str, wanted, seeds, workdir: Path, results: Path, *,
    split: str = "test", rerun: bool = False,
) -> None:  # fmt: skip
    """Run cells, seed after seed, and add each to the results.

    Args:
      dataset: as `open_dataset` takes it.
      wanted: (system, variant, budget), see `wanted_cells`.
      seeds: numbers of the seeds.
      workdir: gets a folder for each (data set, seed, variant).
      results: folder of records.
      split: what is evaluated.
      rerun: also cells that the results have already.

    Raises:
      ValueError: nothing can be scored, or the results are of another corpus.
    """
    data = open_dataset(dataset)
    name = data.name
    if not data.qrels:
        raise ValueError(
            f"{dataset} has no judgements to score; experiments.main indexes it"
        )
    recipes = _recipes(results, data)
    there = {} if rerun else recipes
    progress = _Progress(len(wanted) * len(seeds))
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
                _run_variant(config, todo, folder, results, progress)


def config_for(dataset: str, variant: str, seed: int, split: str):
    """The config of a data set, if it has one, with a variant's overrides."""
    modules = {"pydocs": "pydocs", "beir/scifact": "scifact", "scifact": "scifact"}
    module = modules.get(dataset, "own")
    config = importlib.import_module(f"experiments.configs.{module}").get_config()
    config.dataset, config.seed, config.split = dataset, seed, split
    return apply_variant(config, variant)


def _run_variant(config, todo, folder: Path, results: Path, progress) -> None:
    """The cells of one seed and variant, which share data, `dense` and fits."""
    config.systems = tuple(todo)
    check_config(config)
    claim(config, folder)
    shared = folder.parent / f"dense-{_made_of(config)}"
    _copy_dense(shared, folder)
    inputs = load_inputs(config)
    claim_inputs(inputs, folder)
    config = fit_to_corpus(config, len(inputs.dataset.documents))
    check_corpus(
        config, len(inputs.dataset.documents), inputs.pretrained.config["width"]
    )
    write_config(config, folder)
    log = MetricLog(folder / "metrics.jsonl", None)
    experiment = Experiment(config, inputs, folder, log)
    for system, budgets in todo.items():
        for budget, record in run_cells(experiment, system, budgets):
            progress.line(config, system, budget, record)
            if record is not None:
                collect([folder], results)
    _copy_dense(folder, shared)


def _made_of(config) -> str:
    """Names what `dense` depends on: variants that agree in it share one."""
    names = ("dataset", "split", "dev_fraction", "seed", "recipe")
    names += ("tower", "pseudo", "head", "dense")
    everything = json.loads(config.to_json())
    return config_hash({name: everything[name] for name in names}, without=())


def _copy_dense(source: Path, target: Path) -> None:
    """Copy the trained `dense` and the fits to its embeddings, where they are new."""
    for part in ("checkpoints/dense", "starts"):
        if (source / part).exists() and not (target / part).exists():
            temporary = target / f"{part}.tmp"
            shutil.copytree(source / part, temporary, dirs_exist_ok=True)
            os.replace(temporary, target / part)


def _recipes(results: Path, data: RetrievalDataset) -> dict[Cell, int]:
    """The recipe of every record of a data set in a folder."""
    path = results / f"{data.name}.jsonl"
    records = read_records(path) if path.exists() else []
    for record in records:
        if record.corpus_sha256 != data.corpus_sha256:
            raise ValueError(
                f"{path} is of another corpus called {data.name!r}, with sha256 "
                f"{record.corpus_sha256[:12]}... and not {data.corpus_sha256[:12]}...: "
                "choose another --results (pydocs depends on the version of Python)"
            )
    return {record.cell: record.recipe for record in records}


class _Progress:
    """One line a cell: what it is, what came out, and how long the rest may take."""

    def __init__(self, total: int):
        self._total, self._done, self._ran = total, 0, 0
        self._started = time.monotonic()

    def skip(self) -> None:
        """Count a cell that is there already."""
        self._done += 1

    def line(self, config, system: str, budget: Budget, record) -> None:
        """Print the line of a cell that was just run."""
        self._done, self._ran = self._done + 1, self._ran + 1
        each = (time.monotonic() - self._started) / self._ran
        left = (self._total - self._done) * each / 60
        name = ":".join(part for part in (system, config.variant) if part)
        outcome = "over the budget"
        if record is not None:
            visited = record.docs_visited
            outcome = f"nDCG@10 {record.ndcg_at_10:.4f}, {record.bytes_per_doc:g} bytes"
            outcome += "" if visited is None else f", {100 * visited:.1f}% visited"
        print(
            f"[{self._done}/{self._total}] {Path(config.dataset).name} seed "
            f"{config.seed} {name} {budget.name}: {outcome}; {left:.0f} min left",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
