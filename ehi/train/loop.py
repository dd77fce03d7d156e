"""The only loop: resume or start, step, log, mine, checkpoint."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from ehi.data.rows import SomeRows
from ehi.files import arrays_sha256
from ehi.parallel import preemption, processes
from ehi.parallel.mesh import (
    batch_slice,
    check_batch,
    join_batch,
    make_mesh,
    own_copy,
    place,
    replicate,
    shard_batch,
    state_sharding,
    table_sharding,
)
from ehi.progress import Progress
from ehi.train import checkpoint
from ehi.train.batch import TrainingSet, checked_seed, drawn_queries, make_batch
from ehi.train.logs import MetricLog
from ehi.train.optimizer import make_optimizer, trained_names
from ehi.train.phase import Phase
from ehi.train.step import make_train_step, start_state

_STOPPED = "stopped by SIGTERM: {} {} is saved at step {}"


def run_phase(
    graphdef,
    params: dict[str, jax.Array],
    data: TrainingSet,
    tables: Mapping[str, np.ndarray],
    phase: Phase,
    *,
    run: str,
    name: str,
    seed: int,
    directory: Path,
    log: MetricLog,
    lengths: tuple[int, int] = (0, 0),
    mine: Callable[[dict, np.ndarray], np.ndarray] | None = None,
    shard_state: bool = False,
    host_tables: Mapping[str, np.ndarray] | None = None,
) -> dict:
    """Train one phase to its end, from its last checkpoint if it has one.

    Batch, key and parameters are pure functions of (seed, step) and of the checkpoint
    (state, step and mined negatives). So a killed run that is started again ends with
    the same bits as a run that was not killed.

    Several processes call this together, with the same arguments. Each makes its own
    rows of a batch, and all hold the whole state.

    Args:
      graphdef, params: of a `JointIndex`, from `split_model`.
      data: queries, documents and pairs.
      tables: read-only arrays that the step gathers rows from; see `objective`.
      phase: what to train, on what, for how long.
      run, name: names of the system and of the phase in the log.
      seed: of the order of examples and of random choices.
      directory: folder of this phase's checkpoints.
      log: the metrics go here.
      lengths: tokens of a query and of a document when the tower trains, else zeros.
      mine: parameters and rows of the query table (n,) -> their mined negatives (n,
        m). All processes call it every `phase.mining_interval` steps, share the work,
        and get the same result. The rows are those that the phase draws.
      shard_state: each device holds a part of the parameters and moments, see
        `state_sharding`. While mining and at the end all hold all parameters.
      host_tables: tables of `objective`, arrays, memory maps or `Rows`, that stay where
        they are. Their rows travel with the batch, which is made while the device
        computes the step before. The numbers are the same.

    Returns:
      `params` and `stats` of the last state; a next phase may start from `stats`.

    Raises:
      FloatingPointError: the loss or a gradient became NaN or infinite.
      Preempted: SIGTERM came; the step that was under way is saved.
      ValueError: the processes have different parameters or tables, or cannot share the
        batch.
    """
    seed = checked_seed(seed)
    mesh, interval = make_mesh(), phase.mining_interval if mine is not None else 0
    _check_processes(mesh, params, data, tables, phase, f"{run} {name}")
    host_tables = dict(host_tables or {})
    train_step, state, sharding = make_phase_step(
        graphdef, params, phase, mesh, shard_state
    )
    mined = _nothing_mined(data, phase, seed) if interval else None
    state, mined, start = _resume(directory, mesh, place(state, sharding), mined, data)
    log.rewind(run, name, start)
    tables, key = _placed(tables, mesh), jax.random.key(seed)
    recent, stop = _Metrics(log, run, name, phase.batch_size), preemption.Stop()
    make = functools.partial(
        _batch, data, phase, seed, lengths, mesh, stop, host_tables
    )
    with (
        _Batches(make, ahead=bool(host_tables)) as batches,
        preemption.finishing_steps(),
        checkpoint.Writer(directory) as writer,
        _progress(f"{run} {name}", phase.steps, start) as progress,
    ):
        for step in range(start, phase.steps):
            if interval and step % interval == 0:
                mined = _mined(mine, state, mined.rows, recent)
            done = step + 1
            mines = interval and done % interval == 0  # before the next step
            batch = batches.get(step, mined, follows=done < phase.steps and not mines)
            if host_tables:  # no more than two batches are in memory
                jax.block_until_ready(state["step"])
            state, metrics = train_step(state, tables, batch, key)
            stopping = stop.after(metrics)
            last = stopping or done == phase.steps
            recent.add(metrics)
            progress.update()
            saves = last or done % phase.checkpoint_every == 0
            if saves or done % phase.log_every == 0:
                progress.note("loss", recent.flush(done))
            if saves:
                extra = {} if mined is None else {"mined": mined.values}
                writer.save(done, {"state": state, "extra": extra})
            if stopping:
                raise preemption.Preempted(_STOPPED.format(run, name, done))
    return own_copy({name: state[name] for name in ("params", "stats")})


def make_phase_step(graphdef, params, phase: Phase, mesh, shard_state: bool = False):
    """The jitted step of a phase, its first state, and the sharding of that state."""
    trained = trained_names(params, phase.rates, phase.last_n)
    optimizer = make_optimizer(phase)
    buffer = (phase.buffer, params["head/projection"].shape[1])
    state = start_state(params, optimizer, trained, buffer)
    sharding = state_sharding(mesh, state, shard_state)
    train_step = make_train_step(
        graphdef, optimizer, trained, phase, mesh=mesh, state_sharding=sharding
    )
    return train_step, state, sharding


def _check_processes(mesh, params, data, tables, phase: Phase, label: str) -> None:
    """Refuse a batch that the devices cannot share, or processes that differ."""
    sizes = phase.batch_size, phase.pool, data.num_documents, phase.encoded
    check_batch(mesh, *sizes)
    if jax.process_count() == 1:
        return
    for what, arrays in (("parameters", params), ("tables", tables)):
        # A process also waits here for another that still evaluates or fits.
        processes.agree(f"the {what} that {label} starts from", arrays_sha256(arrays))


def _placed(tables: Mapping[str, np.ndarray], mesh) -> dict[str, jax.Array]:
    """Tables on the devices, in float32 where the files have float16."""
    tables = {
        name: np.asarray(table, np.float32 if table.dtype == np.float16 else None)
        for name, table in tables.items()
    }
    return place(tables, table_sharding(mesh, tables))


def _mined(mine: Callable, state, rows: np.ndarray, recent) -> SomeRows:
    """The negatives that the present parameters mine for rows of the query table."""
    jax.block_until_ready(state)  # waiting for it is not mining
    with recent.refreshing():
        return SomeRows(rows, mine(own_copy(state["params"]), rows))


def _nothing_mined(data: TrainingSet, phase: Phase, seed: int) -> SomeRows:
    """The table of mined negatives, of the rows that the phase draws, still empty."""
    rows = drawn_queries(data, phase, seed=seed)
    return SomeRows(rows, np.full((len(rows), phase.mined_kept), -1, np.int32))


def _resume(directory, mesh, state, mined, data):
    """State, mined negatives and step of the last checkpoint; without one, as given."""
    step = checkpoint.latest_step(directory)
    if step is None:
        return state, mined, 0

    def restored(values):
        extra = {} if values is None else {"mined": replicate(mesh, values)}
        return checkpoint.restore(directory, {"state": state, "extra": extra}, step)

    if mined is None:
        return restored(None)["state"], None, step
    try:
        saved = restored(mined.values)
        values = np.asarray(saved["extra"]["mined"])
    except ValueError:
        try:  # older versions kept a row for each query
            shape = data.num_queries, mined.shape[1]
            saved = restored(np.zeros(shape, np.int32))
        except ValueError:
            saved = None
        if saved is None:
            raise
        values = np.asarray(saved["extra"]["mined"])[mined.rows]
    return saved["state"], SomeRows(mined.rows, values), step


class _Batches:
    """The batches of steps; with `ahead`, the next one is made in another thread."""

    def __init__(self, make: Callable, ahead: bool):
        self._make, self._waiting = make, None
        self._thread = ThreadPoolExecutor(1) if ahead else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def get(self, step: int, mined, follows: bool) -> dict:
        """The batch of a step; `follows` tells that the next step has the same mined.

        Steps are asked for in turn.
        """
        waiting, self._waiting = self._waiting, None
        batch = self._make(step, mined) if waiting is None else waiting.result()
        if self._thread is not None and follows:
            self._waiting = self._thread.submit(self._make, step + 1, mined)
        return batch


def _batch(
    data, phase: Phase, seed, lengths, mesh, stop, host_tables, step, mined
) -> dict:
    """The batch of a step on the devices."""
    alone = jax.process_count() == 1
    batch = make_batch(
        data, phase, seed=seed, step=step, mined=mined, lengths=lengths,
        own=None if alone else functools.partial(batch_slice, mesh), tables=host_tables,
    )  # fmt: skip
    if alone:
        return shard_batch(mesh, batch)
    pool = min(phase.pool, data.num_documents)
    flag = join_batch(mesh, {"stop": stop.flag()}, mesh.size, mesh.size)
    return join_batch(mesh, batch, phase.batch_size, pool, phase.encoded) | flag


def _progress(label: str, steps: int, start: int) -> Progress:
    silent = not processes.is_first()
    return Progress(label, steps, "steps", start=start, silent=silent)


class _Metrics:
    """The metrics of steps since the last line of the log, and the time they took."""

    def __init__(self, log: MetricLog, run: str, name: str, batch_size: int):
        self._log, self._names, self._batch_size = log, (run, name), batch_size
        self._pending, self._last, self._refresh = [], time.monotonic(), None

    def add(self, metrics: dict) -> None:
        """The metrics of a step stay on the device until `flush`."""
        self._pending.append(metrics)

    @contextlib.contextmanager
    def refreshing(self) -> Iterator[None]:
        """Time the block as embedding the corpus again and mining."""
        started = time.monotonic()
        yield
        self._refresh = (self._refresh or 0.0) + time.monotonic() - started

    def flush(self, done: int) -> float:
        """Write the means to the log, with one device_get, and return the mean loss.

        Raises:
          FloatingPointError: a metric is not finite; the first such step is named.
        """
        rows, self._pending = jax.device_get(self._pending), []
        for step, row in enumerate(rows, done - len(rows) + 1):
            bad = [key for key, value in row.items() if not np.isfinite(value)]
            if bad:
                raise FloatingPointError(
                    f"{' '.join(self._names)}: {', '.join(bad)} not finite at step "
                    f"{step}; the last checkpoint is kept. Lower the learning rates, "
                    "or check the data."
                )
        means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        self._log.write(*self._names, done, means | self._lap(len(rows)))
        return means["loss"]

    def _lap(self, steps: int) -> dict:
        """Seconds, examples/s and the share of mining since the last line."""
        now = time.monotonic()
        seconds, self._last = max(now - self._last, 1e-9), now
        found = {"seconds": seconds}
        found["examples_per_second"] = steps * self._batch_size / seconds
        if self._refresh is not None:
            found["refresh_share"], self._refresh = self._refresh / seconds, 0.0
        return found
