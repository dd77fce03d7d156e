import dataclasses
import functools
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ehi.eval import significance
from ehi.eval.metrics import evaluate
from ehi.eval.records import read_records, write_records
from experiments import tables
from experiments.paper import architecture
from experiments.paper.definitions import TABLES
from experiments.paper.readme import fill_blocks
from experiments.paper.results import collect, read_results

BEGIN, END = "<!-- tables:begin -->", "<!-- tables:end -->"


@pytest.fixture
def run_folder(tmp_path, make_record):
    """run_folder(name, seed, gain) -> workdir of a run with two systems"""

    def make(name, seed, gain=1):
        folder = tmp_path / name
        qrels = {f"q{i:02}": {"relevant": 1} for i in range(20)}
        for system, found in (("kmeans-tree", 4), ("ehi", 4 + gain * 8)):
            hits = {f"q{i:02}": {"relevant": 1.0} for i in range(found)}
            values = evaluate(hits, qrels)
            record = make_record(
                system=system, seed=seed, ndcg_at_10=values["ndcg@10"].mean()
            )
            write_records(folder / "results.jsonl", [record])
            (folder / "trec").mkdir(exist_ok=True)
            np.save(folder / "trec" / f"{record.cell.stem}.npy", values)
        return folder

    return make


def test_runs_become_a_table_in_the_readme(tmp_path, run_folder, capsys):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    runs = [str(run_folder("a", 0)), str(run_folder("b", 1))]
    assert tables.main([f"--results={results}", "--collect", *runs]) == 0
    assert {p.name for p in results.iterdir()} == {
        "pydocs.jsonl",
        "pydocs.per_query.npz",
    }
    out = tmp_path / "out"
    status = tables.main([f"--results={results}", f"--out={out}", f"--readme={readme}"])
    assert status == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "\nold\n" not in text
    # 8 of 20 queries differ, with one sign, in the only test: p = 2 / 2^8.
    none = "| not run | not run | not run |"
    assert f"| kmeans-tree | separate | 1536 {none} *0.200 ± 0.000* {none}" in text
    assert f"| ehi | joint | 1536 {none} **0.600 ± 0.000**† {none}" in text
    assert f"| ehi | joint {none} 0.800 {none}" in text  # R@100
    assert text.split(f"{BEGIN}\n")[1].split(f"\n{END}")[0] in (capsys.readouterr().out)
    assert "| +0.4000 ++ | 0.008 |" in (out / "pydocs-test.md").read_text()
    line = "| ehi | visit-10 | kmeans-tree | +0.4000 | ++ | 0.008 |"
    assert line in (out / "pydocs/T1.md").read_text()


def test_committed_records_make_every_table(tmp_path, monkeypatch):
    few = functools.partial(significance.randomisation_tests, permutations=1000)
    monkeypatch.setattr(significance, "randomisation_tests", few)
    results = Path(tables.__file__).parent / "results"
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    front = tmp_path / "FRONT.md"
    front.write_text(
        "<!-- summary:begin -->\n<!-- summary:end -->\n"
        "<!-- speed:begin -->\n<!-- speed:end -->\n"
    )
    arguments = [f"--results={results}", f"--out={tmp_path}"]
    arguments += ["--readme", str(readme), str(front)]
    assert tables.main([*arguments, f"--figures={tmp_path}/figures"]) == 0
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"architecture.svg", "visited.png", "bytes.png"}
    assert "| ehi-pq | joint | " in front.read_text()
    assert "| raw vectors, in batches | " in front.read_text()
    for name, wanted in (("pydocs", TABLES), ("scifact", set(TABLES) - {"T4"})):
        folder = tmp_path / name
        written = {path.name for path in folder.iterdir()}
        assert written >= {
            *(f"{table}.{kind}" for table in wanted for kind in ("md", "csv", "tex")),
            "T1.png",
            "T2.png",
        }
        assert ("T4.md" in written) == ("T4" in wanted)
        assert (folder / "T1.png").read_bytes().startswith(b"\x89PNG")
        headings = [f"### {table}, {name}: " for table in ("T1", "T2", "T3")]
        assert all(heading in readme.read_text() for heading in headings)
    assert (
        "181 are answers in its train split"
        in (tmp_path / "scifact" / "T1.tex").read_text()
    )
    assert "JPQ" in (tmp_path / "published.md").read_text()
    orders = readme.read_text().split("### Published orders, checked here")[1]
    assert "| jpq > opq | flat-64x | JPQ | " in orders


