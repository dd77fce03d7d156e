"""Train -> index -> evaluate, in one command.

    python -m experiments.main --config=experiments/configs/pydocs.py --workdir=runs/x

The same command with the same workdir resumes an interrupted run and reuses what is
complete. SIGTERM saves the current step and exits with code 75, Ctrl-C exits with 130:
run the command again.

On several machines, run the same command on each, with a workdir that all can see.
Slurm, Open MPI and Kubernetes jobs are recognised; elsewhere add
--coordinator=HOST:PORT --num_processes=N --process_id=0 (1, 2, ...). If a process is
lost, the others exit with code 69, or jax aborts them (134): start all again.
"""

import logging
import sys
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags
from rich.console import Console

from ehi.parallel import preemption, processes
from ehi.progress import log_to_stderr
from experiments.command import (
    EXPLAINED,
    INTERRUPTED,
    accept_any_text,
    explain_flags,
    explain_interrupt,
    user_path,
)
from experiments.run.dry_run import dry_run, show_dry_run
from experiments.run.experiment import default_budgets, open_experiment, run_cells
from experiments.run.memory import plan_memory
from experiments.run.report import show

CONFIG_HELP = "the experiment, experiments/configs/<name>.py[:variant]"
CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP, lock_config=True)
WORKDIR_HELP = "folder for everything that is written"
WORKDIR = flags.DEFINE_string("workdir", None, WORKDIR_HELP)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None,
    "workdir of a finished run of this config; index another corpus, or score another "
    "split, with its parameters and without training",
)  # fmt: skip
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False,
    "compile the real step of every phase on abstract arrays, and print its shapes, "
    "memory and estimated time; needs no data, weights or workdir",
)  # fmt: skip
MEMORY_GIB = flags.DEFINE_float(
    "memory_gib", None,
    "with --dry_run: refuse phases that need more GiB per device than this "
    "(default: what the device has)",
)  # fmt: skip
TENSORBOARD = flags.DEFINE_bool(
    "tensorboard", False, "also write TensorBoard events (extra `tensorboard`)"
)

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, if no launcher sets it"
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "number of processes, if no launcher sets it"
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "number of this process from 0, if no launcher sets it"
)

LOG = logging.getLogger("ehi")


def run(
    config, workdir: Path, checkpoint: Path | None = None, tensorboard: bool = False
) -> None:
    """Train, index and evaluate every system of a config, then print the results.

    If several processes call this together, all train and process 0 does the rest.
    """
    experiment = open_experiment(
        config, workdir, source=checkpoint, tensorboard=tensorboard
    )
    for name in experiment.config.systems:
        for _ in run_cells(experiment, name, default_budgets(experiment.config, name)):
            pass
    if processes.is_first():
        show(experiment)
    processes.barrier("the end")


def main(_) -> None:
    accept_any_text()
    speak()
    try:
        if CONFIG.value is None:
            raise ValueError(f"--config is missing: {CONFIG_HELP}")
        if DRY_RUN.value:
            show_dry_run(
                dry_run(CONFIG.value),
                memory_gib=MEMORY_GIB.value,
                plan=plan_memory(CONFIG.value),
            )
            return
        if WORKDIR.value is None:
            raise ValueError(f"--workdir is missing: the {WORKDIR_HELP}")
        checkpoint = CHECKPOINT.value and user_path(CHECKPOINT.value)
        processes.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        preemption.listen()
        if not processes.is_first():
            LOG.setLevel(max(LOG.level, logging.WARNING))
        if jax.process_count() > 1:
            LOG.info(
                "%d processes, %d devices", jax.process_count(), jax.device_count()
            )
        run(CONFIG.value, user_path(WORKDIR.value), checkpoint, TENSORBOARD.value)
    except preemption.Preempted as stopped:
        print(stopped.message, file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(explain_interrupt(), file=sys.stderr)
        processes.leave(INTERRUPTED)
    except Exception as error:
        # A user's mistake gives one sentence; --verbosity=1 adds the traceback.
        LOG.debug("traceback", exc_info=True)
        if processes.is_loss(error):
            print(processes.explain_loss(error), file=sys.stderr)
            processes.leave(processes.LOST)
        if not isinstance(error, EXPLAINED):
            raise
        say_error(error)
        processes.leave(1)


def parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parse the command line for `app.run`; report a mistake in one sentence."""
    try:
        return values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        say_error(explain_flags(error))
        sys.exit(1)


def say_error(error) -> None:
    """Print an error on stderr."""
    console = Console(stderr=True)
    console.print("[red]error:[/red] ", end="")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)


def speak() -> None:
    """Log our own progress on stderr, and only warnings of the libraries."""
    verbose = absl_logging.get_verbosity() > 0
    absl_logging.set_verbosity("debug" if verbose else "warning")
    log_to_stderr(logging.DEBUG if verbose else logging.INFO)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
