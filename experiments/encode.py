"""Encode a corpus in shards with the parameters of a finished run.

    python -m experiments.encode --config=experiments/configs/own.py \\
        --config.dataset=PATH --checkpoint=runs/own --shards=64 --out=shards \\
        --engine=ray --index=indexes/own

The same command skips the finished shards. A shard that fails is tried again, then
reported, with its documents in `shard-....failed.txt`; the others go on, and the exit
code is 1. If all shards are finished, --index merges them into one index.
"""

import functools
import logging
import sys
from pathlib import Path

from absl import app, flags

from ehi.encode.shards import check_folder, encode_shards, unfinished_shards
from ehi.encode.shards_ray import encode_shards_by_ray
from ehi.index.sharded import import_ray
from experiments.command import INTERRUPTED, explain_interrupt, user_path
from experiments.main import CHECKPOINT, CONFIG, parse_flags, say_error, speak
from experiments.run.checks import check_config
from experiments.run.finished import build_from_shards, load_job, make_job, open_run

ENGINES = ("local", "ray")

SHARDS = flags.DEFINE_integer("shards", 1, "number of shards", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "folder for the shards")
INDEX = flags.DEFINE_string("index", None, "folder for an index of all shards (none)")
SYSTEM = flags.DEFINE_string("system", None, "the system (the last of the config)")
ENGINE = flags.DEFINE_enum("engine", "local", ENGINES, "a loop here, or Ray Data")
RETRIES = flags.DEFINE_integer(
    "retries", 2, "how often a shard that fails is tried again", lower_bound=0
)
WORKERS = flags.DEFINE_integer(
    "workers", 0,
    "actors of --engine=ray; 0: one per GPU, or one per machine without GPUs",
    lower_bound=0,
)  # fmt: skip
ADDRESS = flags.DEFINE_string(
    "ray_address", "local",
    "address of a Ray cluster; 'local': a new one on this machine",
)  # fmt: skip

LOG = logging.getLogger("ehi")


def run(
    config, checkpoint: Path, out: Path, *, shards: int, system: str | None = None,
    engine: str = "local", index: Path | None = None, retries: int = 2,
    workers: int = 0, address: str = "local",
) -> dict[int, str]:  # fmt: skip
    """Encode the shards that are not finished yet, then build the index.

    Args:
      config: the base config, of the run or with another data set.
      checkpoint: workdir of the finished run.
      out: folder of the shards.
      shards: number of shards.
      system: system whose parameters are used; None: the last of the config.
      engine: 'local' or 'ray'.
      index: folder for an index of all shards, or None.
      retries: how often a shard that fails is tried again.
      workers, address: arguments of `encode_shards_by_ray`.

    Returns:
      number of each failed shard -> its error; empty if all shards are finished.

    Raises:
      ValueError: an argument is out of range, or `out` holds shards of another job.
      ImportError, RuntimeError: Ray is not installed, or gave up.
      OSError: a file cannot be written, or the disk is full.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; allowed: {', '.join(ENGINES)}")
    for name, value in (("retries", retries), ("workers", workers)):
        if value < 0:
            raise ValueError(f"{name} is {value}; must be at least 0")
    if engine == "ray":
        import_ray()  # fails before any work is done
    check_config(config)
    system = config.systems[-1] if system is None else system
    checkpoint, out = user_path(checkpoint).resolve(), user_path(out).resolve()
    index = None if index is None else user_path(index).resolve()
    finished = open_run(config, system, checkpoint)
    job = make_job(finished, out, shards)
    numbers = unfinished_shards(job)
    LOG.info(
        "%s: %d of %d shards to encode", finished.trained.run, len(numbers), shards
    )
    if numbers:
        check_folder(job)
    if engine == "ray":
        load = functools.partial(load_job, config, system, checkpoint, out, shards)
        failed = encode_shards_by_ray(
            load, numbers, retries, workers=workers, address=address
        )
    else:
        failed = encode_shards(job, numbers, retries)
    unfinished_shards(job)  # removes temporary files of killed workers
    for number, error in sorted(failed.items()):
        rows = job.rows(number)
        LOG.error(
            "shard %d, documents %s to %s, all %d in %s: %s",
            number, job.ids[rows[0]], job.ids[rows[-1]], len(rows),
            job.failure(number), error,
        )  # fmt: skip
    if index is not None and not failed:
        LOG.info("index: %s", index)
        build_from_shards(finished, job, index)
    return failed


def main(_) -> None:
    speak()
    try:
        for flag in (CONFIG, CHECKPOINT, OUT):
            if flag.value is None:
                what = flags.FLAGS[flag.name].help
                raise ValueError(f"--{flag.name} is missing: {what}")
        failed = run(
            CONFIG.value, Path(CHECKPOINT.value), Path(OUT.value),
            shards=SHARDS.value, system=SYSTEM.value, engine=ENGINE.value,
            index=None if INDEX.value is None else Path(INDEX.value),
            retries=RETRIES.value, workers=WORKERS.value, address=ADDRESS.value,
        )  # fmt: skip
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        LOG.debug("traceback", exc_info=True)
        say_error(error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(explain_interrupt(), file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
