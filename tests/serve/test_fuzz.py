"""The service against its own OpenAPI: schemathesis makes requests from it.

    python -m pip install schemathesis  # in an environment of its own
    EHI_SCHEMATHESIS=VENV/bin/schemathesis python -m pytest -m slow tests/serve

`EHI_SERVE_RESULTS` names a folder that keeps what it says.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from serve_cases import NUM, command, make_folder, request

SCHEMATHESIS = os.environ.get("EHI_SCHEMATHESIS") or shutil.which("schemathesis")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SCHEMATHESIS is None, reason="needs schemathesis"),
]
# A text that is no condition fits the schema of `where`, and is refused all the same.
CASES = {
    "plain": ((), {}, ()),
    "filters": (
        ("--exclude-checks=positive_data_acceptance",),
        {"metadata": [{"lang": "en", "year": i} for i in range(NUM)]},
        (),
    ),
    "token": (
        ("-H", "Authorization: Bearer sesame"),
        {"words": False, "strings": False},
        ("--token=sesame",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_no_request_is_answered_otherwise_than_described(name, tmp_path):
    """All its checks: no 500, no undescribed status or body, nothing wrong accepted."""
    options, index, serving = CASES[name]
    folder = make_folder(tmp_path / "index", **index)
    # The text that is refused without an encoder has the status 409 of its own.
    with command(folder, "--timeout=3", *serving) as (_, port):
        done = subprocess.run(
            [SCHEMATHESIS, "run", f"http://127.0.0.1:{port}/openapi.json",
             "--max-examples=200", "--seed=1", *options],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        if folder := os.environ.get("EHI_SERVE_RESULTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            plain = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1", done.stdout)
            (Path(folder) / f"schemathesis-{name}.txt").write_text(plain)
        assert done.returncode == 0, done.stdout
        assert request(port, "GET", "/health")[0] == 200
