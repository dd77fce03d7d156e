"""Several processes, in children of one device each, killed by SIGKILL if they hang."""

import jax
import numpy as np
import pytest
from worker_children import assert_same_bits, end, lose_one, losses, run_one, run_two

from ehi.files import arrays_sha256
from ehi.parallel import processes
from ehi.parallel.preemption import EXIT_CODE, LAG
from ehi.train.logs import MetricLog

TWO = ("ehi-pq", "jpq")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder where two processes trained without a break."""
    folder = tmp_path_factory.mktemp("two")
    job = {"mode": "train", "folder": str(folder), "systems": TWO}
    for code, _, err in run_two(job):
        assert code == 0, err
    return folder


def test_two_processes_train_as_one_with_two_devices(two_processes, tmp_path):
    job = {"mode": "train", "folder": str(tmp_path), "systems": TWO}
    code, _, err = run_one(job, devices=2)
    assert code == 0, err
    for system in TWO:
        ours, theirs = losses(two_processes, system), losses(tmp_path, system)
        assert len(ours) == 12
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        one, two = end(two_processes, system), end(tmp_path, system)
        for name in one:
            np.testing.assert_allclose(one[name], two[name], atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_encode_their_shares_of_the_rows(tmp_path):
    ends = []
    for folder, run in ((tmp_path / "two", run_two), (tmp_path / "one", run_one)):
        folder.mkdir()
        found = run({"mode": "train", "folder": str(folder), "systems": ["dense"]})
        for code, _, err in found if run is run_two else [found]:
            assert code == 0, err
        ends.append(losses(folder, "dense"))
    np.testing.assert_allclose(*ends, rtol=1e-4)


PREEMPTED = {"signal": "SIGTERM", "at": 4}


@pytest.mark.parametrize(
    "turns", [[{}], pytest.param([PREEMPTED, {}], marks=pytest.mark.slow)]
)
def test_two_processes_that_share_the_state_train_as_two_that_hold_it(
    two_processes, tmp_path, turns
):
    job = {"mode": "train", "folder": str(tmp_path), "systems": ["ehi-pq"]}
    job["shard_state"] = True
    for turn in turns:
        for code, _, err in run_two(job | turn):
            assert code == (EXIT_CODE if turn else 0), err
    ours, theirs = losses(tmp_path, "ehi-pq"), losses(two_processes, "ehi-pq")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    one, two = end(tmp_path, "ehi-pq"), end(two_processes, "ehi-pq")
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-3, err_msg=name)


@pytest.mark.parametrize("run", ["two processes", "four devices"])
def test_all_embed_and_mine_together_what_one_does_alone(run, tmp_path):
    (tmp_path / "alone").mkdir()
    job = {"mode": "refresh", "folder": str(tmp_path)}
    ends = run_two(job) if run == "two processes" else [run_one(job, devices=4)]
    alone = run_one(job | {"folder": str(tmp_path / "alone")})
    for code, _, err in [*ends, alone]:
        assert code == 0, err
    expected = np.load(tmp_path / "alone" / "refreshed0.npz")
    every = [np.load(tmp_path / f"refreshed{n}.npz") for n in range(len(ends))]
    for found in every:
        for name in ("ehi", "dense"):
            assert found[name].shape == (100, 16)
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
        for name in ("leaves", "odd", "one", "most"):
            assert (found[name] >= 0).any()
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    # Each searched for its own share of the queries: 100, 34, 1 and 3 in all.
    assert expected["searched"].tolist() == [100, 34, 1, 3]
    shares = [[50, 17, 1, 2], [50, 17, 0, 1]] if len(ends) == 2 else [[100, 34, 1, 3]]
    assert [found["searched"].tolist() for found in every] == shares


def test_preempted_then_lost_then_as_if_nothing_was(two_processes, tmp_path):
    job = {"mode": "train", "folder": str(tmp_path), "systems": ["ehi-pq"]}
    # One of them is asked to stop: both stop after the same step.
    ends = run_two(job | {"signal": "SIGTERM", "to": 1, "at": 4})
    for code, _, err in ends:
        assert code == EXIT_CODE, err
        assert f"ehi-pq joint is saved at step {4 + LAG + 1}" in err
    # One is lost: the other stops by itself and says why.
    code, err, seconds = lose_one(job | {"signal": "SIGKILL", "to": 1, "at": 10})
    assert seconds < 40  # twice the worker's `lost_after`
    assert code in (processes.LOST, -6), err
    assert "another process is lost" in err or "heartbeat" in err
    for code, _, err in run_two(job):
        assert code == 0, err
    assert_same_bits(end(two_processes, "ehi-pq"), end(tmp_path, "ehi-pq"))
    assert losses(tmp_path, "ehi-pq") == losses(two_processes, "ehi-pq")


def test_who_waits_for_a_lost_process_is_stopped():
    code, err, seconds = lose_one({"mode": "wait", "killed": 1, "lost_after": 5})
    assert seconds < 20
    assert code in (processes.LOST, -6)  # jax aborts, or its barrier fails first
    assert "heartbeat" in err


def test_processes_that_differ_all_say_in_what():
    for code, _, err in run_two({"mode": "agree", "others": [1]}):
        assert code == 1
        assert "differ in config: process 0 with " in err and ", process 1 with " in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", None, None), "--num_processes and --process_id missing"),
        ((None, 2, None), "--coordinator and --process_id missing"),
        (("host:1", None, 0), "--num_processes missing"),
        (("host", 2, 0), "'host' is no address"),
        (("host:1", 2, 2), "allowed: 0 to 1"),
    ],
)
def test_half_a_place_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        processes.initialize(*given)


LAPTOP: dict[str, str] = {}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "starts"),
    [
        (LAPTOP, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),  # an interactive shell
        (OPEN_MPI, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a container of any kind
    ],
)
def test_launchers_are_recognised(monkeypatch, environment, starts):
    for name in (*SLURM, *OPEN_MPI, "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **o: calls.append(o))
    processes.initialize(timeout=9)
    assert len(calls) == starts
    if starts:
        assert calls[0]["initialization_timeout"] == 9


def test_jax_has_the_private_names_that_processes_use():
    """It fails where a version of jax changes them: see `processes._private_jax`."""
    distributed, launchers = processes._private_jax()
    assert distributed.global_state.client is None  # one process: not initialised
    names = {launcher.__name__ for launcher in launchers}
    assert names >= {*processes._LAUNCHER_VARIABLES, "GceTpuCluster", "GkeTpuCluster"}
    for launcher in launchers:
        assert isinstance(launcher.opt_in_only_method, bool)
        for method in ("is_env_present", "get_process_count", "get_process_id"):
            assert callable(getattr(launcher, method))
    client = jax._src.lib._jax.DistributedRuntimeClient
    for method in (
        "wait_at_barrier",
        "key_value_set",
        "blocking_key_value_get",
        "key_value_dir_get",
    ):
        assert callable(getattr(client, method))


def test_one_process_agrees_with_itself(tmp_path):
    processes.agree("config", "x")
    processes.barrier("here")
    assert processes.said_by_first("x") == "x"
    with processes.first_alone():
        pass
    with pytest.raises(SystemExit) as left:
        processes.leave(3)
    assert left.value.code == 3
    (tmp_path / "a.py").write_text("a = 1")
    before = processes.code_version(tmp_path)
    assert before == processes.code_version(tmp_path)
    (tmp_path / "a.py").write_text("a = 2")
    assert before != processes.code_version(tmp_path)
    arrays = {"a": np.zeros(3), "b": np.zeros((0, 2))}
    assert arrays_sha256(arrays) == arrays_sha256(dict(reversed(arrays.items())))
    assert arrays_sha256(arrays) != arrays_sha256(arrays | {"a": np.ones(3)})


def test_a_log_that_only_reads_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricLog(path).write("a", "joint", 5, {"loss": 1.0, "seconds": 2.0})
    before, log = path.read_bytes(), MetricLog(path, writes=False)
    log.write("a", "joint", 6, {"loss": 1.0, "seconds": 2.0})
    log.rewind("a", "joint", 0)
    assert path.read_bytes() == before
    assert log.seconds("a", "joint") == 2.0
