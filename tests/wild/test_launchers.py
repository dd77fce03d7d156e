"""Processes in odd environments: launchers, addresses, streams.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import io
import os
import sys
import warnings
from types import SimpleNamespace

import jax
import pytest
from wild_cases import failed, passed

from ehi.parallel import processes
from ehi.progress import Progress, track

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


@pytest.fixture
def initialized(monkeypatch):
    """Function: environment -> whether `initialize` joined other processes."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **o: joined.append(o))

    def initialize(environment):
        for name in (*SLURM, *OPEN_MPI, *KUBERNETES):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        processes.initialize()
        return bool(joined)

    return initialize


def without(environment, name):
    return {key: value for key, value in environment.items() if key != name}


# A variable set to nothing counts as not set, as of many standards (XDG base
# directories, NO_COLOR); `docker run -e NAME=` makes such ones.
@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        failed(SLURM | {"SLURM_NTASKS": ""}, False, id="no tasks"),
        failed(dict.fromkeys(SLURM, ""), False, id="empty Slurm"),
        failed(dict.fromkeys(OPEN_MPI, ""), False, id="empty MPI"),
        # A URI that a parent process left behind, without a job of this process.
        failed(
            without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), False,
            id="no size",
        ),
        failed(
            KUBERNETES | {"JOB_COMPLETION_INDEX": ""}, False,
            id="no index",
        ),
        # `salloc` without `srun` sets no step.
        passed(
            without(SLURM, "SLURM_STEP_NODELIST"), False,
            id="salloc",
        ),
        # Python's `int` ignores spaces around a number.
        passed(SLURM | {"SLURM_NTASKS": " 2 "}, True, id="spaces"),
        passed(SLURM | {"SLURM_NTASKS": "01"}, False, id="one task"),
    ],
)  # fmt: skip
def test_odd_environments_of_launchers(initialized, environment, joins):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert initialized(environment) == joins


# A number that cannot be read is a mistake, and one sentence that names the launcher.
@pytest.mark.parametrize(
    ("environment", "name"),
    [
        failed(SLURM | {"SLURM_NTASKS": "two"}, "slurm", id="two"),
        failed(SLURM | {"SLURM_NTASKS": "2(x2)"}, "slurm", id="(x2)"),
        failed(SLURM | {"SLURM_PROCID": ""}, "slurm", id="no rank"),
        failed(
            without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "ompi",
            id="no MPI rank",
        ),
    ],
)  # fmt: skip
def test_environments_that_cannot_be_read(initialized, environment, name):
    message = f"launcher {name} cannot be read .*give --coordinator"
    with pytest.raises(ValueError, match=message):
        initialized(environment)


# jax reads the number of the job itself, to choose a port: `int("")` in `initialize`.
def test_a_variable_that_jax_cannot_read_failed(initialized, monkeypatch):
    def initialize(**_):
        int(os.environ["SLURM_JOB_ID"])

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="launcher slurm cannot be read"):
        initialized(SLURM | {"SLURM_JOB_ID": ""})


# RFC 3986, section 3.2: an IPv6 host stands in brackets. A port of TCP has 16 bits, and
# 0 is none that one can connect to.
@pytest.mark.parametrize(
    ("address", "fits"),
    [
        passed("host:1234", True),
        passed("10.0.0.1:65535", True),
        passed("[fe80::1]:1234", True),
        failed("fe80::1:1234", False),
        failed("http://host:1234", False),
        failed("host:0", False),
        failed("host:65536", False),
        failed("host:²", False),
        passed("host:", False),
        passed(":1234", False),
        passed("host:-1", False),
        passed("", False, id="nothing"),
    ],
)
def test_addresses_of_the_coordinator(monkeypatch, address, fits):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **o: joined.append(a))
    if fits:
        processes.initialize(address, 2, 1)
        assert joined == [(address, 2, 1)]
    else:
        with pytest.raises(ValueError, match="is no address"):
            processes.initialize(address, 2, 1)
        assert not joined


# A process may be started without a stderr (`2>&-`: Python has None), or replace it.
@pytest.mark.parametrize("stream", [None, "closed", "odd"])
def test_progress_without_a_stderr_passed(monkeypatch, stream):
    if stream == "closed":
        stream = io.StringIO()
        stream.close()
    if stream == "odd":
        stream = SimpleNamespace(write=print, flush=print)
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(track(range(3), "work", "items")) == [0, 1, 2]
    with Progress("one call"):
        pass
