"""Train -> index -> evaluate, one command.

    python -m experiments.main --config=experiments/configs/pydocs.py --workdir=runs/x

Run again with the same workdir, it resumes what was cut off and reuses the rest.
"""

import logging
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags
from rich.console import Console

from ehi.train.logs import MetricLog
from experiments.cells import Experiment, default_budgets, run_cells
from experiments.checks import check_config
from experiments.dry_run import dry_run, show_dry_run
from experiments.inputs import load_inputs
from experiments.showing import show
from experiments.systems import fit_to_corpus
from experiments.workdir import claim, with_tree_of, write_config

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the experiment: experiments/configs/<name>.py[:variant]",
    lock_config=True,
)  # fmt: skip
WORKDIR = flags.DEFINE_string("workdir", None, "folder for everything that is written")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None,
    "workdir of a finished run of this config: index another corpus or score another "
    "split with its parameters, without training",
)  # fmt: skip
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False,
    "compile the real step of every phase on abstract arrays and print its shapes, "
    "memory and estimated time; needs no data, weights or workdir",
)  # fmt: skip
TENSORBOARD = flags.DEFINE_bool(
    "tensorboard", False, "also write TensorBoard events (extra `tensorboard`)"
)

LOG = logging.getLogger("ehi")


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
    log = MetricLog(workdir / "metrics.jsonl", events)
    experiment = Experiment(config, inputs, workdir, log, checkpoint)
    for name in config.systems:
        for _ in run_cells(experiment, name, default_budgets(config, name)):
            pass
    show(config, workdir, inputs, experiment.trained, experiment.built)


def main(_) -> None:
    _speak()
    try:
        if DRY_RUN.value:
            show_dry_run(dry_run(CONFIG.value))
            return
        if WORKDIR.value is None:
            raise ValueError("--workdir is missing: the folder for what is written")
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