def test_cells_that_were_not_run_are_shown_with_the_command(tmp_path, make_record):
    for dataset in ("scifact", "own"):
        path = tmp_path / f"{dataset}.jsonl"
        write_records(path, [make_record(dataset=dataset, seed=s) for s in range(2)])
    assert tables.main([f"--results={tmp_path}", f"--out={tmp_path}"]) == 0
    for name, argument in (("scifact", "beir/scifact"), ("own", "PATH/own")):
        text = (tmp_path / name / "T1.md").read_text()
        assert "| ehi | visit-1 | 0 | not run | - |" in text
        assert "- Not run: dense-zero-shot, dense, faiss-ivf, " in text
        assert text.endswith(
            "85 of 86 cells not run, 1 with fewer than 3 seeds; to make them: `python "
            f"-m experiments.reproduce --table=T1 --dataset={argument} --seeds=3 "
            "--workdir=DIR`.\n"
        )
    # No row of T2 was run, so there is no figure.
    assert not (tmp_path / "own" / "T2.png").exists()


def test_readme_is_left_alone_by_records_of_other_datasets(
    tmp_path, make_record, capsys
):
    write_records(tmp_path / "own.jsonl", [make_record(dataset="own")])
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\nold\n{END}\n")
    arguments = [f"--results={tmp_path}", f"--out={tmp_path}", f"--readme={readme}"]
    assert tables.main(arguments) == 1
    assert "the records are of own" in capsys.readouterr().err
    assert "old" in readme.read_text()


def test_a_split_without_records_is_named(tmp_path, make_record, capsys):
    write_records(tmp_path / "a.jsonl", [make_record()])
    arguments = [f"--results={tmp_path}", f"--out={tmp_path}", "--split=dev"]
    assert tables.main(arguments) == 1
    assert "no records of split 'dev'; there are records of ['test']" in (
        capsys.readouterr().err
    )


def test_collecting_again_replaces_cells(tmp_path, run_folder):
    results = tmp_path / "results"
    collect([run_folder("a", 0)], results)
    collect([run_folder("b", 0, gain=0)], results)
    assert [r.ndcg_at_10 for r in read_records(results / "pydocs.jsonl")] == [0.2, 0.2]
    _, values = read_results(results)
    assert [ndcg.sum() for _, ndcg in values.values()] == [4, 4]


def test_without_per_query_values_there_is_no_p_value(tmp_path, make_record):
    records = [make_record(), make_record(system="kmeans-tree")]
    write_records(tmp_path / "pydocs.jsonl", records)
    assert tables.main([f"--results={tmp_path}", f"--out={tmp_path}"]) == 0
    (line,) = [line for line in (tmp_path / "pydocs-test.md").read_text().splitlines()
               if line.startswith("| ehi |")]  # fmt: skip
    assert line.endswith("| - | - |")


@pytest.mark.parametrize("change", [{"recipe": 2}, {"config_hash": "0" * 12}])
def test_rows_of_different_origin_are_refused_unless_mixed(
    tmp_path, make_record, change, capsys
):
    write_records(tmp_path / "a.jsonl", [make_record(), make_record(seed=1, **change)])
    arguments = [f"--results={tmp_path}", f"--out={tmp_path}"]
    assert tables.main(arguments) == 1
    err = capsys.readouterr().err
    assert next(iter(change)) in err and "--mix" in err
    assert tables.main([*arguments, "--mix"]) == 0
    assert (
        "Of mixed configs or recipes: ehi visit-10."
        in (tmp_path / "pydocs" / "T1.md").read_text()
    )


def test_a_commit_may_differ(tmp_path, make_record):
    write_records(
        tmp_path / "a.jsonl", [make_record(), make_record(seed=1, git_commit="x")]
    )
    assert len(read_results(tmp_path)[0]) == 2


def test_of_a_cell_in_two_files_the_later_counts(tmp_path, make_record):
    for name, value in (("a", 0.1), ("b", 0.2)):
        write_records(tmp_path / f"{name}.jsonl", [make_record(ndcg_at_10=value)])
    assert [r.ndcg_at_10 for r in read_results(tmp_path)[0]] == [0.2]


@pytest.mark.parametrize("text", ["none", f"{END}{BEGIN}", f"{BEGIN}{END}" * 2])
def test_readme_without_the_two_markers_is_left_alone(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="tables:begin"):
        fill_blocks(path, {"tables": "new"})
    assert path.read_text() == text


def test_every_block_of_a_file_is_filled(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n<!-- y:begin -->\n<!-- y:end -->"
    )
    fill_blocks(path, {"x": "1", "y": "2", "z": "3"})
    assert path.read_text() == (
        "a\n<!-- x:begin -->\n1\n<!-- x:end -->\nb\n<!-- y:begin -->\n2\n<!-- y:end -->"
    )


