"""Try settings on a dev split: one cell a combination, what cells share made once.

    python -m experiments.sweep --config=experiments/configs/pydocs.py \\
        --set joint.rates.head=1e-4,3e-4,1e-3 leaves.score=ip,cosine --workdir=DIR

    python -m experiments.sweep --systems jpq ehi-pq --budget=flat-64x \\
        --dataset=pydocs --workdir=DIR

The first form tries every combination of the values of --set, the second the named
trials, which change one thing in every phase of a system: its rates, its steps, the
documents that a query is compared with, or how codes are scored. Values are written as
--config.FIELD=VALUE has them; one with commas is in parentheses, as ('title','span').

A finished cell is one record in DIR/results, its variant is the cell's name. `dense`,
its embeddings and the fits to them are made once for all cells that agree in them. The
same command resumes, however it ended. DIR/sweep.md and DIR/sweep.jsonl have the table,
the best cell first. Nothing is ever scored on test.
"""

import argparse
import functools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from experiments import reproduce
from experiments.command import user_path
from experiments.sweeps.cells import run_sweep, update_tables
from experiments.sweeps.grid import parse_config, parse_grid
from experiments.sweeps.plan import Sweep, check_sweep, claim_sweep
from experiments.sweeps.table import METRICS
from experiments.sweeps.trials import TRIALS
from experiments.systems import SYSTEMS, Budget, get_system

SPLIT = "dev"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(argv)
    return reproduce.run_resumable(functools.partial(_run, args, argv))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake ends the program with a usage message."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep")
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument(
        "--config", help="experiments/configs/<name>.py[:variant]; in every cell, "
        "--config.FIELD=VALUE changes a field"
    )  # fmt: skip
    base.add_argument("--dataset", help="instead of --config: as in reproduce")
    tried = parser.add_mutually_exclusive_group()
    tried.add_argument(
        "--set", nargs="+", metavar="FIELD=VALUE,...", help="values of config fields"
    )
    tried.add_argument(
        "--trials", nargs="+", choices=tuple(TRIALS),
        help="named trials (default without --set: all); 'as-it-is' is the recipe",
    )  # fmt: skip
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS,
        help="the systems that each cell trains (default: the last of the config)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", help="'visit-10-64x', 'flat-64x', ... (default: the last one of "
        "the config that applies)"
    )  # fmt: skip
    parser.add_argument(
        "--workdir", required=True, type=user_path, help="folder for all that is made"
    )
    parser.add_argument("--metric", default=METRICS[0], choices=METRICS)
    parser.add_argument(
        "--seeds", type=reproduce.seed_range, default=range(1),
        help="number of seeds, or from:to (1)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=1, help="cells run at once; cores are divided"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args(argv)
    args.fields = [word for word in rest if re.match(r"--config\.[^=]+=", word)]
    if unknown := [word for word in rest if word not in args.fields]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.fields and args.config is None:
        parser.error(f"{args.fields[0]} needs --config")
    return args


def _run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Check the sweep of a command line, run it, and print its table."""
    sweep = sweep_of(args)
    if args.worker:
        _end_with_parent()
        run_sweep(sweep, processes=args.processes)
        return 0
    check_sweep(sweep, args.processes)
    claim_sweep(sweep)
    code = 0
    if args.processes == 1:
        run_sweep(sweep)
    else:
        code = _in_processes(argv, args.processes)
    print("\n" + update_tables(sweep), end="")
    return code


def sweep_of(args: argparse.Namespace) -> Sweep:
    """Return the sweep of a command line.

    Raises:
      ValueError: a field or value is not one of the config, or would look at test.
    """
    base, fixed = _base_of(args), [w.removeprefix("--config.") for w in args.fields]
    config = base(args.seeds[0])
    grid = parse_grid(config, args.set or ())
    for field in (word.partition("=")[0] for word in fixed):
        if field in grid:
            raise ValueError(f"{field} is in --set and in --config.{field}")
    systems = args.systems or config.systems[-1:]
    budgets = {name: args.budget or _last_budget(config, name) for name in systems}
    trials = () if args.set else args.trials or tuple(TRIALS)
    return Sweep(args.workdir, base, budgets, grid, trials, args.seeds, args.metric)


def _base_of(args: argparse.Namespace) -> Callable:
    """Return a function: seed -> config of the command line, on dev."""
    if args.config is None:
        return lambda seed: reproduce.config_for(args.dataset, "", seed, SPLIT)
    asked = dict(w.removeprefix("--config.").split("=", 1) for w in args.fields)
    if asked.get("split", SPLIT) == "test":
        raise ValueError(
            "--config.split=test: a sweep chooses, so it is on dev; leave it out"
        )
    if "seed" in asked:
        raise ValueError("--config.seed is chosen by --seeds in a sweep")
    config = parse_config(args.config, args.fields)
    config.split = asked.get("split", SPLIT)

    def base(seed: int):
        made = config.copy_and_resolve_references()
        made.seed = seed
        return made

    return base


def _last_budget(config, system: str) -> str:
    budgets = [
        b for b in config.budgets if Budget.parse(b).applies_to(get_system(system))
    ]
    if not budgets:
        raise ValueError(f"no budget of the config applies to {system}: give --budget")
    return budgets[-1]


def _in_processes(argv: Sequence[str], count: int) -> int:
    """Run the cells in several processes, each with its part of the cores.

    Return 0, or the exit code of the first process that failed.
    """
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "experiments.sweep", *argv, "--worker"]
    # Each process of a GPU would take three quarters of its memory.
    part = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.75 / count:.3f}"}
    workers = []
    try:
        for number in range(count):
            os.sched_setaffinity(0, cores[number::count])  # a child inherits it
            workers.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, env=part | os.environ)
            )
            os.sched_setaffinity(0, cores)
        codes = [worker.wait() for worker in workers]
    finally:
        os.sched_setaffinity(0, cores)
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()
    if killed := [-code for code in codes if code < 0]:
        name = signal.Signals(killed[0]).name
        raise ValueError(f"a process was ended by {name}; the same command goes on")
    return max(codes)


def _end_with_parent() -> None:
    """Stop as by SIGTERM when the process that started this one has ended."""

    def wait() -> None:
        os.read(0, 1)  # a pipe that closes with the parent; sys.stdin would hold a lock
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
