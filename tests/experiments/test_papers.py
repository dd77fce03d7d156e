"""Each paper config for real: its own format, train, encode, build, search, record."""

import math

import pytest
from paper_data import small, write_data

from ehi.eval.records import read_records
from ehi.index import open_index
from experiments import main
from experiments.configs.papers import ehi, jpq, poeem
from experiments.run import train
from experiments.systems import SYSTEMS, Budget

ALL = [
    *((ehi, name + end) for name in ehi.DATA_SETS for end in ("", "-encoder")),
    *((jpq, name) for name in jpq.ARGUMENTS),
    *((poeem, name) for name in poeem.DATA_SETS),
]
# One of each format and system; the others are marked slow.
QUICK = [
    (ehi, "scifact"),
    (ehi, "msmarco"),
    (jpq, "passage-48"),
    (jpq, "document-24-star"),
    (poeem, "movielens-1m"),
]


def label(value):
    return getattr(value, "__name__", str(value)).rpartition(".")[2]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("papers")


@pytest.mark.parametrize(
    ("file", "name"),
    [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in ALL],
    ids=label,
)
def test_a_paper_config_runs(file, name, data, tmp_path, monkeypatch):
    c = file.get_config(name)
    write_data(c, data)
    monkeypatch.setenv("EHI_DATA", str(data))
    c = small(c)
    main.run(c, tmp_path)
    records = read_records(tmp_path / "results.jsonl")
    expected = {
        (system, budget)
        for system in c.systems
        for budget in c.budgets
        if Budget.parse(budget).applies_to(SYSTEMS[system])
    }
    assert {(record.system, record.budget) for record in records} == expected
    for record in records:
        assert record.variant == "paper" and record.split == c.split
        assert math.isfinite(record.ndcg_at_10) and record.ndcg_at_10 >= 0
        assert record.compression == (16 if record.budget.endswith("x") else 1)
    trained = [s for s in c.systems if any(c[p].steps for p in SYSTEMS[s].phases)]
    assert trained and (tmp_path / "metrics.jsonl").stat().st_size
    index = open_index(tmp_path / "index")
    assert index.num_documents == 2000


def test_triples_are_negatives_where_a_phase_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setenv("EHI_DATA", str(data))
    c = small(ehi.get_config("msmarco"))
    write_data(c, data)
    c.systems, c.budgets = ("ehi",), ("visit-100",)
    c.joint.negatives = "given"
    drawn = []
    given = train.given_negatives

    def spied(*arguments, **options):
        drawn.append(given(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(train, "given_negatives", spied)
    main.run(c, tmp_path / "with")
    (table,) = drawn  # read once, not mined again
    assert len(read_records(tmp_path / "with" / "results.jsonl")) == 1
    assert len(table) == 64 and (table >= 0).all()  # of each query that is drawn
    assert all(len(set(row)) <= 4 for row in table.tolist())
    c = small(ehi.get_config("scifact"))
    write_data(c, data)
    c.joint.negatives = "given"
    with pytest.raises(ValueError, match="joint.negatives is 'given', but scifact br"):
        main.run(c, tmp_path / "without")
