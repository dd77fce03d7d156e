"""Train -> index -> evaluate, one command.

    python -m experiments.main --config=experiments/configs/pydocs.py --workdir=runs/x

Run again with the same workdir, it resumes what was cut off and reuses the rest.
"""

import json
import logging
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags
from rich.console import Console

from ehi.eval.records import atomic_write, read_records, write_records
from ehi.train.logs import MetricLog
from experiments.checks import check_config
from experiments.evaluation import build, evaluate_budget
from experiments.inputs import load_inputs
from experiments.showing import show
from experiments.systems import Budget, fit_to_corpus, get_system
from experiments.training import run_name, train_system

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the experiment: experiments/configs/<name>.py[:variant]",
    lock_config=True,
)  # fmt: skip
WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder for everything that is written", required=True
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None,
    "workdir of a finished run of this config: index another corpus or score another "
    "split with its parameters, without training",
)  # fmt: skip
TENSORBOARD = flags.DEFINE_bool(
    "tensorboard", False, "also write TensorBoard events (extra `tensorboard`)"
)

LOG = logging.getLogger("ehi")

# Changing these adds rows to a workdir; changing anything else is another experiment.
FREE_FIELDS = ("systems", "budgets")


def run(
    config, workdir: Path, checkpoint: Path | None = None, tensorboard: bool = False
) -> None:
    """Train, index and evaluate every system of a config, then show what was won."""
    check_config(config)
    claim(config, workdir)
    if checkpoint is not None:
        config = with_tree_of(config, checkpoint)
    inputs = load_inputs(config)
    config = fit_to_corpus(config, len(inputs.dataset.documents))
    write_config(config, workdir)
    events = workdir / "tensorboard" if tensorboard else None
    log, trained, built = MetricLog(workdir / "metrics.jsonl", events), {}, {}
    for name in config.systems:
        for compression, budgets in _runs(config, name):
            run = run_name(name, compression)
            LOG.info("%s: train", run)
            result = train_system(
                config, name, compression, inputs, workdir, log, trained, checkpoint
            )
            LOG.info("%s: index", run)
            built[run] = build(
                config, result, inputs, _index_path(config, workdir, run)
            )
            for budget in budgets:
                _evaluate(config, name, budget, built[run], result, inputs, workdir)
    show(config, workdir, inputs, trained, built)


def claim(config, workdir: Path) -> None:
    """Refuse a workdir that holds another experiment, before anything is touched."""
    path = workdir / "config.json"
    ours = json.loads(config.to_json())
    if path.exists():
        theirs = json.loads(path.read_text())
        if not ours["tree"]["branching"]:  # to be chosen, as it was then
            ours["tree"]["branching"] = theirs["tree"]["branching"]
        names = sorted(set(ours) | set(theirs))
        differ = [
            name
            for name in names
            if name not in FREE_FIELDS and ours.get(name) != theirs.get(name)
        ]
        if differ:
            raise ValueError(
                f"{workdir} holds another experiment: its config.json differs in "
                f"{', '.join(differ)}; choose another --workdir (nothing was changed)"
            )
        LOG.info("%s: reusing what is complete, resuming what is not", workdir)


def write_config(config, workdir: Path) -> None:
    """Write config.json, with what was chosen to fit the corpus."""
    text = json.dumps(json.loads(config.to_json()), indent=2) + "\n"
    atomic_write(workdir / "config.json", text.encode())


def with_tree_of(config, finished: Path):
    """The config with the number of leaves that a finished run was trained with."""
    path = finished / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"--checkpoint={finished} holds no finished run")
    config = config.copy_and_resolve_references()
    config.tree.branching = json.loads(path.read_text())["tree"]["branching"]
    return config


def _runs(config, name: str):
    """The compressions that the budgets ask of a system, and the budgets of each."""
    system, by_compression = get_system(name), {}
    for budget in map(Budget.parse, config.budgets):
        if budget.applies_to(system):
            by_compression.setdefault(budget.compression, []).append(budget)
    return by_compression.items()


def _index_path(config, workdir: Path, run: str) -> Path:
    """The last run of a config is the one that is served: its index is `index`."""
    name = config.systems[-1]
    last = [run_name(name, compression) for compression, _ in _runs(config, name)][-1]
    return workdir / "index" if run == last else workdir / "indexes" / run


def _evaluate(config, name, budget, built, trained, inputs, workdir) -> None:
    """Add the record of one cell, unless it is there already."""
    path = workdir / "results.jsonl"
    if not len(inputs.eval_rows):
        return
    for record in read_records(path) if path.exists() else ():
        if (record.system, record.budget) == (name, budget.name):
            LOG.info("%s %s: already evaluated, reused", name, budget.name)
            return
    LOG.info("%s %s: evaluate", name, budget.name)
    record = evaluate_budget(
        config, built, trained, inputs, name, budget, workdir / "trec"
    )
    if record is not None:
        write_records(path, [record])


def main(_) -> None:
    _speak()
    try:
        checkpoint = None if CHECKPOINT.value is None else Path(CHECKPOINT.value)
        run(CONFIG.value, Path(WORKDIR.value), checkpoint, TENSORBOARD.value)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        # A user's mistake is one sentence; --verbosity=1 shows where it was noticed.
        LOG.debug("traceback", exc_info=True)
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True)
        raise SystemExit(1) from None


def _speak() -> None:
    """Our own progress on stderr; of the libraries below, warnings only."""
    verbose = absl_logging.get_verbosity() > 0
    absl_logging.set_verbosity("debug" if verbose else "warning")
    LOG.setLevel(logging.DEBUG if verbose else logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    LOG.addHandler(handler)
    LOG.propagate = False


if __name__ == "__main__":
    app.run(main)
