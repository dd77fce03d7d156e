"""The only loop: resume or start, step, log, mine, checkpoint."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from ehi.train import checkpoint
from ehi.train.logs import MetricLog
from ehi.train.optimizer import make_optimizer, trained_names
from ehi.train.phase import Phase
from ehi.train.pool import TrainingSet, make_batch
from ehi.train.step import (
    make_mesh,
    make_train_step,
    replicate,
    shard_batch,
    start_state,
)


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
    mine: Callable[[dict], np.ndarray] | None = None,
) -> dict:
    """Train one phase to its end, from its last checkpoint if it has one.

    The batch, the key and the parameters are pure functions of (seed, step) and of the
    checkpoint (state, step and mined negatives), so a killed run that is started again
    ends with the same bits as one that was not.

    Args:
      graphdef, params: of a `JointIndex`, from `split_model`.
      data: queries, documents and pairs.
      tables: read-only arrays that the step gathers from; see `objective`.
      phase: what to train, on what, for how long.
      run, name: of the system and of the phase, for the log.
      seed: of the order of examples and of random choices.
      directory: of this phase's checkpoints.
      log: metrics go here.
      lengths: tokens of a query and of a document when the tower trains, else zeros.
      mine: parameters -> mined negatives (rows, m); called every `phase.refresh` steps.

    Returns:
      the state of the last step: `params`, and `stats` for a phase that starts from
      what this one kept.

    Raises:
      FloatingPointError: the loss or a gradient became NaN or infinite.
    """
    mesh, mines = make_mesh(), phase.refresh if mine is not None else 0
    train_step, state = make_phase_step(graphdef, params, phase)
    nothing = np.full((data.num_queries, phase.mined_kept), -1, np.int32)
    mined = nothing if mines else None
    state, mined, start = _resume(directory, replicate(mesh, state), mined)
    log.rewind(run, name, start)
    tables, key = replicate(mesh, dict(tables)), jax.random.key(seed)
    pending, clock = [], _Clock(phase.batch_size)
    with _bar(f"{run} {name}", start, phase.steps) as bar:
        for step in range(start, phase.steps):
            if mines and step % mines == 0:
                mined = mine(state["params"])
            batch = _batch(data, phase, seed, step, mined, lengths)
            state, metrics = train_step(state, tables, shard_batch(mesh, batch), key)
            pending.append(metrics)
            bar.update()
            done, last = step + 1, step + 1 == phase.steps
            saves = last or done % phase.checkpoint_every == 0
            if saves or done % phase.log_every == 0:
                bar.set_postfix(_flush(log, run, name, done, pending, clock))
            if saves:
                _save(directory, done, state, mined)
    return state


def make_phase_step(graphdef, params, phase: Phase):
    """The jitted step of a phase, and the state it starts from."""
    trained = trained_names(params, phase.rates, phase.last_n)
    optimizer = make_optimizer(
        phase.rates, steps=phase.steps, warmup=phase.warmup, decay=phase.decay,
        weight_decay=phase.weight_decay, clip=phase.clip,
    )  # fmt: skip
    train_step = make_train_step(
        graphdef, optimizer, trained,
        weights=phase.losses, revive_every=phase.revive_every,
        **phase.objective_options,
    )  # fmt: skip
    buffer = (phase.buffer, params["head/projection"].shape[1])
    return train_step, start_state(params, optimizer, trained, buffer)


def _bar(label: str, start: int, steps: int) -> tqdm:
    silent = not sys.stderr.isatty()
    return tqdm(total=steps, initial=start, desc=label, unit="step", disable=silent)


def _batch(data, phase: Phase, seed, step, mined, lengths) -> dict:
    return make_batch(
        data, batch_size=phase.batch_size, pool=phase.pool,
        sources=phase.sources, source_weights=phase.source_weights,
        seed=seed, step=step, mined=mined, mined_per_query=phase.mined_per_query,
        lists_positives=phase.needs_codes,
        query_length=lengths[0], document_length=lengths[1],
    )  # fmt: skip


def _flush(log, run, name, done, pending, clock) -> dict:
    """One device_get for all steps since the last; stop at the first non-finite one."""
    rows = jax.device_get(pending)
    first = done - len(rows) + 1
    pending.clear()
    for step, row in enumerate(rows, first):
        bad = [key for key, value in row.items() if not np.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{run} {name}: {', '.join(bad)} not finite at step {step}; the last "
                "checkpoint is kept. Lower the learning rates, or check the data."
            )
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    log.write(run, name, done, means | clock.lap(len(rows)))
    return {"loss": f"{means['loss']:.3f}"}


class _Clock:
    """Seconds and examples/s between two lines of the log."""

    def __init__(self, batch_size: int):
        self._batch_size, self._last = batch_size, time.monotonic()

    def lap(self, steps: int) -> dict:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        rate = steps * self._batch_size / max(seconds, 1e-9)
        return {"seconds": seconds, "examples_per_second": rate}


def _save(directory, step, state, mined) -> None:
    extra = {} if mined is None else {"mined": mined}
    checkpoint.save(directory, step, {"state": state, "extra": extra})


def _resume(directory, state, mined):
    """State, mined negatives and step of the last checkpoint, or those given."""
    step = checkpoint.latest_step(directory)
    if step is None:
        return state, mined, 0
    extra = {} if mined is None else {"mined": jax.numpy.asarray(mined)}
    saved = checkpoint.restore(directory, {"state": state, "extra": extra}, step)
    mined = None if mined is None else np.asarray(saved["extra"]["mined"])
    return saved["state"], mined, step
