"""Training with odd seeds, rows, options, folders, logs, signals and full disks.

The id of a case ends in `failed` if it failed before this file was written, else in
`passed`. The comment above a case names the source of what is expected.
"""

import errno
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

from ehi.model.params import merge_model
from ehi.train import checkpoint, loop
from ehi.train.batch import TrainingSet, make_batch
from ehi.train.logs import MetricLog
from ehi.train.loop import run_phase
from ehi.train.starts import fit_starts

FAILED, PASSED = "failed", "passed"
PHASE = phase_of(
    steps=6, losses={"semantic": 1.0}, rates={"head": 1e-2},
    log_every=2, checkpoint_every=2,
)  # fmt: skip
PLAIN = {
    "fitted": False, "tree": None, "num_subspaces": 0, "rotation": "none",
    "residual": False,
}  # fmt: skip


def case(*values, was, **options):
    """A parameter set whose id says whether it failed before."""
    name = options.pop("id", None) or "-".join(map(repr, values))
    return pytest.param(*values, id=f"{name}-{was}", **options)


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
# type. NumPy's own types overflowed when the number of a source was added.
@pytest.mark.parametrize(
    "seed",
    [
        case(2**31 - 1, was=PASSED),
        case(2**31, was=PASSED),
        case(2**32, was=PASSED),
        case(2**63 - 1, was=PASSED),
        case(np.int32(2**31 - 1), was=FAILED),
        case(np.int64(2**63 - 1), was=FAILED),
        case(np.uint8(255), was=FAILED),
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
    [case(-1, was=FAILED), case(2**63, was=FAILED), case(1.5, was=FAILED)],
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
        case(np.uint8, was=FAILED),
        case(np.int16, was=PASSED),
        case(np.uint32, was=PASSED),
        case(np.uint64, was=FAILED),
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
        case(-1, "query row -1; allowed: 0 to 2", was=FAILED),
        case(3, "query row 3; allowed: 0 to 2", was=FAILED),
    ],
)
def test_a_row_that_does_not_exist_is_named(row, message):
    pairs = {"labelled": (np.array([0, row]), np.array([0, 1]))}
    with pytest.raises(ValueError, match=f"a pair of 'labelled' names {message}"):
        TrainingSet(3, 2, pairs)


# BEIR sets list some judgements twice; a pair says the same however often it is said.
@pytest.mark.parametrize("times", [case(1, was=PASSED), case(3, was=PASSED)])
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
@pytest.mark.parametrize("batch_size", [case(1, was=PASSED), case(5, was=PASSED)])
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
        case("clip", float("nan"), "clip is nan; must be finite", was=FAILED),
        case("temperature", float("inf"), "temperature is inf", was=FAILED),
        case("margin", float("nan"), "margin is nan; must be finite", was=FAILED),
        case("steps", 12.5, "steps is 12.5; must be a whole number", was=FAILED),
        case("steps", "12", "steps is '12'; must be a whole number", was=FAILED),
        case("steps", -1, "steps is -1; must be at least 0", was=PASSED),
        case("rates", {"head": float("inf")}, "rates.head is inf", was=FAILED),
        case("losses", {"path": float("nan")}, "'path' is nan", was=PASSED),
        case("sources", {"pseudo": -0.5}, "sources.pseudo is -0.5", was=PASSED),
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
        case(name, was=PASSED)
        for name in ("a b", "a#b", "a?b", "a%20b", "é", "a:b", "{a}", "*", "~")
    ],
)
def test_a_workdir_of_any_name_is_resumed(name, tmp_path, whole, cut):
    cut(tmp_path / name, step=5)
    assert checkpoint.latest_step(tmp_path / name / "checkpoints") == 4
    assert_same(train(tmp_path / name), whole)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# A backslash is legal, too, but tensorstore takes it as a slash and reads another
# folder. A name in another encoding than UTF-8 failed at the first checkpoint.
@pytest.mark.parametrize(
    ("name", "message"),
    [
        case("a\\b", "has a backslash", was=FAILED),
        case("caf\udce9", "is not UTF-8 to this process", was=FAILED, id="Latin-1"),
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
        case(lambda c: (c / ".DS_Store").write_bytes(b"\0"), was=PASSED, id="Finder"),
        case(lambda c: (c / "5").write_text("x"), was=PASSED, id="a file of a number"),
        case(lambda c: (c / "old").mkdir(), was=PASSED, id="a folder of no number"),
        case(
            lambda c: (c / "6.orbax-checkpoint-tmp").mkdir(),
            was=PASSED,
            id="half saved",
        ),
        case(lambda c: shutil.copytree(c / "4", c / "4 copy"), was=PASSED, id="a copy"),
    ],
)
def test_stray_files_beside_a_checkpoint_do_not_count(leave, tmp_path, whole, cut):
    cut(tmp_path, step=5)
    leave(tmp_path / "checkpoints")
    assert_same(train(tmp_path), whole)


