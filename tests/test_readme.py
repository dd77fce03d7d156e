"""What the README files say is true: links, paths, commands, code and numbers."""

import argparse
import importlib
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from absl import flags

import ehi
from ehi.eval.records import read_records
from experiments.paper import readme
from experiments.paper.definitions import TABLES, budgets_of, rows_of
from experiments.tables import README_DATASETS

ROOT = Path(ehi.__file__).resolve().parents[1]
FILES = (
    "README.md",
    "ehi/index/README.md",
    "ehi/retrievers/README.md",
    "experiments/README.md",
    "experiments/results/README.md",
    "CHANGELOG.md",
)
# What stands for something of the reader's.
PLACEHOLDERS = re.compile(r"PATH|DIR|FILE|CONFIG|NAME|HOST|PHASE")


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(name):
    return re.findall(r"^```python\n(.*?)^```", text_of(name), re.M | re.S)


def commands():
    """(file, command) of all commands, without comments and repetition."""
    found = {}
    for name in FILES:
        text = text_of(name)
        lines = re.findall(r"^(?:    |       )(\S.*)$", text, re.M)
        lines += re.findall(r"`((?:python|bash) [^`]+)`", text)
        for line in lines:
            for part in line.partition("  #")[0].split("&&"):
                if re.match(r"(python|bash) ", part.strip()):
                    found[name, part.strip()] = None
    return [(n, c) for n, c in found if "experiments.NAME" not in c]


