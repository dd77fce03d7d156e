"""The main job, end to end, on a corpus and a tower that take seconds."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from topics import tiny

from ehi.encode import embed
from ehi.eval.records import read_records
from ehi.index import open_index
from ehi.index.text.encoder import apply_head
from experiments import main, search
from experiments.configs import own, pydocs, scifact
from experiments.run import experiment, workdir
from experiments.run.evaluate import budget_queries


def test_all_systems_end_to_end_then_reuse(corpus, tmp_path, capsys, monkeypatch):
    config = tiny(corpus)
    main.run(config, tmp_path)
    records = read_records(tmp_path / "results.jsonl")
    assert {record.system for record in records} == set(config.systems)
    for record in records:
        assert 0 <= record.ndcg_at_10 <= 1
        assert record.dataset == "topics"
        if record.budget.startswith("visit"):
            # Half of the documents for the train queries; these are others.
            assert record.budget_queries == "train" and 0 < record.docs_visited < 0.6
            assert record.docs_visited <= record.docs_visited_p95
            assert record.docs_visited_p95 <= record.docs_visited_max
        else:
            assert record.budget_queries is None and record.docs_visited == 1
        assert record.work > record.docs_visited - 1e-9
        assert record.total_bytes_per_doc >= record.total_bytes_per_doc_1m
        # No test query has a document that is an answer in train.
        assert record.unlabelled_queries == 16
        assert record.ndcg_at_10_unlabelled == record.ndcg_at_10
        assert record.compression == (8 if "8x" in record.budget else 1)
        stem = tmp_path / "trec" / record.cell.stem
        assert stem.with_name(stem.name + ".npy").exists()
    shown = capsys.readouterr().out
    assert "ehi-pq" in shown and "leaf" in shown and str(tmp_path / "index") in shown
    assert "set for 10% without these queries, visits " in shown
    files = ("report.md", "visited.png", "bytes.png", "metrics.jsonl", "curves.json")
    for name in (*files, "questions.json"):
        assert (tmp_path / name).stat().st_size

    # Again: nothing is trained or measured, and the same table is shown.
    from experiments.run import train

    before = (tmp_path / "results.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train, "run_phase", None)
        patch.setattr(experiment, "evaluate_budget", None)
        main.run(config, tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert capsys.readouterr().out.count("ehi-pq") == shown.count("ehi-pq")

    # Another split with the trained parameters, without training.
    other = tiny(corpus, split="train", budgets=("visit-50-8x",), systems=("ehi-pq",))
    other.index.metadata, other.index.documents = ("topic", "n"), "full"
    main.run(other, tmp_path / "other", checkpoint=tmp_path)
    (record,) = read_records(tmp_path / "other" / "results.jsonl")
    assert record.split == "train" and record.system == "ehi-pq"
    assert record.budget_queries == "pseudo"  # neither train nor test
    assert record.beam == 8 and 0 <= record.min_prob < 1

    # The same parameters; every query visits the same number of leaves.
    other.tree.adaptive = False
    main.run(other, tmp_path / "fixed", checkpoint=tmp_path)
    (record,) = read_records(tmp_path / "fixed" / "results.jsonl")
    assert 1 <= record.beam < 8 and record.min_prob is None

    # And ask it in words; of another index, a copy of its folder alone.
    def ask(index, *arguments):
        assert search.main([f"--index={index}", "--json", "a a k", *arguments]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["hits"]

    assert len(ask(tmp_path / "index")) == 5
    where = "--where=topic == 'b' and n >= 100", "--beam=8"
    here = ask(tmp_path / "other" / "index", *where)
    assert len(here) == 5
    for hit in here:
        assert hit["metadata"]["topic"] == "b" and hit["metadata"]["n"] >= 100
    alone = shutil.copytree(tmp_path / "other" / "index", tmp_path / "alone" / "x")
    shutil.rmtree(tmp_path / "other")
    assert ask(alone, *where) == here
    copied = open_index(alone, verify=True)
    assert len(copied.document(0)["text"].split()) == 12
    # Other indexes of a run have the same frozen tower, and name it.
    assert open_index(tmp_path / "indexes" / "ehi").folder.tower is None

    # With fewer systems it is the same experiment; `index` is that of the last one.
    main.run(tiny(corpus, systems=("dense", "kmeans-tree")), tmp_path)
    assert open_index(tmp_path / "index").encoder["run"] == "kmeans-tree"
    records = read_records(tmp_path / "results.jsonl")
    assert {record.system for record in records} == set(config.systems)


def test_trained_tower_is_saved_with_the_index(corpus, tmp_path, monkeypatch):
    config = tiny(
        corpus, systems=("ehi-pq",), budgets=("visit-50-8x",),
        **{"tower.trainable": "all", "dense.rates.tower": 1e-4,
           "joint.rates.tower": 1e-4, "dense.encoded": 8, "joint.encoded": 6,
           "joint.refresh": 3, "joint.mined_per_query": 1, "joint.chunk": 3},
    )  # fmt: skip
    main.run(config, tmp_path)
    index = open_index(tmp_path / "index")
    assert index.folder.tower.is_dir() and not list(tmp_path.glob("*tower*"))
    assert "/" not in index.encoder["tower"]  # no path of this machine
    row = 5
    dataset_text = json.loads((corpus / "queries.jsonl").read_text().splitlines()[row])
    encode = search.load_query_encoder(index)
    found = encode([dataset_text["text"]])[0]
    gaps = []  # to the tower at the end of `dense`, and to that of `ehi-pq`
    for path in (tmp_path / "outputs").glob("tower-*.npy"):
        kept = np.load(path)
        if len(kept) != 320:  # those of the queries
            expected = apply_head(index.query_head, kept[row : row + 1])
            gaps.append(np.abs(found - expected).max())
    assert len(gaps) == 2 and min(gaps) < 1e-5 < max(gaps)

    # Scored again, nothing is encoded again.
    (tmp_path / "results.jsonl").unlink()
    monkeypatch.setattr(embed, "encode", None)
    main.run(config, tmp_path)
    assert len(read_records(tmp_path / "results.jsonl")) == 1


def test_a_corpus_without_queries_is_indexed_and_not_scored(corpus, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "corpus.jsonl").write_bytes((corpus / "corpus.jsonl").read_bytes())
    config = tiny(bare, systems=("ehi-pq",), budgets=("visit-50-8x",))
    main.run(config, tmp_path / "run")
    assert "nothing to score" in capsys.readouterr().out
    assert open_index(tmp_path / "run" / "index").num_documents == 320


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ("ehi-qp",)}, "unknown system 'ehi-qp'"),
        ({"systems": ()}, "systems is empty"),
        ({"budgets": ("visit-10-64",)}, "budget 'visit-10-64' is not understood"),
        ({"budgets": ("visit-0",)}, r"must be in \(0, 100\]"),
        ({"systems": ("ehi",), "budgets": ("flat",)}, "no budget of flat applies"),
        ({"tree.kind": "per_leaf"}, "'per_node', 'per_level'"),
        ({"tree.height": 0}, "tree.height is 0"),
        ({"tree.branching": 1000}, "1000 leaves of ehi-pq for 320 documents"),
        ({"leaves.num_codewords": 64}, "allowed: 0, 16, 256"),
        ({"budgets": ("visit-50-7x",)}, "not a whole number"),
        ({"budgets": ("visit-50-2x",)}, "128 codes .* do not divide the width 32"),
        ({"head.width": 64}, "head.width is 64; must be at most the tower.s 32"),
        ({"head.width": 16}, "dense.losses.anchor compares with the tower's 32"),
        ({"tree.spill": 9}, "tree.spill is 9; must be at most the 8 leaves"),
        ({"tree.scale": -1.0}, "tree.scale is -1.0; must be above 0"),
        ({"seed": -1}, "seed is -1"),
        ({"corpus_of_steps": -5}, "corpus_of_steps is -5"),
        ({"pseudo.synthetic": -1}, "pseudo.synthetic is -1"),
        ({"dense.decay": "cosin"}, "dense: decay is 'cosin'; allowed: 'cosine', 'lin"),
        ({"dense.sources.labelled": -1.0}, "sources.labelled is -1.0"),
        ({"joint.mined_beam": 0}, "mined_beam is 0; must be at least 1"),
        ({"joint.losses.distil": 1.0}, "unknown loss 'distil'"),
        ({"joint.rates.head": -1.0}, "is -1"),
        ({"tower.trainable": "all"}, "joint.sources.documents is 0.1: .* or joint.enc"),
        ({"joint.encoded": 8}, "joint.encoded is 8, but the tower is frozen"),
        ({"joint.encoded": 1000}, "encoded is 1000; must be at most batch_size="),
        ({"tower.trainable": "last_n"}, "needs dense.last_n"),
        ({"tower.trainable": "some"}, "'head', 'last_n', 'all'"),
        ({"dataset": ""}, "dataset is empty"),
        ({"tower.name": "/no/such/folder"}, "no model folder"),
        ({"index.documents": "all"}, "index.documents is 'all'; allowed: 'none', 'ti"),
        ({"index.metadata": ("lang",)}, "metadata 'lang'; there are 'n', 'topic'"),
    ],
)
def test_bad_configs_are_refused(corpus, tmp_path, changes, message):
    changes = {"systems": ("ehi-pq",), "budgets": ("visit-50-8x",)} | changes
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main.run(tiny(corpus, **changes), tmp_path)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_workdir_of_another_experiment_is_refused_and_kept(corpus, tmp_path):
    workdir.write_config(tiny(corpus), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="another experiment.* joint, seed"):
        workdir.claim(tiny(corpus, seed=3, **{"joint.steps": 7}), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    # With a subset of the systems it is the same experiment.
    workdir.claim(tiny(corpus, systems=("dense",)), tmp_path)


def test_untrained_checkpoints_are_named(corpus, tmp_path):
    config = tiny(corpus, systems=("dense",), budgets=("flat",))
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        main.run(config, tmp_path / "run", checkpoint=tmp_path / "empty")
    workdir.write_config(config, tmp_path / "begun")
    with pytest.raises(FileNotFoundError, match="holds no trained dense"):
        main.run(config, tmp_path / "run", checkpoint=tmp_path / "begun")


def test_a_smaller_corpus_gets_the_tree_that_was_trained(corpus, tmp_path, capsys):
    options = {"systems": ("kmeans-tree",), "budgets": ("visit-50",)}
    config = tiny(corpus, **options, **{"tree.branching": 0})
    main.run(config, tmp_path / "run")
    assert open_index(tmp_path / "run" / "index").num_leaves == 32  # <= 2 sqrt(320)
    small = tmp_path / "small"
    small.mkdir()
    lines = (corpus / "corpus.jsonl").read_text().splitlines(keepends=True)
    (small / "corpus.jsonl").write_text("".join(lines[:100]))
    other = tiny(small, **options, **{"tree.branching": 0})
    main.run(other, tmp_path / "other", checkpoint=tmp_path / "run")
    index = open_index(tmp_path / "other" / "index")
    assert (index.num_leaves, index.num_documents) == (32, 100)
    main.run(other, tmp_path / "other", checkpoint=tmp_path / "run")  # reused


def test_a_missing_split_is_named(corpus, tmp_path):
    config = tiny(corpus, split="validation", systems=("dense",), budgets=("flat",))
    with pytest.raises(ValueError, match="no split 'validation'; it has test, train"):
        main.run(config, tmp_path)


@pytest.mark.parametrize("module", [own, pydocs, scifact])
def test_unknown_variants_are_named(module):
    with pytest.raises(ValueError, match="unknown variant 'x'"):
        module.get_config("x")


def test_a_typo_on_the_command_line_gets_a_hint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.main",
         "--config=experiments/configs/pydocs.py", f"--workdir={tmp_path}",
         "--config.tree.heigth=2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = "error: no such field of the config: 'heigth' Did you mean \"height\""
    assert done.stderr.strip().splitlines()[-1].startswith(said)


def test_a_budget_is_set_on_queries_that_are_not_evaluated(corpus, tmp_path):
    config = tiny(corpus, systems=("kmeans-tree",), budgets=("visit-50",))
    run = experiment.open_experiment(config, tmp_path)
    ((_, record),) = experiment.run_cells(
        run, "kmeans-tree", experiment.default_budgets(run.config, "kmeans-tree")
    )
    index, trained = run.built["kmeans-tree"].index, run.trained["kmeans-tree"]

    def visited(queries):
        return index.count_visited(queries, record.beam, record.min_prob).mean() / 320

    train = trained.queries[:32]  # in the order of the data set
    assert 0.4 < visited(train) <= 0.5
    realised = visited(trained.queries[run.inputs.eval_rows])
    assert record.docs_visited == pytest.approx(realised) != visited(train)


@pytest.mark.parametrize(
    ("left_out", "split", "expected"),
    [((), "test", "train"), ((), "dev", "train"), (("train",), "test", "dev"),
     (("train",), "dev", "pseudo"), (("train", "dev"), "test", "pseudo")],
)  # fmt: skip
def test_queries_of_budgets_are_train_else_dev_else_no_real_ones(
    left_out, split, expected
):
    qrels = {"train": {"q0": {}}, "dev": {"q1": {}}, "test": {"q2": {}}}
    qrels = {name: found for name, found in qrels.items() if name not in left_out}
    dataset = SimpleNamespace(query_ids=["q0", "q1", "q2"], qrels=qrels)
    pairs = {"pseudo": (np.arange(3, 10_003), None)}
    inputs = SimpleNamespace(dataset=dataset, training=SimpleNamespace(pairs=pairs))
    name, rows = budget_queries(inputs, split)
    assert name == expected
    known = {"train": [0], "dev": [1]}
    assert rows.tolist() == known.get(name, list(range(3, 10_003, 5)))
