"""The cluster engine of `ehi.encode.shards`: Ray Data calls the same function.

It needs the extra `ray`. A worker is an actor that holds one job with its jitted
encoder. It encodes one shard after the other and returns only how that ended. All
machines of the cluster need this package, the files that a job reads, and the folder of
the shards.
"""

import tempfile
from collections.abc import Callable, Sequence

import numpy as np

from ehi.encode.shards import EncodingJob, attempt_shard, write_failure
from ehi.index.sharded import start_ray
from ehi.progress import track


def encode_shards_by_ray(
    make_job: Callable[[], EncodingJob], numbers: Sequence[int], retries: int = 2,
    *, workers: int = 0, address: str = "local",
) -> dict[int, str]:  # fmt: skip
    """Let actors encode the shards `numbers`; an actor that dies is started again.

    Args:
      make_job: makes the job; every worker imports it and calls it once.
      numbers: of the shards.
      retries: further attempts if a shard fails or its worker dies.
      workers: number of actors; 0 for one for each GPU of the cluster, or for each
        machine if it has no GPU.
      address: of a Ray cluster, or 'local' for a new one on this machine.

    Returns:
      number of each shard that failed -> its error.

    Raises:
      ImportError: Ray is not installed.
      RuntimeError: the job cannot be made, or the cluster is gone.
    """
    if not numbers:
        return {}
    # One processor more than there are workers, for Ray Data itself.
    ray, owns_ray = start_ray(address, num_cpus=max(workers, 1) + 1)
    try:
        import ray.data

        gpus = int(ray.cluster_resources().get("GPU", 0))
        size = workers or gpus or len(ray.nodes())
        ray.data.DataContext.get_current().enable_progress_bars = False
        shards = ray.data.from_items(
            [{"shard": n} for n in numbers], override_num_blocks=len(numbers)
        )
        results = shards.map_batches(
            _Worker, fn_constructor_args=(make_job, retries), batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=1, num_gpus=1 if gpus else 0,
        )  # fmt: skip
        ended = track(results.iter_rows(), "shards", "shards", total=len(numbers))
        errors = {row["shard"]: row["error"] for row in ended}
    except ray.exceptions.RayError as error:
        why = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"Ray gave up; finished shards are kept: {why}") from error
    finally:
        if owns_ray:
            ray.shutdown()
    return {number: error for number, error in errors.items() if error}


class _Worker:
    """An actor. It makes the job once and then encodes shards."""

    def __init__(self, make_job, retries):
        self.job, self.retries = make_job(), retries

    def __call__(self, batch):
        errors = [self.attempt(number) or "" for number in batch["shard"].tolist()]
        return {"shard": batch["shard"], "error": np.array(errors, object)}

    def attempt(self, number):
        """`attempt_shard`, unless the shard has killed too many workers.

        Ray would hand the shard of a dead worker to another worker for ever. So every
        worker makes a folder as a mark before it tries, and removes all marks of the
        shard if it survives.
        """
        prefix = f".{self.job.path(number).name}.tried."
        self.job.folder.mkdir(parents=True, exist_ok=True)
        if len(list(self.job.folder.glob(f"{prefix}*"))) > self.retries:
            error = "its workers died, time and again"
            write_failure(self.job, number, error)
        else:
            tempfile.mkdtemp(prefix=prefix, dir=self.job.folder)
            try:
                error = attempt_shard(self.job, number, self.retries)
            except OSError as full:
                error = str(full)
        for mark in self.job.folder.glob(f"{prefix}*"):
            mark.rmdir()
        return error
