"""Training with odd seeds, rows, options, folders, logs, signals and full disks.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import make_model, make_tiny, phase_of
from wild_cases import failed, passed

from ehi.model.params import merge_model
from ehi.train import checkpoint, loop
from ehi.train.batch import TrainingSet, make_batch
from ehi.train.logs import MetricLog
from ehi.train.loop import run_phase
from ehi.train.starts import fit_starts

PHASE = phase_of(
    steps=6, losses={"semantic": 1.0}, rates={"head": 1e-2},
    log_every=2, checkpoint_every=2,
)  # fmt: skip
PLAIN = {
    "fitted": False, "tree": None, "num_subspaces": 0, "rotation": "none",
    "residual": False,
}  # fmt: skip


def train(folder, data=None, phase=PHASE, seed=0, log=None):
    """Parameters after a phase of six steps, with checkpoints after 2, 4 and 6."""
    tiny, tables = make_tiny()
    graphdef, params = make_model(tables, Path(folder) / "starts", **PLAIN)
    log = log or MetricLog(Path(folder) / "metrics.jsonl")
    return run_phase(
        graphdef, params, data or tiny, tables, phase, run="r", name="p", seed=seed,
        directory=Path(folder) / "checkpoints", log=log,
    )["params"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The parameters of a run that nothing disturbs."""
    return train(tmp_path_factory.mktemp("whole"))


def assert_same(found, whole):
    for name in whole:
        assert np.array_equal(found[name], whole[name]), name


def steps_in(log: Path) -> list[int]:
    lines = log.read_text(errors="replace").splitlines()
    return [json.loads(line)["step"] for line in lines if line.startswith("{")]


@pytest.fixture
def cut(monkeypatch):
    """cut(folder, step, error): a run that the error ends before a step."""

    def run(folder, step, error=KeyboardInterrupt):
        make = loop.make_batch

        def cutting(*args, step, stop=step, **options):
            if step == stop:
                raise error
            return make(*args, step=step, **options)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "make_batch", cutting)
            with pytest.raises(error):
                train(folder)

    return run


# Seeds


# NumPy's SeedSequence and jax.random.key take these; a seed is a number, whatever its
# type. NumPy's own
# types overflow when the number of a source is added.
@pytest.mark.parametrize(
    "seed",
    [
        passed(2**31 - 1),
        passed(2**31),
        passed(2**32),
        passed(2**63 - 1),
        failed(np.int32(2**31 - 1)),
        failed(np.int64(2**63 - 1)),
        failed(np.uint8(255)),
    ],
)
def test_a_seed_of_any_integer_type_gives_the_batch_of_its_number(seed):
    data, _ = make_tiny()
    found = make_batch(data, PHASE, seed=seed, step=3)
    expected = make_batch(data, PHASE, seed=int(seed), step=3)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    other = make_batch(data, PHASE, seed=int(seed) - 1, step=3)
    assert found["queries"].tolist() != other["queries"].tolist()


# jax.random.key overflows from 2^63 on, NumPy refuses negative entropy: one sentence
# before the first step.
@pytest.mark.parametrize(
    "seed",
    [failed(-1), failed(2**63), failed(1.5)],
)
def test_a_seed_that_no_generator_takes_is_refused_with_the_range(seed, tmp_path):
    message = rf"seed is {seed}; allowed: whole numbers from 0 to 9223372036854775807"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, seed=seed)
    assert not (tmp_path / "checkpoints").exists()


# Rows of pairs


# NumPy indexes with every integer type; 255 + 1 is 0 in uint8, and uint64 beside int64
# becomes float64.
@pytest.mark.parametrize(
    "dtype",
    [
        failed(np.uint8),
        passed(np.int16),
        passed(np.uint32),
        failed(np.uint64),
    ],
)
def test_pairs_of_any_integer_type_have_their_positives(dtype):
    rows, other = np.arange(256), np.arange(256)[::-1]
    pairs = {
        "labelled": (rows.astype(dtype), rows.astype(dtype)),
        "pseudo": (rows, other),
    }
    data = TrainingSet(256, 256, pairs)
    position, documents = data.positives(np.array([255, 0], dtype))
    assert position.tolist() == [0, 0, 1, 1]
    assert documents.tolist() == [0, 255, 0, 255]


