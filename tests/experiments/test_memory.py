"""A large corpus goes through files; a small one that is treated so gives the same."""

import numpy as np
import pytest
from topics import tiny

from ehi.encode import embed
from experiments.run import train
from experiments.run.experiment import default_budgets, open_experiment, run_cells


def run(config, workdir):
    """Parameters of all systems, embeddings and nDCG of all cells."""
    experiment = open_experiment(config, workdir)
    found = {}
    for name in config.systems:
        budgets = default_budgets(experiment.config, name)
        for budget, record in run_cells(experiment, name, budgets):
            found[name, budget.name] = np.array(record.ndcg_at_10)
    for run, trained in experiment.trained.items():
        found[run, "documents"] = np.asarray(trained.documents)
        found[run, "queries"] = trained.queries[np.arange(0, len(trained.queries), 7)]
        for name, value in trained.params.items():
            found[run, name] = np.asarray(value)
    return found, experiment


@pytest.fixture
def as_large(monkeypatch):
    """Treats any corpus as one that does not fit into memory."""

    def treat():
        monkeypatch.setattr(train, "IN_MEMORY", 0)
        monkeypatch.setattr(embed, "KEPT", 0)

    return treat


MINED = {"joint.refresh": 3, "joint.mined_per_query": 1}


@pytest.mark.parametrize(
    ("systems", "changes"),
    [(("ehi-pq", "jpq"), {}), (("ehi",), MINED)],
)
def test_files_and_rows_that_travel_change_no_number(
    corpus, tmp_path, as_large, systems, changes
):
    config = tiny(corpus, systems=systems, **changes)
    small, _ = run(config, tmp_path / "small")
    as_large()
    config.device_table_gib = 0.0
    large, experiment = run(config, tmp_path / "large")
    assert small.keys() == large.keys()
    for name, value in small.items():
        np.testing.assert_array_equal(large[name], value, err_msg=str(name))
    for trained in experiment.trained.values():
        assert isinstance(trained.documents, np.memmap)
    assert not (tmp_path / "large" / "outputs" / "mining").exists()


def test_a_trained_tower_encodes_its_documents_once(corpus, tmp_path, monkeypatch):
    encoded, encode = [], embed.encode

    def counting(apply, params, tokens, **options):
        encoded.append(len(tokens))
        return encode(apply, params, tokens, **options)

    monkeypatch.setattr(embed, "encode", counting)
    changes = {"tower.trainable": "all", "tower.query_tower": True, "dense.steps": 0}
    changes |= {f"{phase}.encoded": 4 for phase in ("dense", "joint", "jpq")}
    config = tiny(corpus, systems=("dense", "opq", "jpq"), **changes)
    _, experiment = run(config, tmp_path)
    documents = len(experiment.inputs.dataset.documents)
    assert encoded.count(documents) == 1  # by the tower that all three share
