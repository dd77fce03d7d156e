"""Train -> index -> evaluate, one command.

    python -m experiments.main --config=experiments/configs/pydocs.py --workdir=runs/x

Run again with the same workdir, it resumes what was cut off and reuses the rest.
SIGTERM saves the step that is under way and exits with code 75: run it again.

On several machines the same command is run on each, with a workdir that all can see;
Slurm, Open MPI and Kubernetes jobs are recognised, elsewhere add
--coordinator=HOST:PORT --num_processes=N --process_id=0 (1, 2, ...). If one is lost,
the others exit with code 69, or jax aborts them (134): start all again.
"""

import logging
import sys
from pathlib import Path

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags
from rich.console import Console

import ehi
from ehi.parallel import preemption, processes
from ehi.train.logs import MetricLog
from experiments.run.checks import check_config, check_corpus
from experiments.run.dry_run import dry_run, show_dry_run
from experiments.run.evaluate import Experiment, default_budgets, run_cells
from experiments.run.prepare import load_inputs
from experiments.run.report import show
from experiments.run.workdir import claim, claim_inputs, with_tree_of, write_config
from experiments.systems import fit_to_corpus

CONFIG_HELP = "the experiment: experiments/configs/<name>.py[:variant]"
CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP, lock_config=True)
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
MEMORY_GIB = flags.DEFINE_float(
    "memory_gib", None, "of --dry_run: refuse what needs more of a device (its own)"
)
TENSORBOARD = flags.DEFINE_bool(
    "tensorboard", False, "also write TensorBoard events (extra `tensorboard`)"
)

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where no launcher says it"
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "processes that train together, where no launcher says it"
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "which of them this is, from 0, where no launcher says it"
)

LOG = logging.getLogger("ehi")

# Errors whose message is one sentence for the user.
EXPLAINED = (ValueError, OSError, FloatingPointError, ImportError)


def run(
    config, workdir: Path, checkpoint: Path | None = None, tensorboard: bool = False
) -> None:
    """Train, index and evaluate every system of a config, then show what was won.

    Of several processes that call this together, all train and process 0 does the rest.
    """
    check_config(config)
    processes.agree("config", config.to_json())
    processes.agree("code", _code())
    claim(config, workdir)
    if checkpoint is not None:
        config = with_tree_of(config, checkpoint)
    # Where the processes share a cache, the first downloads and prepares for all. A
    # frozen tower's outputs every process encodes for itself, in no more time.
    with processes.first_alone():
        inputs = load_inputs(config)
    claim_inputs(inputs, workdir, checkpoint)
    processes.agree("data", _data(inputs))
    config = fit_to_corpus(config, len(inputs.dataset.documents))
    check_corpus(
        config, len(inputs.dataset.documents), inputs.pretrained.config["width"]
    )
    write_config(config, workdir)
    events = workdir / "tensorboard" if tensorboard else None
    first = processes.is_first()
    log = MetricLog(workdir / "metrics.jsonl", events, writes=first)
    experiment = Experiment(config, inputs, workdir, log, checkpoint)
    for name in config.systems:
        for _ in run_cells(experiment, name, default_budgets(config, name)):
            pass
    if first:
        show(config, workdir, inputs, experiment.trained, experiment.built)
    processes.barrier("the end")


def _code() -> str:
    return processes.code_version(Path(ehi.__file__).parent, Path(__file__).parent)


def _data(inputs) -> str:
    """What the batches are made of, and the weights that read them."""
    pairs = {
        f"{name}/{side}": rows
        for name, both in inputs.training.pairs.items()
        for side, rows in zip(("queries", "documents"), both, strict=True)
    }
    return " ".join(
        (inputs.dataset.corpus_sha256, inputs.query_tokens.key,
         inputs.document_tokens.key, inputs.pretrained.sha256, processes.digest(pairs))
    )  # fmt: skip


def main(_) -> None:
    speak()
    try:
        if CONFIG.value is None:
            raise ValueError(f"--config is missing: {CONFIG_HELP}")
        if DRY_RUN.value:
            show_dry_run(dry_run(CONFIG.value), memory_gib=MEMORY_GIB.value)
            return
        if WORKDIR.value is None:
            raise ValueError("--workdir is missing: the folder for what is written")
        checkpoint = None if CHECKPOINT.value is None else Path(CHECKPOINT.value)
        processes.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        preemption.listen()
        if not processes.is_first():
            LOG.setLevel(max(LOG.level, logging.WARNING))
        if jax.process_count() > 1:
            LOG.info(
                "%d processes, %d devices", jax.process_count(), jax.device_count()
            )
        run(CONFIG.value, Path(WORKDIR.value), checkpoint, TENSORBOARD.value)
    except preemption.Preempted as stopped:
        print(stopped.message, file=sys.stderr)
        raise
    except Exception as error:
        # A user's mistake is one sentence; --verbosity=1 shows where it was noticed.
        LOG.debug("traceback", exc_info=True)
        if processes.is_loss(error):
            print(processes.explain_loss(error), file=sys.stderr)
            processes.leave(processes.LOST)
        if not isinstance(error, EXPLAINED):
            raise
        say_error(error)
        processes.leave(1)


def parse_flags(argv: list[str]) -> list[str]:
    """The command line for `app.run`; a mistake in it, or in a config, in a sentence.

    What absl and ml_collections say of one comes with their tracebacks.
    """
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        cause = error
        while cause.args and isinstance(cause.args[0], Exception):
            cause = cause.args[0]
        text = str(cause.args[0]) if cause.args else repr(cause)
        if "Traceback" in text:
            text = text.strip().splitlines()[-1].strip().partition(": ")[2]
        unknown = isinstance(error, AttributeError | KeyError)
        said = "no such field of the config: " if unknown else ""
        say_error(said + " ".join(text.split()))
        sys.exit(1)


def say_error(error) -> None:
    """What went wrong, on stderr."""
    console = Console(stderr=True)
    console.print("[red]error:[/red] ", end="")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)


def speak() -> None:
    """Our own progress on stderr; of the libraries below, warnings only."""
    verbose = absl_logging.get_verbosity() > 0
    absl_logging.set_verbosity("debug" if verbose else "warning")
    LOG.setLevel(logging.DEBUG if verbose else logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    LOG.addHandler(handler)
    LOG.propagate = False


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
