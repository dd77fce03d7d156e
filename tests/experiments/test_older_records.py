"""A new recipe replaces older records; those that take longest wait, marked."""

import dataclasses

import numpy as np
import pytest

from ehi.eval.records import read_records, read_values, write_records, write_values
from experiments import tables
from experiments.paper.older import waits

CELLS = (
    ("opq", "", "flat-64x"),  # made again
    ("lsh", "", "flat-64x"),  # not made again: dropped
    ("jpq", "", "flat-64x"),  # joint, but not of T1: dropped
    ("ehi", "", "visit-10"),  # a joint row of T1: waits
    ("faiss-ivf", "on-ehi", "visit-10"),  # a control of T1: waits
    ("ehi-pq", "", "visit-10-64x"),  # the default of T4: made again, and waits there
    ("ehi-pq", "no-path", "visit-10-64x"),  # an ablation: waits
)
AGAIN = (("opq", "", "flat-64x"), ("ehi-pq", "", "visit-10-64x"))


@pytest.fixture
def write(tmp_path, make_record):
    """write(folder, cells, recipe, nDCG@10) -> folder of records with their values"""

    def make(name, cells, recipe, ndcg, dataset="pydocs"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        records = [
            make_record(system=s, variant=v, budget=b, dataset=dataset, recipe=recipe,
                        ndcg_at_10=ndcg)
            for s, v, b in cells
        ]  # fmt: skip
        values = {r.cell: (np.array(["a", "b"]), np.full(2, ndcg)) for r in records}
        write_records(folder / f"{dataset}.jsonl", records)
        write_values(folder / f"{dataset}.per_query.npz", values)
        return folder

    return make


def read(folder):
    """(system, variant, budget) -> recipe and nDCG@10; the same cells have values."""
    records = read_records(folder / "pydocs.jsonl")
    values = read_values(folder / "pydocs.per_query.npz")
    assert {r.cell: r.ndcg_at_10 for r in records} == {
        cell: pytest.approx(ndcg.mean()) for cell, (_, ndcg) in values.items()
    }
    return {(r.system, r.variant, r.budget): (r.recipe, r.ndcg_at_10) for r in records}


def test_new_records_replace_older_ones_but_for_those_that_wait(write, capsys):
    results = write("results", CELLS, 3, 0.25)
    write("results", CELLS, 3, 0.25, dataset="squad-dev")
    newer = write("newer", AGAIN, 4, 0.5)
    arguments = [f"--results={results}", "--renew", str(newer)]
    assert tables.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(results / "older/pydocs.jsonl"), str(results / "pydocs.jsonl"),
    ]  # fmt: skip
    assert read(results) == dict.fromkeys(AGAIN, (4, 0.5))
    assert read(results / "older") == dict.fromkeys(CELLS[3:], (3, 0.25))
    assert len(read_records(results / "squad-dev.jsonl")) == len(CELLS)
    # More of the new recipe is added, and what waits is left alone.
    more = write("more", (("lsh", "", "flat-64x"),), 4, 0.75)
    assert tables.main([f"--results={results}", "--renew", str(more)]) == 0
    assert read(results)["lsh", "", "flat-64x"] == (4, 0.75)
    assert len(read(results)) == 3 and len(read(results / "older")) == 4


def test_what_waits_is_shown_in_its_table_without_mix(write, tmp_path):
    results = write("results", CELLS, 3, 0.25)
    newer = write("newer", AGAIN, 4, 0.5)
    assert tables.main([f"--results={results}", "--renew", str(newer)]) == 0
    arguments = [f"--results={results}", f"--out={tmp_path / 'out'}"]
    assert tables.main(arguments) == 0
    first, second, fourth = (
        (tmp_path / f"out/pydocs/{name}.md").read_text() for name in ("T1", "T2", "T4")
    )
    assert "| ehi (recipe 3) | joint |" in first
    assert "| faiss-ivf:on-ehi (recipe 3) | control |" in first
    # This row has a newer record, so the older ones are not shown.
    assert "| ehi-pq (64x) | joint |" in first and "0.250" not in second
    assert "jpq" in second.split("- Not run: ")[1]
    # Ablations are shown beside the default of their own recipe.
    assert "| ehi-pq | the default | 1 | 0.2500 |" in fourth
    assert "ehi-pq:no-path | loss path off" in fourth
    assert "All of it is of recipe 3" in fourth
    assert "These records are of test" in fourth
    # A new ablation has the new default beside it.
    one = write("one", (("ehi-pq", "no-path", "visit-10-64x"),), 4, 0.75)
    assert tables.main([f"--results={results}", "--renew", str(one)]) == 0
    assert tables.main(arguments) == 0
    fourth = (tmp_path / "out/pydocs/T4.md").read_text()
    assert "| ehi-pq | the default | 1 | 0.5000 |" in fourth
    assert "recipe 3" not in fourth


def test_older_records_are_no_renewal(write, capsys, tmp_path):
    results = write("results", CELLS, 3, 0.25)
    before = read(results)
    older = write("newer", AGAIN, 3, 0.5)
    assert tables.main([f"--results={results}", "--renew", str(older)]) == 1
    assert "is of recipe 3; expected at least 4" in capsys.readouterr().err
    assert tables.main([f"--results={results}", "--renew", str(tmp_path)]) == 1
    assert read(results) == before and not (results / "older").exists()


def test_only_choices_and_joint_rows_of_the_first_table_wait(make_record):
    record = make_record(system="ehi", budget="visit-5")
    assert waits(record.cell)
    assert not waits(dataclasses.replace(record, system="kmeans-tree").cell)
    assert not waits(dataclasses.replace(record, budget="visit-5-64x").cell)