def anchors(text):
    """The anchors that GitHub gives to the headings of a file."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings
    }


def test_the_readme_takes_one_screen_of_patience():
    assert len(text_of("README.md").splitlines()) <= 120


@pytest.mark.parametrize("name", FILES)
def test_links_lead_to_files_and_headings(name):
    links = re.findall(r"\]\(([^)]+)\)", text_of(name))
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", FILES)
def test_paths_in_the_text_exist(name):
    words = re.findall(
        r"`([\w.\-]+/[\w./\-]+\.(?:py|md|jsonl?|txt|npz|toml))`", text_of(name)
    )
    for word in words:
        places = (ROOT / word, (ROOT / name).parent / word)
        assert any(place.exists() for place in places), f"{name} names {word}"


@pytest.mark.parametrize("name", FILES)
def test_modules_in_the_text_exist(name):
    text = text_of(name)
    if name == "CHANGELOG.md":  # its tables name old modules on the left
        text = "\n".join(re.findall(r"\| ([^|]*) \|$", text, re.M))
    for word in set(re.findall(r"`((?:ehi|experiments)(?:\.\w+)+)`", text)):
        parts = word.split(".")
        for end in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError:
                continue
            for part in parts[end:]:
                found = getattr(found, part)
            break
        else:
            pytest.fail(f"{name} names {word}")


@pytest.mark.parametrize(("name", "command"), commands())
def test_commands_are_understood(name, command, monkeypatch):
    words = shlex.split(command)
    if words[:2] == ["python", "-m"] and words[2].startswith(("experiments.", "ehi.")):
        module = importlib.import_module(words[2])
        if hasattr(module, "__path__"):  # of a package, this file runs
            module = importlib.import_module(f"{words[2]}.__main__")
        check_arguments(module, words[3:], monkeypatch)
    elif words[:3] == ["python", "-m", "pip"]:
        check_extras(words)
    elif words[:3] == ["python", "-m", "pytest"]:
        settings = tomllib.loads(text_of("pyproject.toml"))["tool"]["pytest"]
        markers = " ".join(settings["ini_options"]["markers"])
        for word in words[3:]:
            assert word == "-m" or word in markers or (ROOT / word).exists()
    else:
        assert words[0] == "bash" and (ROOT / words[1]).exists()


def check_arguments(module, words, monkeypatch):
    """The command line of an experiment, without running it."""
    name = module.__name__.rpartition(".")[2]
    if name in ("main", "encode"):
        for word in words:
            flag, _, value = word.removeprefix("--").partition("=")
            if flag.startswith("config."):
                section = flag.removeprefix("config.").split(".")[0]
                assert PLACEHOLDERS.match(section) or section in config_of(words)
            else:
                assert flag in flags.FLAGS, f"{name} has no --{flag}"
            if flag == "config":
                config_of(words)
    elif name == "benchmark":
        monkeypatch.setattr(sys, "argv", ["benchmark", words[0]])
        parser = argparse.ArgumentParser()
        module._add_arguments(words[0], parser)
        if words[0] not in module.OWN_FILES:
            parser.add_argument("--json")
        parser.parse_args(words[1:])
    else:
        module.parse_arguments(words)
        for word in words:
            path = word.partition("=")[2] or word
            if path.startswith(("experiments/", "ehi/")):
                assert (ROOT / path).exists()


def config_of(words):
    """The config that a command names; the base one where it names a placeholder."""
    value = next(w for w in words if w.startswith("--config=")).partition("=")[2]
    if PLACEHOLDERS.search(value):
        value = "experiments/configs/base.py"
    path, _, variant = value.partition(":")
    assert (ROOT / path).exists(), f"no config {path}"
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    return module.get_config(variant) if variant else module.get_config()


def check_extras(words):
    extras = tomllib.loads(text_of("pyproject.toml"))["project"][
        "optional-dependencies"
    ]
    for names in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        assert set(names.split(",")) <= set(extras)


@pytest.mark.parametrize(
    "name", ["README.md", "ehi/index/README.md", "experiments/README.md"]
)
def test_code_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks(name)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {})
    if name == "experiments/README.md":
        # Each of the three queries is next to a document, and finds that.
        (block,), printed = blocks, capsys.readouterr().out
        assert len(block.splitlines()) <= 10
        found = re.findall(r"\[+ *(\d+(?: +\d+){4})\]", printed)
        assert all(str(n) in ids.split() for n, ids in enumerate(found)), printed
        assert len(found) == 3
    if name == "README.md":
        # Each of the three queries is a document, and finds itself first.
        assert len(blocks[0].splitlines()) <= 10
        assert re.match(r"\[\[ *0 ", capsys.readouterr().out)


def test_the_small_table_has_the_means_of_the_records():
    table = block_of("README.md", "summary")
    rows = {
        cells[0]: cells[2:]
        for line in table.splitlines()
        if line.startswith("|")
        and (cells := [c.strip() for c in line.split("|")[1:-1]])
    }
    assert set(readme.SYSTEMS) <= set(rows)
    records = [
        record
        for dataset in readme.DATASETS
        for record in read_records(ROOT / f"experiments/results/{dataset}.jsonl")
    ]
    for system in readme.SYSTEMS:
        shown = iter(rows[system])
        for dataset in readme.DATASETS:
            for budget in readme.BUDGETS:
                values = [
                    r.ndcg_at_10
                    for r in records
                    if (r.system, r.variant, r.dataset, r.split, r.budget)
                    == (system, "", dataset, "test", budget)
                ]
                expected = f"{np.mean(values):.3f}" if values else "not run"
                assert next(shown).strip("*†‡§¶") == expected


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dataset", README_DATASETS)
def test_the_full_tables_have_every_row_or_say_that_it_was_not_run(dataset, name):
    """A row is shown exactly if there is a record of it."""
    table = TABLES[name]
    section = section_of(dataset, name)
    if table.datasets and dataset not in table.datasets:
        assert not section
        return
    shown = set(re.findall(r"^\| ([^|]+?) (?:\(recipes? [^)]*\) )?\|", section, re.M))
    listed = re.search(r"^Not run: ([^.]*)\. ", section, re.M)
    absent = set(listed[1].split(", ")) if listed else set()
    labels = {row.label for row in rows_of(table)}
    assert labels <= shown | absent, f"neither shown nor listed: {labels - shown}"
    assert not labels & shown & absent
    records = read_records(ROOT / f"experiments/results/{dataset}.jsonl")
    older = ROOT / f"experiments/results/older/{dataset}.jsonl"
    if name in ("T1", "T4") and older.exists():  # what waits is shown in these alone
        records += read_records(older)
    there = {(r.system, r.variant, r.budget) for r in records}
    for row in rows_of(table):
        budgets = budgets_of(table, row).values()
        if row.label in absent:
            assert not there & {(row.system, row.variant, b) for b in budgets}


def section_of(dataset, name):
    """The text of one table of the page of results; '' if it has none."""
    parts = re.split(r"^### ", text_of("experiments/results/README.md"), flags=re.M)
    found = [part for part in parts if part.startswith(f"{name}, {dataset}: ")]
    return found[0] if found else ""


def test_the_table_of_speed_is_that_of_the_record():
    record = ROOT / "experiments/results/benchmarks/search.json"
    assert block_of("README.md", "speed") == readme.speed(record)


def test_the_ratios_beside_faiss_are_those_of_the_records():
    folder = ROOT / "experiments/results/benchmarks"
    rows = re.findall(
        r"^\| [^|]*BLAS[^|]*\| (.*) \|$", text_of("ehi/index/README.md"), re.M
    )
    parts = (("search", "mixture"), ("search-avx2", "mixture"), ("search", "real"))
    for row, (name, part) in zip(rows, parts, strict=True):
        ratios = json.loads((folder / f"{name}.json").read_text())[part]["ratios"]
        numbers = row.split(" | ")
        for number, ratio in zip(numbers, ratios.values(), strict=True):
            digits = len(number.partition(".")[2])
            assert number == f"{ratio:.{digits}f}"


def block_of(name, block):
    begin, end = f"<!-- {block}:begin -->\n", f"\n<!-- {block}:end -->"
    return text_of(name).split(begin)[1].split(end)[0]


def test_one_version_everywhere():
    cited = re.search(r"^version: (.*)$", text_of("CITATION.cff"), re.M)[1]
    assert cited == ehi.__version__
    assert f"## {cited}" in text_of("CHANGELOG.md")
