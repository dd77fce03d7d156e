"""Interruption of one process: SIGTERM, and a disk that is full."""

import os
import resource
import signal

import jax
import numpy as np
import pytest

from ehi.parallel import preemption
from ehi.train import checkpoint


@pytest.fixture
def listening():
    before = signal.getsignal(signal.SIGTERM)
    preemption.listen()
    yield
    signal.signal(signal.SIGTERM, before)
    preemption._asked.clear()


def test_between_phases_a_run_ends_at_once(listening):
    with pytest.raises(preemption.Preempted) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == preemption.EXIT_CODE == 75
    assert "the same command goes on" in stopped.value.message


def test_in_a_phase_the_step_is_finished(listening):
    stop = preemption.Stop()
    with preemption.finishing_steps():
        assert not stop.after({"loss": 1.0})
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.flag().all()
        assert stop.after({"loss": 1.0})
        preemption._asked.clear()  # as where the step has said so and ended the run


def test_a_signal_after_the_last_step_ends_the_run_too(listening):
    with pytest.raises(preemption.Preempted), preemption.finishing_steps():
        os.kill(os.getpid(), signal.SIGTERM)


def test_several_processes_read_the_same_flag_two_steps_later():
    stop, metrics = preemption.Stop(), [{"loss": 1.0, "stop": f} for f in (0, 1, 0, 0)]
    assert [stop.after(row) for row in metrics] == [False, False, False, True]
    assert all("stop" not in row for row in metrics)


@pytest.fixture
def small_files():
    """Files of at most 100 kB, as on a disk that is almost full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_the_checkpoint_before_it_kept(tmp_path, small_files):
    noise = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    with (
        pytest.raises(OSError, match="could not be written .* before it is kept"),
        checkpoint.Writer(tmp_path) as writer,
    ):
        writer.save(1, {"a": jax.numpy.ones(3)})
        writer.save(2, {"a": jax.device_put(noise)})
    assert checkpoint.latest_step(tmp_path) == 1


def test_a_state_is_saved_as_it_was_though_the_next_step_takes_it(tmp_path):
    step = jax.jit(lambda state: {"a": state["a"] + 1}, donate_argnums=0)
    state = step({"a": jax.numpy.zeros(100_000)})
    with checkpoint.Writer(tmp_path) as writer:
        for number in range(1, 4):
            writer.save(number, state)
            for _ in range(5):
                state = step(state)
    assert checkpoint.latest_step(tmp_path) == 3
    saved = checkpoint.restore(tmp_path, state)["a"]
    np.testing.assert_array_equal(saved, np.full(100_000, 11))