# A negative row would silently be one from the end, as NumPy indexes.
@pytest.mark.parametrize(
    ("row", "message"),
    [
        failed(-1, "query row -1; allowed: 0 to 2"),
        failed(3, "query row 3; allowed: 0 to 2"),
    ],
)
def test_a_row_that_does_not_exist_is_named(row, message):
    pairs = {"labelled": (np.array([0, row]), np.array([0, 1]))}
    with pytest.raises(ValueError, match=f"a pair of 'labelled' names {message}"):
        TrainingSet(3, 2, pairs)


# BEIR sets list some judgements twice; a pair says the same however often it is said.
@pytest.mark.parametrize("times", [passed(1), passed(3)])
def test_a_pair_that_is_given_twice_masks_the_same_documents(times):
    queries, documents = np.array([0, 0, 1]), np.array([0, 2, 1])
    pairs = {"labelled": (np.tile(queries, times), np.tile(documents, times))}
    data = TrainingSet(2, 4, pairs)
    phase = phase_of(batch_size=4, pool=4, sources={"labelled": 1.0})
    for step in range(6):
        batch = make_batch(data, phase, seed=0, step=step)
        for row, target, where in zip(
            batch["queries"], batch["target"], batch["where"], strict=True
        ):
            relevant = {0: {0, 2}, 1: {1}}[int(row)]
            masked = set(np.flatnonzero(~where).tolist())
            assert target in relevant and masked == relevant - {int(target)}


# One candidate has all the probability, so the cross-entropy is 0.
@pytest.mark.parametrize("batch_size", [passed(1), passed(5)])
def test_one_pair_alone_trains_to_a_loss_of_zero(batch_size, tmp_path):
    one = np.zeros(1, int)
    data = TrainingSet(1, 1, {"labelled": (one, one)})
    phase = phase_of(
        steps=2, batch_size=batch_size, pool=5, losses={"semantic": 1.0},
        rates={"head": 1e-2}, sources={"labelled": 1.0}, log_every=1,
    )  # fmt: skip
    train(tmp_path, data, phase)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.0, 0.0]


# Options


# A NaN compares as False, so `value < least` let it pass; half a step does not exist.
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        failed("clip", float("nan"), "clip is nan; must be finite"),
        failed("temperature", float("inf"), "temperature is inf"),
        failed("margin", float("nan"), "margin is nan; must be finite"),
        failed("steps", 12.5, "steps is 12.5; must be a whole number"),
        failed("steps", "12", "steps is '12'; must be a whole number"),
        passed("steps", -1, "steps is -1; must be at least 0"),
        failed("rates", {"head": float("inf")}, "rates.head is inf"),
        passed("losses", {"path": float("nan")}, "'path' is nan"),
        passed("sources", {"pseudo": -0.5}, "sources.pseudo is -0.5"),
    ],
)
def test_a_value_that_no_phase_can_have_is_refused_with_it(field, value, message):
    with pytest.raises(ValueError, match=message):
        phase_of(**{field: value})


# Folders


# Legal names on every Linux file system; URLs and globs give these characters a
# meaning, and tensorstore takes paths as URLs.
@pytest.mark.parametrize(
    "name",
    [
        passed(name)
        for name in ("a b", "a#b", "a?b", "a%20b", "é", "a:b", "{a}", "*", "~")
    ],
)
def test_a_workdir_of_any_name_is_resumed(name, tmp_path, whole, cut):
    cut(tmp_path / name, step=5)
    assert checkpoint.latest_step(tmp_path / name / "checkpoints") == 4
    assert_same(train(tmp_path / name), whole)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# A backslash is legal, too, but tensorstore takes it as a slash and reads another
# folder. It cannot write a name in another encoding than UTF-8 at all.
@pytest.mark.parametrize(
    ("name", "message"),
    [
        failed("a\\b", "has a backslash"),
        failed("caf\udce9", "is not UTF-8 to this process", id="Latin-1"),
    ],
)
def test_a_workdir_that_orbax_cannot_write_is_refused(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / name)
    assert not list(tmp_path.rglob("checkpoints"))


