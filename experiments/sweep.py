"""Try settings of systems on a dev split: the same trials for each, by one command.

    python -m experiments.sweep --systems jpq ehi-pq --budget=flat-64x \\
        --dataset=pydocs --workdir=DIR

A trial changes one thing in every phase of a system: its rates, its steps, the
documents that a query is compared with, or how codes are scored. Every finished trial
is one record in DIR/results, its variant is the trial's name, and the same command
resumes an interrupted sweep. The last lines are a table of each system, the best trial
first. Nothing is ever scored on test.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ehi.eval.records import Record, read_records
from experiments import reproduce
from experiments.command import user_path
from experiments.systems import SYSTEMS, Budget, get_system

SPLIT = "dev"
HEADS = ("tower", "query_tower", "head", "query_head")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_arguments(argv)
    return reproduce.run_resumable(functools.partial(_run, args))


def _run(args: argparse.Namespace) -> None:
    """Run the sweep of a command line."""
    sweep(
        args.dataset, args.systems, args.budget, args.workdir,
        trials=args.trials, seeds=args.seeds,
    )  # fmt: skip


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake ends the program with a usage message."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep")
    trained = [name for name, system in SYSTEMS.items() if system.phases]
    parser.add_argument("--systems", required=True, nargs="+", choices=trained)
    parser.add_argument(
        "--budget", required=True, help="'visit-10-64x', 'flat-64x', ..."
    )
    parser.add_argument("--dataset", required=True, help="as in experiments.reproduce")
    parser.add_argument(
        "--workdir", required=True, type=user_path, help="folder for all that is made"
    )
    parser.add_argument(
        "--trials", nargs="+", default=tuple(TRIALS), choices=tuple(TRIALS),
        help="run only these; 'as-it-is' is the recipe",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=reproduce.seed_range, default=range(1),
        help="number of seeds, or from:to (1)",
    )  # fmt: skip
    return parser.parse_args(argv)


def sweep(
    dataset: str, systems: Sequence[str], budget: str, workdir: Path, *,
    trials: Sequence[str], seeds: Sequence[int] = (0,),
) -> None:  # fmt: skip
    """Run every trial of every system that is not yet recorded, then print tables.

    Args:
      dataset: an argument of `open_dataset`.
      systems: names of trained systems.
      budget: name of the budget of all records.
      workdir: receives a folder for each trial, and `results`.
      trials: keys of `TRIALS`.
      seeds: the seeds.

    Raises:
      ValueError: the budget does not fit a system, or the data set has no dev split and
        no train split to carve one from.
    """
    of_bytes = Budget.parse(budget).compression is not None
    for name in systems:
        if of_bytes != get_system(name).pq:
            raise ValueError(
                f"budget {budget!r} does not apply to {name}: a budget of bytes needs "
                "PQ leaves"
            )
    wanted = [
        (seed, name, trial)
        for seed in seeds
        for name in systems
        for trial in trials
        if get_system(name).pq or not trial.startswith("score-")  # raw leaves are exact
    ]
    progress = reproduce.CellProgress(len(wanted))
    results = workdir / "results"
    for seed, name, trial in wanted:
        if _recorded(results, name, trial, seed, budget):
            progress.skip()
            continue
        config = reproduce.config_for(dataset, "", seed, SPLIT)
        config.update_from_flattened_dict(overrides(config, name, trial))
        config.variant = trial
        folder = workdir / f"seed{seed}" / f"{name}-{trial}"
        todo = {name: [Budget.parse(budget)]}
        reproduce.run_variant(config, todo, folder, results, progress)
    for name in systems:
        print_table(name, [r for r in _records(results) if r.system == name])


def overrides(config, system: str, trial: str) -> dict[str, object]:
    """Dotted config fields that a trial changes -> their values.

    >>> from experiments.configs import base
    >>> overrides(base.get_config(), "jtr", "steps-double")["jtr.steps"]
    800
    """
    if isinstance(TRIALS[trial], Mapping):
        return dict(TRIALS[trial])
    changed = {}
    for phase in get_system(system).phases:
        for field, value in TRIALS[trial](config[phase]).items():
            changed[f"{phase}.{field}"] = value
    return changed


def _rates(times: float, chosen: Callable[[str], bool]) -> Callable:
    def change(phase) -> Mapping[str, object]:
        return {
            f"rates.{group}": times * rate
            for group, rate in phase.rates.items()
            if rate and chosen(group)
        }

    return change


def _times(times: int, *fields: str) -> Callable:
    return lambda phase: {field: times * phase[field] for field in fields}


# Name -> changed fields, or a function: section of a phase -> its changed fields.
TRIALS: dict[str, Callable | Mapping] = {
    "as-it-is": lambda phase: {},
    "heads-third": _rates(1 / 3, lambda group: group in HEADS),
    "heads-triple": _rates(3.0, lambda group: group in HEADS),
    "index-third": _rates(1 / 3, lambda group: group not in HEADS),
    "index-triple": _rates(3.0, lambda group: group not in HEADS),
    "steps-double": _times(2, "steps"),
    "steps-five": _times(5, "steps"),
    "pool-double": _times(2, "pool", "top_k"),
    "score-ip": {"leaves.score": "ip"},
    "score-l2": {"leaves.score": "l2"},
    "score-cosine": {"leaves.score": "cosine"},
}


def print_table(system: str, records: Sequence[Record]) -> None:
    """Print the trials of a system, best mean nDCG@10 over the seeds first."""
    by_trial: dict[str, list[Record]] = {}
    for record in records:
        by_trial.setdefault(record.variant, []).append(record)

    def mean(trial: str, field: str) -> float:
        return sum(getattr(r, field) for r in by_trial[trial]) / len(by_trial[trial])

    print(f"\n| {system} | nDCG@10 | R@100 | train s | seeds |\n|---|---|---|---|---|")
    for trial in sorted(by_trial, key=lambda trial: -mean(trial, "ndcg_at_10")):
        print(
            f"| {trial} | {mean(trial, 'ndcg_at_10'):.4f} | "
            f"{mean(trial, 'recall_at_100'):.4f} | {mean(trial, 'train_seconds'):.0f} "
            f"| {len(by_trial[trial])} |"
        )


def _recorded(results: Path, system: str, trial: str, seed: int, budget: str) -> bool:
    return any(
        (r.system, r.variant, r.seed, r.budget) == (system, trial, seed, budget)
        for r in _records(results)
    )


def _records(results: Path) -> list[Record]:
    return [record for path in results.glob("*.jsonl") for record in read_records(path)]


if __name__ == "__main__":
    sys.exit(main())
