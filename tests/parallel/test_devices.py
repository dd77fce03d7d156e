"""What needs several devices, in children with fake ones."""

import json
import shutil

import numpy as np
from worker_children import assert_same_bits, end, losses, run_one

from ehi.parallel.preemption import EXIT_CODE


def test_one_device_and_four_have_the_same_gradients(tmp_path):
    systems = ["dense", "ehi", "joint-pq", "ehi-pq"]
    systems += ["jpq", "poeem", "repconc", "distill-vq", "jtr"]
    job = {"mode": "compare", "folder": str(tmp_path), "systems": systems}
    code, out, err = run_one(job, devices=4)
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["system"] for row in found] == systems
    for row in found:
        assert row["norm"] > 0
        assert row["gradients"] <= 1e-5, row
        assert row["losses"] <= 1e-3, row
        # Each device holds its part of the code table, and searches it.
        assert row["codes"] == (0.25 if row["system"] == "jpq" else None)


def test_a_batch_that_four_devices_cannot_share_is_refused(tmp_path):
    job = {"mode": "train", "folder": str(tmp_path), "systems": ["ehi"]}
    code, _, err = run_one(job | {"changes": {"batch_size": 6}}, devices=4)
    assert code == 1
    assert "batch_size=6 does not divide over the 4 devices" in err


def test_a_sharded_state_trains_as_a_whole_one(tmp_path):
    job = {"mode": "shard", "folder": str(tmp_path), "systems": ["dense", "ehi-pq"]}
    code, out, err = run_one(job, devices=4)
    assert code == 0, err
    for row in map(json.loads, out.splitlines()):
        whole, sharded = row["bytes"]
        assert sharded < 0.4 * whole, row
        np.testing.assert_allclose(*row["losses"], rtol=1e-4, err_msg=row["system"])


def test_a_checkpoint_goes_on_with_another_number_of_devices(tmp_path):
    job = {"mode": "train", "folder": str(tmp_path / "cut"), "systems": ["ehi-pq"]}
    whole = job | {"folder": str(tmp_path / "whole")}
    assert run_one(whole)[0] == 0
    at_step = {"signal": "SIGTERM", "at": 4}
    code, _, err = run_one(job | at_step)
    assert code == EXIT_CODE
    assert err.strip().splitlines()[-1] == (
        "stopped by SIGTERM: ehi-pq joint is saved at step 5; the same command goes on "
        "(exit code 75)"
    )
    shutil.copytree(tmp_path / "cut", tmp_path / "same")
    # On the same device: as if nothing had been.
    assert run_one(job | {"folder": str(tmp_path / "same")})[0] == 0
    expected = end(tmp_path / "whole", "ehi-pq")
    assert_same_bits(expected, end(tmp_path / "same", "ehi-pq"))
    # On 4, and from there on 1.
    assert run_one(job | at_step | {"at": 8}, devices=4)[0] == EXIT_CODE
    assert run_one(job)[0] == 0
    np.testing.assert_allclose(
        losses(tmp_path / "cut", "ehi-pq"), losses(tmp_path / "whole", "ehi-pq"),
        rtol=1e-3,
    )  # fmt: skip
    found = end(tmp_path / "cut", "ehi-pq")
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-3)
