import platform
import subprocess
import sys

import pytest

from ehi.eval import provenance


def test_versions_name_python_and_installed_packages_only():
    found = provenance.versions(("numpy", "no-such-package"))
    assert found["python"] == platform.python_version()
    assert set(found) == {"python", "numpy"}


def test_evaluation_needs_no_jax():
    code = (
        "import sys; from ehi.eval import measure, provenance, records, report; "
        "provenance.versions(); provenance.hardware(); "
        'sys.exit("jax" in sys.modules)'
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_hardware_names_cores_and_memory():
    assert " cores, " in provenance.hardware()
    assert provenance.hardware().rstrip().endswith("GiB") or " x " in (
        provenance.hardware()
    )


def test_config_hash_ignores_order_and_seed_only():
    config = {"lr": 1e-3, "tree": {"height": 2, "branching": 8}, "seed": 0}
    same = {"seed": 1, "tree": {"branching": 8, "height": 2}, "lr": 0.001}
    found = provenance.config_hash(config)
    assert found == provenance.config_hash(same)
    assert len(found) == 12
    other = {**config, "tree": {"height": 1, "branching": 8}}
    assert found != provenance.config_hash(other)
    assert found != provenance.config_hash(config, without=())


def test_config_hash_refuses_what_is_not_json():
    with pytest.raises(TypeError):
        provenance.config_hash({"model": object()})


def test_git_commit_tells_changed_files(tmp_path):
    assert provenance.git_commit(tmp_path) == "unknown"

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments],
            check=True,
            capture_output=True,
        )

    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first", "--no-gpg-sign")
    commit = provenance.git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "untracked").write_text("x")
    assert provenance.git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("b")
    assert provenance.git_commit(tmp_path) == f"{commit}+dirty"
