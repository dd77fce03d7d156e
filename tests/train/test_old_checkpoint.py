"""A checkpoint of version 0.1 goes on, or is refused in one sentence.

`checkpoint_0_1.zip` holds checkpoints/4 and metrics.jsonl of the run of `test_loop`,
cut at step 7, by the code of version 0.1 (commit 285bdc8).
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_loop import train

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint_0_1.zip"


@pytest.fixture
def old_run(tmp_path):
    with zipfile.ZipFile(FIXTURE) as file:
        file.extractall(tmp_path / "old")
    return tmp_path / "old"


def _losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


def test_an_old_run_goes_on_from_its_checkpoint(
    tiny, tiny_model, tmp_path, old_run, monkeypatch
):
    from ehi.train import loop

    whole = train(tiny, tiny_model, tmp_path / "whole")
    make_batch, steps = loop.make_batch, []

    def noting(*args, step, **options):
        steps.append(step)
        return make_batch(*args, step=step, **options)

    monkeypatch.setattr(loop, "make_batch", noting)
    resumed = train(tiny, tiny_model, old_run)
    assert steps == list(range(4, 12))
    # Other processors round otherwise, so the bits are not compared.
    for name in whole:
        np.testing.assert_allclose(resumed[name], whole[name], atol=2e-3, err_msg=name)
    old, new = _losses(old_run), _losses(tmp_path / "whole")
    assert old.keys() == new.keys()
    np.testing.assert_allclose([old[s] for s in new], list(new.values()), rtol=1e-2)


def test_an_old_checkpoint_of_another_model_is_refused(tiny, tiny_model, old_run):
    def wider(**options):
        return tiny_model(head_hidden=9, **options)

    with pytest.raises(ValueError, match=r"does not fit .*head/w_in is .* there, "):
        train(tiny, wider, old_run)