# Finder and editors leave these, and orbax documents its temporary folders as not
# complete: what is no checkpoint does not count.
@pytest.mark.parametrize(
    "leave",
    [
        passed(lambda c: (c / ".DS_Store").write_bytes(b"\0"), id="Finder"),
        passed(lambda c: (c / "5").write_text("x"), id="a file of a number"),
        passed(lambda c: (c / "old").mkdir(), id="a folder of no number"),
        passed(
            lambda c: (c / "6.orbax-checkpoint-tmp").mkdir(),
            id="half saved",
        ),
        passed(lambda c: shutil.copytree(c / "4", c / "4 copy"), id="a copy"),
    ],
)
def test_stray_files_beside_a_checkpoint_do_not_count(leave, tmp_path, whole, cut):
    cut(tmp_path, step=5)
    leave(tmp_path / "checkpoints")
    assert_same(train(tmp_path), whole)


# A tool that copies folders first, or a disk that lost the files.
def test_an_empty_checkpoint_is_refused_in_one_sentence_passed(tmp_path, cut):
    cut(tmp_path, step=5)
    (tmp_path / "checkpoints" / "5").mkdir()
    with pytest.raises(ValueError, match="is damaged .remove it, and this phase"):
        train(tmp_path)


# mkdir -p goes through a link to a folder and refuses one to nothing (EEXIST).
def test_checkpoints_may_be_a_link_to_another_disk_passed(tmp_path, whole):
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "folder")
    assert_same(train(tmp_path / "run"), whole)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["6"]