# A tool that copies folders first, or a disk that lost the files.
@pytest.mark.parametrize("name", [case("5", was=PASSED)])
def test_an_empty_checkpoint_is_refused_in_one_sentence(name, tmp_path, cut):
    cut(tmp_path, step=5)
    (tmp_path / "checkpoints" / name).mkdir()
    with pytest.raises(ValueError, match="is damaged .remove it, and this phase"):
        train(tmp_path)


# mkdir -p goes through a link to a folder and refuses one to nothing (EEXIST).
@pytest.mark.parametrize("target", [case("folder", was=PASSED)])
def test_checkpoints_may_be_a_link_to_another_disk(target, tmp_path, whole):
    (tmp_path / target).mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / target)
    assert_same(train(tmp_path / "run"), whole)
    assert [path.name for path in (tmp_path / target).iterdir()] == ["6"]


@pytest.mark.parametrize(
    "make",
    [
        case(lambda path: path.write_text("x"), was=FAILED, id="a file"),
        case(lambda path: path.symlink_to("nothing"), was=FAILED, id="a dangling link"),
    ],
)
def test_what_is_no_folder_is_refused_before_training(make, tmp_path):
    make(tmp_path / "checkpoints")
    with pytest.raises(NotADirectoryError, match="checkpoints is a file or a link to"):
        train(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


# As `open_index` does: a relative path means the folder that it meant at the start.
@pytest.mark.parametrize("was", [case(FAILED, was=FAILED, id="the log")])
def test_a_relative_workdir_stays_where_it_was(was, tmp_path, whole, monkeypatch):
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
        case(b"\0" * 20 + b"\n" + LINE, [2], was=PASSED, id="zeros"),
        case(b"\xff\xfe{\n" + LINE, [2], was=FAILED, id="not UTF-8"),
        case(b"\xef\xbb\xbf" + LINE, [2], was=FAILED, id="a mark at the start"),
        case(LINE.replace(b"\n", b"\r\n"), [2], was=PASSED, id="CRLF"),
        case(b"{}\n" + LINE, [2], was=FAILED, id="an empty object"),
        case(b"[1]\nNaN\n" + LINE, [2], was=PASSED, id="no object"),
        case(b'{"run": "r"}\n' + LINE, [2], was=FAILED, id="fields missing"),
        case(LINE.replace(b"2", b'"2"'), [], was=FAILED, id="a step in quotes"),
        case(LINE[:-9], [], was=PASSED, id="a torn line"),
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
        case(lambda data: b"", was=FAILED, id="empty"),
        case(lambda data: data[: len(data) // 2], was=FAILED, id="half"),
        case(lambda data: b"\0" * len(data), was=FAILED, id="zeros"),
        case(
            lambda data: data[:99] + b"x" + data[100:], was=FAILED, id="a changed byte"
        ),
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
@pytest.mark.parametrize("step", [case(step, was=PASSED) for step in (0, 1, 2, 5)])
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
@pytest.mark.parametrize("limit", [case("a full disk", was=PASSED)])
def test_a_full_disk_keeps_the_checkpoint_before(limit, tmp_path, whole):
    code, said = child(tmp_path, FULL="1")
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert f"could not be written to {tmp_path}/checkpoints, the one before" in last
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 2
    assert_same(train(tmp_path), whole)


# A folder that cannot be made: orbax left threads that waited for it for 20 minutes,
# and the process did not end.
@pytest.mark.parametrize("number", [case(errno.ENOSPC, was=FAILED, id="no inodes")])
def test_a_process_ends_when_a_checkpoint_folder_cannot_be_made(number, tmp_path):
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
        case({"HOME": "/proc", "TMPDIR": "/nonexistent"}, was=PASSED, id="no home"),
        case({"LC_ALL": "C"}, was=PASSED, id="no locale"),
    ],
)
def test_a_job_without_home_or_locale_trains(environment, tmp_path, whole):
    code, said = child(tmp_path / "arbre é", **environment)
    assert code == 0, said
    assert_same(train(tmp_path / "arbre é"), whole)
    assert steps_in(tmp_path / "arbre é" / "metrics.jsonl") == [2, 4, 6]


# The same with an ASCII file system encoding, which Python avoids if it may: refused
# before the first step, not at the first checkpoint.
@pytest.mark.parametrize("encoding", [case("ascii", was=FAILED)])
def test_a_path_beyond_the_encoding_of_the_system_is_refused(encoding, tmp_path):
    options = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code, said = child(tmp_path / "arbre é", **options)
    assert code == 1
    assert "is not UTF-8 to this process; rename it, or set PYTHONUTF8=1" in said
    assert not (tmp_path / "arbre é" / "metrics.jsonl").exists()
