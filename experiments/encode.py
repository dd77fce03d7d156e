"""A corpus to shards by the parameters of a finished run, here or on a cluster.

    python -m experiments.encode --config=experiments/configs/own.py \\
        --config.dataset=PATH --checkpoint=runs/own --shards=64 --out=shards \\
        --engine=ray --index=indexes/own

Run again, it skips the shards that are finished. One that fails is tried again, then
reported, with its documents in `shard-....failed.txt`; the others go on, and the exit
code is 1. With all of them there, --index merges them into one index.
"""

import functools
import logging
from pathlib import Path

from absl import app, flags

from ehi.encode.shards import encode_shards, unfinished_shards
from ehi.encode.shards_ray import encode_shards_by_ray
from ehi.index.ray_cluster import import_ray
from experiments.main import CHECKPOINT, CONFIG, parse_flags, say_error, speak
from experiments.run.checks import check_config
from experiments.run.finished import build_from_shards, load_job, make_job, open_run

# A flag is defined once.

ENGINES = ("local", "ray")

SHARDS = flags.DEFINE_integer("shards", 1, "shards of the corpus, K", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "folder for the shards")
INDEX = flags.DEFINE_string("index", None, "folder for an index of all shards, if any")
SYSTEM = flags.DEFINE_string("system", None, "default: the last one of the config")
ENGINE = flags.DEFINE_enum("engine", "local", ENGINES, "a loop here, or Ray Data")
RETRIES = flags.DEFINE_integer("retries", 2, "of a shard that fails", lower_bound=0)
WORKERS = flags.DEFINE_integer(
    "workers", 0, "actors of --engine=ray; 0: one a GPU, or else one a machine",
    lower_bound=0,
)  # fmt: skip
ADDRESS = flags.DEFINE_string(
    "ray_address", "local", "of a Ray cluster; 'local': a new one on this machine"
)

LOG = logging.getLogger("ehi")


def run(
    config, checkpoint: Path, out: Path, *, shards: int, system: str | None = None,
    engine: str = "local", index: Path | None = None, retries: int = 2,
    workers: int = 0, address: str = "local",
) -> dict[int, str]:  # fmt: skip
    """Encode what is not encoded yet, then index it.

    Args:
      config: the base config, of the run or with another data set.
      checkpoint: workdir of the finished run.
      out: folder of the shards.
      shards: how many.
      system: whose parameters; None for the last of the config.
      engine: 'local' or 'ray'.
      index: folder of an index to build of all shards, or None.
      retries: of a shard that fails.
      workers, address: of `encode_shards_by_ray`.

    Returns:
      number of each shard that failed -> what it failed of; without any, all are there.

    Raises:
      ValueError: an argument out of range, or shards of another job in `out`.
      ImportError, RuntimeError: Ray is not installed, or gave up.
      OSError: a disk is full.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; allowed: {', '.join(ENGINES)}")
    for name, value in (("retries", retries), ("workers", workers)):
        if value < 0:
            raise ValueError(f"{name} is {value}; must be at least 0")
    if engine == "ray":
        import_ray()  # before the work that would be in vain without it
    check_config(config)
    system = config.systems[-1] if system is None else system
    checkpoint, out = checkpoint.resolve(), out.resolve()
    finished = open_run(config, system, checkpoint)
    job = make_job(finished, out, shards)
    numbers = unfinished_shards(job)
    LOG.info(
        "%s: %d of %d shards to encode", finished.trained.run, len(numbers), shards
    )
    if engine == "ray":
        load = functools.partial(load_job, config, system, checkpoint, out, shards)
        failed = encode_shards_by_ray(
            load, numbers, retries, workers=workers, address=address
        )
    else:
        failed = encode_shards(job, numbers, retries)
    unfinished_shards(job)  # also removes what workers left that were killed
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
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
