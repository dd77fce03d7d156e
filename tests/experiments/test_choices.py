"""What was tried on dev: collected from workdirs, and the table made of it."""

import json

import pytest

from ehi.eval.records import write_records
from experiments import tables
from experiments.paper import choices
from experiments.paper.choices import choices_table, collect_choices, read_choices
from experiments.run.library import replace_lines


def trial(options, ndcg, kept=False, budget="flat-64x", seed=0, **changes):
    fields = {
        "system": "lsh", "variant": "", "dataset": "pydocs", "seed": seed,
        "budget": budget, "queries": "dev", "options": options, "ndcg@10": ndcg,
        "kept": kept,
    }  # fmt: skip
    return fields | changes


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def workdirs(tmp_path, make_record):
    """A workdir of library rows and scores, and one of a sweep."""
    library, sweep = tmp_path / "library", tmp_path / "sweep"
    lines = [
        trial("query=float", 0.5, True), trial("query=bits", 0.4),
        trial("query=float", 0.25, seed=1), trial("query=bits", 0.3, True, seed=1),
        # This search is over the budget, so its trials do not count in the means.
        trial("query=float", 0.9, True, "visit-1"), trial("query=bits", -1, False,
                                                          "visit-1"),
        # No search of this budget is within it, so nothing was kept.
        trial("query=float", -1, True, "visit-0.1"),
        trial("query=bits", -1, False, "visit-0.1"),
    ]  # fmt: skip
    write_lines(library / "pydocs/seed0/default/trials.jsonl", lines)
    scored = [trial("ip", 0.5, system="opq"), trial("l2", 0.6, True, system="opq")]
    write_lines(library / "scores.jsonl", scored)
    records = [
        make_record(system="jpq", split=split, variant=name, ndcg_at_10=ndcg,
                    budget="flat-64x")
        for name, ndcg, split in (
            ("as-it-is", 0.5, "dev"), ("steps-double", 0.625, "dev"),
            ("steps-double", 0.1, "test"),
        )
    ]  # fmt: skip
    write_records(sweep / "results/pydocs.jsonl", records)
    return library, sweep


def rows_of(folder):
    return {row[0]: row[1:] for row in choices_table(read_choices(folder)).rows}


def test_every_kind_of_trial_has_a_line(tmp_path, workdirs, monkeypatch):
    monkeypatch.setattr(choices, "KEPT", {})
    folder = tmp_path / "results" / "dev"
    written = collect_choices(workdirs, folder)
    assert {path.name for path in written} == {
        "trials.jsonl", "scores.jsonl", "training-pydocs.jsonl",
    }  # fmt: skip
    rows = rows_of(folder)
    assert rows["lsh"] == (
        "library options", "pydocs dev, flat-64x, 2 seeds", "2",
        "query=float 0.3750, query=bits 0.3500",
        "query=float (2 of 3), query=bits (1 of 3)",
    )  # fmt: skip
    assert rows["opq"][3:] == ("l2 0.6000, ip 0.5000", "l2")
    assert rows["jpq"] == (
        "training", "pydocs dev, flat-64x, seed 0", "2",
        "steps-double 0.6250, as-it-is 0.5000", "as-it-is",
    )  # fmt: skip
    monkeypatch.setitem(choices.KEPT, "jpq", "steps-double")
    assert rows_of(folder)["jpq"][-1] == "steps-double"
    (_, lacking) = choices_table(read_choices(folder)).notes
    assert "repconc" in lacking and "jpq" not in lacking


def test_collecting_again_replaces_the_trials_of_a_cell(tmp_path, workdirs):
    folder = tmp_path / "dev"
    collect_choices(workdirs, folder)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    collect_choices(workdirs, folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
    again = tmp_path / "again"
    write_lines(again / "trials.jsonl", [trial("query=other", 0.75, True)])
    collect_choices([again], folder)
    lines = (folder / "trials.jsonl").read_text().splitlines()
    assert len(lines) == 7 and sum("other" in line for line in lines) == 1


def test_the_command_collects_and_fills_a_block(tmp_path, workdirs, make_record):
    results, page = tmp_path / "results", tmp_path / "FINDINGS.md"
    write_records(results / "pydocs.jsonl", [make_record()])
    arguments = [f"--results={results}"]
    words = [*arguments, "--collect_trials", *map(str, workdirs)]
    assert tables.main(words) == 0
    page.write_text("<!-- choices:begin -->\n<!-- choices:end -->\n")
    arguments += [f"--out={tmp_path / 'out'}", f"--readme={page}"]
    assert tables.main(arguments) == 0
    assert "| jpq | training | pydocs dev, flat-64x, seed 0 | 2 |" in page.read_text()
    assert "| jpq | training |" in (tmp_path / "out/choices.md").read_text()


def test_what_is_no_trial_is_named(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = [f"--results={tmp_path}", "--collect_trials"]
    assert tables.main([*arguments, str(empty)]) == 1
    assert "no trials.jsonl or scores.jsonl in" in capsys.readouterr().err
    for name, line in (("a", "{"), ("b", "[]"), ("c", '{"system": "lsh"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trials.jsonl").write_text(line)
        assert tables.main([*arguments, str(tmp_path / name)]) == 1
        assert "trials.jsonl, line 1: " in capsys.readouterr().err
    assert not (tmp_path / "dev").exists()


def test_lines_of_a_cell_are_written_anew(tmp_path):
    path = tmp_path / "trials.jsonl"
    cell = {"system": "lsh", "budget": "flat-64x"}
    replace_lines(path, cell, [cell | {"options": "a"}, cell | {"options": "b"}])
    other = cell | {"budget": "flat-32x"}
    replace_lines(path, other, [other | {"options": "c"}])
    replace_lines(path, cell, [cell | {"options": "d"}])
    found = [json.loads(line)["options"] for line in path.read_text().splitlines()]
    assert found == ["c", "d"]
