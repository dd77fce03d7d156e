"""Compare the scores of quantised documents on a dev split, without training again.

    python -m experiments.run.scores --config=experiments/configs/pydocs.py \\
        --workdir=DIR --config.systems="('opq', 'kmeans-tree-opq')"

Each system is trained, or taken from the workdir, and its index is built once for each
score. What a phase trains by stays the same in all rows: `PHASE.score` of the config,
or if that is empty the system's own score, which --config.leaves.score overrides. A
tree also has a column for every leaf visited. With --checkpoint=RUN the
parameters are those of a finished run. Nothing is scored on test. `scores.jsonl` in the
workdir has the same numbers.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from ehi.eval.measure import curve
from ehi.index import build_index
from ehi.index.search.codes import SCORES
from ehi.model.export import index_arrays
from ehi.parallel import preemption
from experiments.command import exit_code, explain_interrupt, user_path
from experiments.main import (
    CHECKPOINT,
    CONFIG,
    WORKDIR,
    parse_flags,
    speak,
)
from experiments.run.evaluate import budget_queries, search_setting
from experiments.run.experiment import Experiment, open_experiment
from experiments.run.library import replace_lines
from experiments.run.train import run_name, train_system
from experiments.systems import Budget, config_of, get_system, score_of

SPLIT = "dev"

LOG = logging.getLogger("ehi")


def compare(
    config, workdir: Path, checkpoint: Path | None = None
) -> dict[str, dict[tuple[str, str], float]]:
    """Print a table of each system: nDCG@10 by score and budget.

    Args:
      config: the base config; its split becomes 'dev'.
      workdir: as of `experiments.main`.
      checkpoint: workdir of a finished run, or None to train.

    Returns:
      system -> (score, name of a budget) -> nDCG@10.

    Raises:
      ValueError: a system has no quantised documents, or a library builds it.
    """
    for name in config.systems:
        system = get_system(name)
        if system.library or not system.pq:
            raise ValueError(f"{name} has no PQ leaves of ours, so it has one score")
    config = config.copy_and_resolve_references()
    config.split = SPLIT
    experiment = open_experiment(config, workdir, source=checkpoint)
    found = {}
    for name in experiment.config.systems:
        found[name] = dict(measure_scores(experiment, name))
        print_table(experiment, name, found[name])
        _write(experiment, name, found[name])
    return found


def measure_scores(
    experiment: Experiment, name: str
) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield ((score, name of a budget), nDCG@10) of a system."""
    config, inputs, system = experiment.config, experiment.inputs, get_system(name)
    budgets = [Budget.parse(budget) for budget in config.budgets]
    budgets = [b for b in budgets if b.compression and (system.tree or not b.visit)]
    for compression in dict.fromkeys(budget.compression for budget in budgets):
        trained = train_system(
            config, name, compression, inputs, experiment.workdir, experiment.log,
            experiment.trained, experiment.source,
        )  # fmt: skip
        arrays = index_arrays(trained.graphdef, trained.params)
        setters = trained.queries[budget_queries(inputs, config.split)[1]]
        for score in SCORES:
            LOG.info("%s: %s", run_name(name, compression), score)
            index = build_index(
                trained.documents, inputs.dataset.doc_ids, **arrays | {"score": score},
                spill=config_of(config, name).tree.spill, leaves=trained.leaves,
            )  # fmt: skip
            for budget in budgets:
                if budget.compression != compression:
                    continue
                setting = {"beam": index.num_leaves}
                if budget.visit is not None:
                    setting = search_setting(config, index, setters, budget.visit)
                if None in setting.values():
                    continue  # one leaf exceeds the budget
                points = curve(
                    index, trained.queries[inputs.eval_rows], inputs.eval_ids,
                    inputs.dataset.qrels[config.split], [setting],
                    ignore_identical_ids=inputs.identical_ids,
                )  # fmt: skip
                yield (score, budget.name), points[0][1]


def _write(experiment: Experiment, name: str, values: dict) -> None:
    """Write `scores.jsonl`, for the table of what was tried on dev."""
    config = experiment.config
    own = score_of(config, get_system(name))
    cell = {
        "system": name, "variant": config.variant,
        "dataset": experiment.inputs.dataset.name, "seed": config.seed,
        "queries": SPLIT,
    }  # fmt: skip
    lines = [
        cell | {"budget": budget, "options": score} | {"ndcg@10": round(value, 6)}
        | {"kept": score == own}
        for (score, budget), value in values.items()
    ]  # fmt: skip
    replace_lines(experiment.workdir / "scores.jsonl", cell, lines)


def print_table(experiment: Experiment, name: str, values: dict) -> None:
    """Print nDCG@10 by score and budget; the score of the system is marked."""
    own = score_of(experiment.config, get_system(name))
    budgets = list(dict.fromkeys(budget for _, budget in values))
    print(f"\n| {name} | {' | '.join(budgets)} |\n|---|{'---|' * len(budgets)}")
    for score in SCORES:
        row = (values.get((score, budget)) for budget in budgets)
        shown = " | ".join("-" if value is None else f"{value:.4f}" for value in row)
        print(f"| {score}{' (its own)' if score == own else ''} | {shown} |")


def main(_) -> None:
    speak()
    preemption.listen()
    code = exit_code(_run, explain_interrupt())
    if code:
        raise SystemExit(code)


def _run() -> None:
    for flag in (CONFIG, WORKDIR):
        if flag.value is None:
            raise ValueError(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help}")
    checkpoint = CHECKPOINT.value and user_path(CHECKPOINT.value)
    compare(CONFIG.value, user_path(WORKDIR.value), checkpoint)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
