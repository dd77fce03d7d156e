"""Workdirs of other files, and small or damaged inputs: they work, or are refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from topics import FIXTURES, tiny

from ehi.data.datasets import open_dataset
from ehi.eval.records import read_records
from experiments import main, reproduce
from experiments.paper.older import waits
from experiments.run import workdir

CHEAP = {"systems": ("dense",), "budgets": ("flat",)}


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A workdir with a trained `dense`."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EHI_CACHE", str(folder.parent / "mistakes-cache"))
        main.run(tiny(corpus, **CHEAP), folder)
    return folder


def some_documents(corpus, folder, num):
    """Return the first documents of the corpus, and the queries that ask for them."""
    shutil.copytree(corpus, folder)
    lines = (corpus / "corpus.jsonl").read_text().splitlines(keepends=True)[:num]
    (folder / "corpus.jsonl").write_text("".join(lines))
    for path in (folder / "qrels").iterdir():
        head, *rows = path.read_text().splitlines(keepends=True)
        kept = [row for row in rows if int(row.split("\t")[1][1:]) < num]
        path.write_text(head + "".join(kept))
    return folder


def test_a_workdir_of_an_edited_corpus_is_refused(corpus, finished, tmp_path):
    edited = shutil.copytree(corpus, tmp_path / "edited")
    config = tiny(edited, **CHEAP)
    work = shutil.copytree(finished, tmp_path / "work")
    inputs = json.loads((work / "inputs.json").read_text())
    main.run(tiny(corpus, **CHEAP), work)  # the same: reused
    config.dataset = str(corpus)
    with (edited / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "new", "title": "", "text": "a b"}\n')
    (work / "config.json").unlink()  # as if the folder itself had been edited
    with pytest.raises(ValueError, match="made of another data: .* choose another"):
        main.run(tiny(edited, **CHEAP), work)
    assert json.loads((work / "inputs.json").read_text()) == inputs


def test_a_checkpoint_is_taken_with_its_own_tower_and_tree(
    corpus, finished, tmp_path, caplog
):
    def run(config, name="run"):
        main.run(config, tmp_path / name, checkpoint=finished)

    other = {"tower.name": str(FIXTURES / "bert_tiny")}
    with pytest.raises(ValueError, match=r"bert_tiny is not the one .* --config.tower"):
        run(tiny(corpus, **CHEAP, **other))
    with pytest.raises(ValueError, match="tree.scale is 5.0, .* trained with 20.0"):
        run(tiny(corpus, **CHEAP, **{"tree.scale": 5.0}))
    run(tiny(corpus, **CHEAP), "good")
    assert "the settings of" not in caplog.text
    run(tiny(corpus, **CHEAP, **{"tower.query_prefix": "q: "}), "prefixed")
    assert "{'query_prefix': 'q: '}, but" in caplog.text
    again = shutil.copytree(finished, tmp_path / "again")
    with (again / "metrics.jsonl").open("a") as file:
        file.write("\n")  # another run of the same config
    with pytest.raises(ValueError, match="made of another checkpoint"):
        main.run(tiny(corpus, **CHEAP), tmp_path / "good", checkpoint=again)


@pytest.mark.parametrize("text", ["{}", '{"a": '])
def test_a_damaged_config_is_named(corpus, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        workdir.claim(tiny(corpus), tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        workdir.with_tree_of(tiny(corpus), tmp_path)


def test_a_few_documents_get_codes_of_few_codewords(corpus, tmp_path, capsys):
    """Even if the best leaf of every query may be empty."""
    few = some_documents(corpus, tmp_path / "few", 40)
    config = tiny(
        few,
        systems=("dense", "ehi", "ehi-pq"),
        budgets=("flat", "visit-50", "visit-50-8x"),
        **{"leaves.num_codewords": 0, "tree.branching": 0},
    )
    main.run(config, tmp_path / "run")
    assert "ehi-pq" in capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["leaves"]["num_codewords"] == 16
    main.run(config, tmp_path / "run")  # chosen again, it is the same experiment
    one = some_documents(corpus, tmp_path / "one", 1)
    shutil.rmtree(one / "qrels")
    with pytest.raises(ValueError, match="2 leaves of ehi for 1 documents"):
        main.run(tiny(one, systems=("ehi",), **{"tree.branching": 0}), tmp_path / "1")
    options = {"systems": ("joint-pq",), "budgets": ("flat-8x",)}
    with pytest.raises(
        ValueError, match="joint-pq fits 16 codewords .* to 1 documents"
    ):
        main.run(tiny(one, **options), tmp_path / "2")
    assert not (tmp_path / "1" / "checkpoints").exists()


def test_no_leaf_may_hold_a_document_that_queries_find_first(
    finished, corpus, tmp_path
):
    from types import SimpleNamespace

    import numpy as np

    from ehi.index import build_index
    from experiments.run.evaluate import visited_curve

    nodes = np.eye(4, dtype=np.float32)[None]
    tree = {"kind": "per_node", "nodes": [nodes], "scale": 1.0}
    index = build_index(
        np.eye(4, dtype=np.float32)[[0, 1, 0, 1]], list("abcd"), tree=tree
    )
    queries = np.eye(4, dtype=np.float32)[[2, 3]]
    inputs = SimpleNamespace(
        eval_rows=np.arange(2), eval_ids=["q", "r"], identical_ids=frozenset(),
        dataset=SimpleNamespace(
            query_ids=["q", "r"], qrels={"test": {"q": {"a": 1}, "r": {"b": 1}}}
        ),
        training=SimpleNamespace(pairs={"pseudo": (np.arange(2), np.arange(2))}),
    )  # fmt: skip
    points = visited_curve(
        tiny(corpus), SimpleNamespace(index=index), SimpleNamespace(queries=queries),
        inputs, "test",
    )  # fmt: skip
    assert len(points)


def test_results_of_another_corpus_and_unlabelled_ones_are_refused(corpus, tmp_path):
    cell = [("dense", "", "flat")]
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(corpus / "corpus.jsonl", bare)
    folders = tmp_path / "runs", tmp_path / "results"
    with pytest.raises(ValueError, match="has no judgements to score"):
        reproduce.reproduce(str(bare), cell, range(1), *folders)
    results = Path(reproduce.__file__).parent / "results"
    shutil.copytree(results, tmp_path / "results")
    named = shutil.copytree(corpus, tmp_path / "scifact")
    with pytest.raises(ValueError, match="another corpus called 'scifact'"):
        reproduce.reproduce(str(named), cell, range(1), *folders)


def stale(folder, name):
    """The records of a data set that `reproduce` would make again, and all of them."""
    records = read_records(folder / f"{name}.jsonl")
    recipe_of = {r.system: reproduce.get_system(r.system).recipe for r in records}
    return [r.cell for r in records if r.recipe < recipe_of[r.system]], records


def test_committed_cells_are_not_run_again():
    """The command under a table runs only the cells that it lacks.

    A data set is renewed as a whole: until then, all of its records are older.
    """
    folder = Path(reproduce.__file__).parent / "results"
    for path in folder.glob("*.jsonl"):
        old, records = stale(folder, path.stem)
        assert len(old) in (0, len(records)), old[:3]
    for path in (folder / "older").glob("*.jsonl"):
        old, records = stale(path.parent, path.stem)
        assert len(old) == len(records) and all(map(waits, old))


def test_damaged_copies_are_named(corpus, tmp_path):
    open_dataset(corpus, data_dir=tmp_path)
    (tables,) = tmp_path.rglob("tables.npz")
    tables.write_bytes(tables.read_bytes()[:-99])
    with pytest.raises(ValueError, match="prepared copy .* is damaged: delete it"):
        open_dataset(corpus, data_dir=tmp_path)


def test_a_damaged_tower_is_named(corpus, tmp_path):
    tower = shutil.copytree(FIXTURES / "minilm_tiny", tmp_path / "tower")
    weights = tower / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-99])
    options = CHEAP | {"tower.name": str(tower)}
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        main.run(tiny(corpus, **options), tmp_path / "run")
    (tower / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        main.run(tiny(corpus, **options), tmp_path / "run")


def test_what_is_said_keeps_its_brackets(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.main",
         "--config=experiments/configs/own.py", f"--workdir={tmp_path / 'w'}",
         "--config.dataset=no[/x]such"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown data set 'no[/x]such'")