@pytest.mark.parametrize(
    "make",
    [
        failed(lambda path: path.write_text("x"), id="a file"),
        failed(lambda path: path.symlink_to("nothing"), id="a dangling link"),
    ],
)
def test_what_is_no_folder_is_refused_before_training(make, tmp_path):
    make(tmp_path / "checkpoints")
    with pytest.raises(NotADirectoryError, match="checkpoints is a file or a link to"):
        train(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


# As `open_index` does: a relative path means the folder that it meant at the start.
def test_a_relative_workdir_stays_where_it_was_failed(tmp_path, whole, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    log = MetricLog(Path("metrics.jsonl"))
    monkeypatch.chdir(tmp_path / "there")
    assert_same(train(tmp_path, log=log), whole)
    assert steps_in(tmp_path / "here" / "metrics.jsonl") == [2, 4, 6]
    assert not list((tmp_path / "there").iterdir())


# Logs


ROW = {"run": "r", "phase": "p", "step": 2, "seconds": 1, "examples_per_second": 1}
LINE = json.dumps(ROW).encode() + b"\n"


# A journal may fill a torn line with zeros after a power loss; other tools and hands
# write the others. JSON Lines: a reader takes the lines that are its own.
@pytest.mark.parametrize(
    ("before", "kept"),
    [
        passed(b"\0" * 20 + b"\n" + LINE, [2], id="zeros"),
        failed(b"\xff\xfe{\n" + LINE, [2], id="not UTF-8"),
        failed(b"\xef\xbb\xbf" + LINE, [2], id="a mark at the start"),
        passed(LINE.replace(b"\n", b"\r\n"), [2], id="CRLF"),
        failed(b"{}\n" + LINE, [2], id="an empty object"),
        passed(b"[1]\nNaN\n" + LINE, [2], id="no object"),
        failed(b'{"run": "r"}\n' + LINE, [2], id="fields missing"),
        failed(LINE.replace(b"2", b'"2"'), [], id="a step in quotes"),
        passed(LINE[:-9], [], id="a torn line"),
    ],
)
def test_a_damaged_log_keeps_its_whole_lines(before, kept, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before)
    log = MetricLog(path)
    assert log.seconds("r", "p") == len(kept)
    log.rewind("r", "p", 4)
    log.write("r", "p", 6, {"seconds": 2.0, "examples_per_second": 1.0})
    assert steps_in(path) == [*kept, 6]
    assert log.seconds("r", "p") == len(kept) + 2


# Starts


# pip and ccache take a damaged entry of their cache as none, and make it anew.
@pytest.mark.parametrize(
    "damage",
    [
        failed(lambda data: b"", id="empty"),
        failed(lambda data: data[: len(data) // 2], id="half"),
        failed(lambda data: b"\0" * len(data), id="zeros"),
        failed(lambda data: data[:99] + b"x" + data[100:], id="a changed byte"),
    ],
)
def test_a_damaged_fit_is_made_again(damage, tmp_path):
    tables = make_tiny()[1]
    make = functools.partial(make_model, tables, tmp_path, fitted=False)
    params = []
    for again in (False, True):
        for path in tmp_path.glob("*.npz") if again else ():
            path.write_bytes(damage(path.read_bytes()))
        model = merge_model(*make())
        fit_starts(model, tables["features_documents"], seed=0, cache=tmp_path)
        params.append(np.asarray(model.quantiser.codebooks[...]))
    assert len(list(tmp_path.glob("*.npz"))) == 2
    np.testing.assert_array_equal(params[0], params[1])


# Signals and disks


# Ctrl-C is SIGINT: Python raises KeyboardInterrupt between two instructions. As after a
# kill, the run that is started again ends with the bits of one that went through.
@pytest.mark.parametrize("step", [passed(step) for step in (0, 1, 2, 5)])
def test_a_run_that_ctrl_c_ends_goes_on_to_the_same_bits(step, tmp_path, whole, cut):
    cut(tmp_path, step)
    saved = checkpoint.latest_step(tmp_path / "checkpoints")
    assert saved == (step // 2 * 2 or None)
    assert_same(train(tmp_path), whole)
    assert steps_in(tmp_path / "metrics.jsonl") == [2, 4, 6]


CHILD = """
import os, resource, sys, time
sys.path[:0] = sys.argv[2:]
from test_training import checkpoint, train, loop
make = loop.make_batch
def filling(*args, step, **options):
    if step == 3 and os.environ.get("FULL"):
        while checkpoint.latest_step(sys.argv[1] + "/checkpoints") != 2:
            time.sleep(0.05)  # it is written in the background
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return make(*args, step=step, **options)
loop.make_batch = filling
train(sys.argv[1])
"""


def child(folder, **environment):
    """A process that trains in a folder: its exit code and what it said."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, str(folder), str(here), str(here.parent)]
    done = subprocess.run(
        command, capture_output=True, timeout=240, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )  # fmt: skip
    return done.returncode, done.stderr.decode(errors="replace")


# write(2) fails with EFBIG beyond RLIMIT_FSIZE, as with ENOSPC on a full disk: one
# sentence, the checkpoint before stays, and the process ends.
def test_a_full_disk_keeps_the_checkpoint_before_passed(tmp_path, whole):
    code, said = child(tmp_path, FULL="1")
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert f"could not be written to {tmp_path}/checkpoints, the one before" in last
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 2
    assert_same(train(tmp_path), whole)


# The threads of orbax may wait 20 minutes for a folder that cannot be made; the process
# must not wait for them.
def test_a_process_ends_when_a_checkpoint_folder_cannot_be_made_failed(tmp_path):
    code = (
        "import pathlib, sys, jax.numpy as jnp\n"
        "from ehi.train import checkpoint\n"
        "writer = checkpoint.Writer(sys.argv[1] + '/checkpoints')\n"
        "path = pathlib.Path(sys.argv[1], 'checkpoints')\n"
        "path.rmdir(), path.write_text('')\n"
        "with writer: writer.save(1, {'a': jnp.ones(3)})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=120,
        check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.decode().strip().splitlines()[-1]
    assert "a checkpoint could not be written to" in last


# Clusters give jobs no home and no locale; the workdir is all that a run writes to.
@pytest.mark.parametrize(
    "environment",
    [
        passed({"HOME": "/proc", "TMPDIR": "/nonexistent"}, id="no home"),
        passed({"LC_ALL": "C"}, id="no locale"),
    ],
)
def test_a_job_without_home_or_locale_trains(environment, tmp_path, whole):
    code, said = child(tmp_path / "arbre é", **environment)
    assert code == 0, said
    assert_same(train(tmp_path / "arbre é"), whole)
    assert steps_in(tmp_path / "arbre é" / "metrics.jsonl") == [2, 4, 6]


# The same with an ASCII file system encoding, which Python avoids if it may: refused
# before the first step, not at the first checkpoint.
def test_a_path_beyond_the_encoding_of_the_system_is_refused_failed(tmp_path):
    options = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code, said = child(tmp_path / "arbre é", **options)
    assert code == 1
    assert "is not UTF-8 to this process; rename it, or set PYTHONUTF8=1" in said
    assert not (tmp_path / "arbre é" / "metrics.jsonl").exists()
