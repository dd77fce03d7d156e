"""Progress without a terminal: a line at least every 30 seconds, by a fake clock."""

import io
import logging
import sys
import time

import jax
import numpy as np
import pytest
from shard_cases import SHARDS, lengths, make_job
from tiny import Tokens

from ehi import progress
from ehi.encode.encode import encode
from ehi.encode.shards import encode_shards
from ehi.progress import LOG, Progress, track
from ehi.train.kmeans import kmeans, kmeans_tree
from ehi.train.opq import fit_opq


class Clock:
    """A clock that stands still but for `wait`, which ends the work after `turns`."""

    def __init__(self, turns=0):
        self.now, self.turns = 100.0, turns

    def __call__(self):
        return self.now

    def wait(self, seconds):
        if not self.turns:
            return True
        self.turns, self.now = self.turns - 1, self.now + seconds
        return False


@pytest.fixture
def said(caplog):
    """The lines that were logged."""
    caplog.set_level(logging.INFO, logger="ehi")
    logging.getLogger("ehi").propagate = True
    return caplog


def shown(done, seconds, total=None, unit="texts", start=0):
    """The line after so many seconds."""
    clock = Clock()
    counted = Progress("encode", total, unit, start=start, clock=clock)
    counted.update(done)
    clock.now += seconds
    return counted.line()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((3000, 60, 12000), "3,000 of 12,000 texts (25%), 50 texts/s, 3:00 left"),
        ((10, 40, 20000), "10 of 20,000 texts (0%), 0.25 texts/s, 22:12:40 left"),
        ((9000, 60), "9,000 texts, 150 texts/s, 1:00 so far"),
        # Nothing is done yet: no speed and no time left.
        ((0, 30, 12000), "0 of 12,000 texts (0%), 0:30 so far"),
        ((0, 30), "0 texts, 0:30 so far"),
        # No work, one item, more than was announced.
        ((0, 30, 0), "0 of 0 texts, 0:30 so far"),
        ((0, 30, 1), "0 of 1 texts (0%), 0:30 so far"),
        ((1, 30, 1), "1 of 1 texts (100%), 0.0333 texts/s, 0:00 left"),
        ((3, 30, 2), "3 of 2 texts (150%), 0.1 texts/s, 0:00 left"),
        # One call that counts nothing.
        ((0, 3725, None, None), "1:02:05 so far"),
        # What was done before the start says nothing about the speed.
        ((100, 10, 600, "steps", 400), "500 of 600 steps (83%), 10 steps/s, 0:10 left"),
        # No time has passed.
        ((0, 0, 5), "0 of 5 texts (0%), 0:00 so far"),
    ],
)
def test_a_line_says_what_is_done_of_how_much_how_fast_and_what_is_left(
    arguments, line
):
    assert shown(*arguments) == f"encode: {line}"


def test_a_line_every_30_seconds_even_while_one_call_runs(said):
    clock = Clock(turns=3)
    with Progress("k-means", clock=clock, wait=clock.wait) as counted:
        counted._thread.join()  # the fake clock has run out
    assert progress.EVERY <= 30
    assert said.messages == [
        "k-means: 0:30 so far",
        "k-means: 1:00 so far",
        "k-means: 1:30 so far",
        "k-means: done in 1:30",
    ]


def test_the_thread_speaks_by_the_real_clock(said, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    with Progress("train", 4, "steps") as counted:
        counted.update()
        counted.note("loss", 0.25)
        until = time.monotonic() + 30
        while len(said.messages) < 2 and time.monotonic() < until:
            time.sleep(0.01)
    assert said.messages[0].startswith("train: 1 of 4 steps (25%), ")
    assert ", loss 0.250, " in said.messages[1]
    number = len(said.messages)
    time.sleep(0.1)
    assert len(said.messages) == number  # the thread has ended


@pytest.mark.parametrize("items", [[], [7], (x for x in "abc")])
def test_quick_work_logs_nothing(said, items):
    expected = list(items) if isinstance(items, list) else list("abc")
    assert list(track(items, "work", "items")) == expected
    assert said.messages == []


def test_work_that_fails_is_not_done(said):
    clock = Clock(turns=1)
    with (
        pytest.raises(RuntimeError),
        Progress("work", clock=clock, wait=clock.wait) as counted,
    ):
        counted._thread.join()
        raise RuntimeError
    assert said.messages == ["work: 0:30 so far"]


def _encode(tmp_path):
    tokens = Tokens(20, seed=0)
    encode(lambda _, ids, mask: ids[:, :3], None, tokens, batch_tokens=8)


def _encode_shards(tmp_path):
    encode_shards(make_job(tmp_path, lengths), range(SHARDS))


def _kmeans(tmp_path):
    kmeans(np.eye(8), 2, key=jax.random.key(0))


def _kmeans_tree(tmp_path):
    kmeans_tree(np.eye(8), height=2, branching=2, key=jax.random.key(0))


def _fit_opq(tmp_path):
    options = {"num_subspaces": 2, "num_codewords": 16, "rounds": 2}
    fit_opq(np.eye(16), **options, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("work", "label", "unit"),
    [
        (_encode, "encode", "tokens"),
        (_encode_shards, "shards", "documents"),
        (_kmeans, "k-means of 8 rows", "0 of 25 iterations"),
        (_kmeans_tree, "k-means tree", "0 of 50 iterations"),
        (_fit_opq, "OPQ", "rounds"),
        (_fit_opq, "OPQ, last k-means", "0 of 25 iterations"),
    ],
)
def test_long_work_says_how_far_it_is(said, monkeypatch, tmp_path, work, label, unit):
    def impatient(self):
        LOG.info("%s", self.line())
        speak(self)

    speak = Progress._speak
    monkeypatch.setattr(Progress, "_speak", impatient)
    work(tmp_path)
    lines = [line for line in said.messages if line.startswith(f"{label}: ")]
    assert len(lines) == 1 and unit in lines[0]


def test_silent_work_and_work_on_a_terminal_log_nothing(said, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.001)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with Progress("work", 3, "items", silent=True) as counted:
        counted.update()
        time.sleep(0.05)
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in track(range(2), "work", "items"):
        time.sleep(0.03)
    with Progress("one call"):
        pass
    assert said.messages == []
    bar = sys.stderr.getvalue()
    assert "work" in bar and "2/2" in bar
    assert "one call" not in bar