def test_the_committed_figure_is_the_one_that_is_drawn(tmp_path):
    architecture.draw(tmp_path / "drawn.svg")
    committed = Path(tables.__file__).parent / "results/figures/architecture.svg"
    assert committed.read_bytes() == (tmp_path / "drawn.svg").read_bytes()
    ElementTree.parse(committed)  # well-formed


def test_missing_results_are_named(tmp_path, capsys):
    assert tables.main([f"--results={tmp_path}", f"--out={tmp_path}"]) == 1
    assert "no *.jsonl" in capsys.readouterr().err


def test_every_joint_system_is_compared_with_a_known_one():
    from experiments.systems import SYSTEMS

    counterparts = tables.separate_counterparts()
    assert counterparts["ehi-pq"] == "kmeans-tree-opq"
    assert set(counterparts) | set(counterparts.values()) <= set(SYSTEMS)


def test_two_scorings_of_codes_are_refused_unless_mixed(tmp_path, make_record, capsys):
    codes = {"budget": "flat-64x", "recipe": 3}
    older, newer = make_record(system="opq", **codes), make_record(system="jpq")
    newer = dataclasses.replace(newer, budget="flat-64x", recipe=4)
    raw = make_record(recipe=3)  # raw vectors were always scored alike
    write_records(tmp_path / "pydocs.jsonl", [older, newer, raw])
    arguments = [f"--results={tmp_path}", f"--out={tmp_path}"]
    assert tables.main(arguments) == 1
    assert capsys.readouterr().err == (
        "error: ('opq', '', 'pydocs', 'test', 0, 'flat-64x') of recipe 3 scores codes "
        "by inner product, ('jpq', '', 'pydocs', 'test', 0, 'flat-64x') of recipe 4 as "
        "was chosen on dev: make the older one again, or pass --mix\n"
    )
    assert tables.main([*arguments, "--mix"]) == 0
    written = (tmp_path / "pydocs" / "T2.md").read_text()
    assert "| opq (recipe 3) | separate |" in written
    assert "- Rows of (recipe 3) wait to be made again: " in written
    # Other splits and data sets are other tables.
    write_records(tmp_path / "own.jsonl", [dataclasses.replace(older, dataset="own")])
    (tmp_path / "pydocs.jsonl").unlink()
    write_records(tmp_path / "pydocs.jsonl", [newer, raw])
    assert len(read_results(tmp_path)[0]) == 3


def test_choices_are_shown_of_dev(tmp_path, make_record):
    cell = {"system": "ehi-pq", "budget": "visit-10-64x"}
    records = [make_record(**cell, variant=v) for v in ("", "no-path")]
    path = tmp_path / "pydocs.jsonl"
    write_records(path, records)
    assert tables.main([f"--results={tmp_path}", f"--out={tmp_path}"]) == 0
    written = (tmp_path / "pydocs" / "T4.md").read_text()
    assert "pydocs, test split" in written
    assert "These records are of test; choices are made on dev." in written
    write_records(path, [dataclasses.replace(r, split="dev") for r in records])
    assert tables.main([f"--results={tmp_path}", f"--out={tmp_path}"]) == 0
    written = (tmp_path / "pydocs" / "T4.md").read_text()
    assert "pydocs, dev split" in written and "These records" not in written
    assert "pydocs, test split" in (tmp_path / "pydocs" / "T3.md").read_text()


def test_what_it_costs_and_unlabelled_queries_are_shown_if_known(tmp_path, make_record):
    known = {
        "docs_visited_p95": 0.2, "docs_visited_max": 0.5, "total_bytes_per_doc": 60.0,
        "total_bytes_per_doc_1m": 25.5, "unlabelled_queries": 7, "work": 0.15,
        "ndcg_at_10_unlabelled": 0.25, "recall_at_100_unlabelled": 0.5,
    }  # fmt: skip
    budgets = {"visit-10": known, "flat": known | {"work": 1.2}}
    records = [make_record(budget=b, **fields) for b, fields in budgets.items()]
    write_records(tmp_path / "scifact.jsonl", records)
    assert tables.main([f"--results={tmp_path}", f"--out={tmp_path}"]) == 0
    written = (tmp_path / "pydocs" / "T1.md").read_text()
    assert "the 7 queries whose documents are no answers in train:" in written
    assert "| 0.250 |" in written
    assert "| 9.9 | 20.0 | 50.0 | 15.0 | 1536 | 60 | 25.5 |" in written
    assert (
        "at equal work, between the budgets:" in written and "](T1-work.png)" in written
    )
    assert (tmp_path / "pydocs" / "T1-work.png").exists()
    assert "| 1536 | 60 | 25.5 | 15 |" in (tmp_path / "pydocs" / "T5.md").read_text()
