"""A config of vectors, from files to records, without tower, tokens or text."""

import importlib.util

import numpy as np
import pytest
from topics import shrink

import ehi
from ehi.eval.records import read_records
from ehi.index import open_index
from experiments import main
from experiments.configs import vectors
from experiments.run import prepare
from experiments.run.vectors import load_vector_inputs

ROWS, WIDTH = 320, 32
OURS = ("dense", "kmeans-tree", "opq", "kmeans-tree-opq", "ehi", "joint-pq", "ehi-pq")
METHODS = ("jpq", "distill-vq")


def clustered(rows, seed):
    centres = np.random.default_rng(0).normal(size=(8, WIDTH))
    rng = np.random.default_rng(seed)
    x = centres[rng.integers(8, size=rows)] + 0.5 * rng.normal(size=(rows, WIDTH))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "given"
    path.mkdir()
    np.save(path / "documents.npy", clustered(ROWS, 1))
    np.save(path / "queries.npy", clustered(120, 2))
    return path


def tiny(folder, **changes):
    c = shrink(vectors.get_config())
    c.dense.steps = 0
    c.dataset = str(folder)
    c.budgets = ("flat", "flat-8x", "visit-50", "visit-50-8x")
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(autouse=True)
def no_text(monkeypatch):
    """Tower, tokeniser and text are never asked for."""
    for name in ("resolve", "tokenise", "load_tower", "pseudo_queries", "open_dataset"):
        monkeypatch.setattr(prepare, name, None)


def test_every_system_of_ours_runs(folder, tmp_path, capsys):
    main.run(tiny(folder, systems=OURS + METHODS), tmp_path / "run")
    records = read_records(tmp_path / "run" / "results.jsonl")
    assert {record.system for record in records} == {*OURS, *METHODS}
    for record in records:
        assert record.dataset == "given" and record.split == "test"
        assert 0 <= record.exact_recall_at_10 <= 1
        assert record.exact_recall_at_100 is not None
        # Ten nearest documents are relevant: the two recalls are one.
        assert record.exact_recall_at_10 == pytest.approx(record.recall_at_10)
        raw = 0.5 if record.system == "jtr" else 1  # a document is in two leaves
        assert record.compression == (8 if "8x" in record.budget else raw)
        if record.budget.startswith("visit"):
            assert record.budget_queries == "train"
    exact = {r.exact_recall_at_10 for r in records if r.budget == "flat"}
    assert exact == {1.0}  # `dense` is the given vectors
    shown = capsys.readouterr().out
    assert "R@10" in shown and "experiments.search" not in shown
    # The index takes vectors as they were given: it knows metric and head.
    index = ehi.load(tmp_path / "run" / "index")
    assert index.maps.name == "cosine" and index.encoder["run"] == "distill-vq-8x"
    hits = index.search(clustered(120, 2), 10)
    assert hits.ids.shape == (120, 10) and 0 < hits.visited.mean() < ROWS


def test_held_out_queries_never_train(folder, tmp_path):
    config = tiny(folder)
    inputs = load_vector_inputs(config)
    labelled = set(inputs.training.pairs["labelled"][0].tolist())
    assert labelled and not labelled & set(inputs.eval_rows.tolist())
    (folder / "queries.npy").unlink()
    inputs = load_vector_inputs(config)
    held = inputs.dataset.own_rows
    assert len(held) == 64 and len(inputs.eval_rows) == 32
    asked = inputs.training.pairs["documents"][1]
    assert len(asked) == ROWS - 64 and not np.isin(asked, held).any()
    assert not np.isin(inputs.pseudo, held).any()
    assert not np.isin(inputs.training.pairs["synthetic"][1], held).any()


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_other_metrics_are_exact_and_compressed_by_the_given_width(
    folder, tmp_path, metric
):
    lengths = np.random.default_rng(3).uniform(0.5, 2, (ROWS, 1)).astype(np.float32)
    np.save(folder / "documents.npy", clustered(ROWS, 1) * lengths)
    budgets = ("flat", "visit-50-64x")
    changes = {"systems": ("dense", "ehi-pq"), "budgets": budgets}
    changes["vectors.metric"] = metric
    main.run(tiny(folder, **changes), tmp_path / "run")
    records = {r.system: r for r in read_records(tmp_path / "run" / "results.jsonl")}
    assert records["dense"].exact_recall_at_100 == pytest.approx(1, abs=1e-3)
    assert records["ehi-pq"].compression == 64
    index = open_index(tmp_path / "run" / "index")
    assert index.width == WIDTH + 4 and index.codebooks.shape[0] == 4


def test_without_a_head_the_embeddings_are_the_given_vectors(folder, tmp_path):
    systems, budgets = ("ehi", "jpq"), ("visit-50", "flat-8x")
    changes = {"head.kind": "none", "systems": systems, "budgets": budgets}
    main.run(tiny(folder, **changes), tmp_path / "run")
    index = open_index(tmp_path / "run" / "indexes" / "ehi")
    stored = np.empty((ROWS, WIDTH), np.float32)
    segment = index.segments[0]
    stored[segment.leaf_rows] = segment.vectors
    assert np.allclose(stored, clustered(ROWS, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree.branching": 1000}, "1000 leaves of ehi-pq for 320 documents"),
        ({"budgets": ("visit-50-7x",)}, "not a whole number"),
        ({"head.kind": "linear"}, "'residual', 'none'"),
        ({"vectors.metric": "dot"}, "is 'dot'; allowed: '', 'cosine', 'ip', 'l2'"),
        ({"tower.trainable": "all"}, "a config of vectors has no tower"),
        ({"dataset": "/no/such/folder"}, "there are no vectors in /no/such/folder"),
        ({"split": "validation"}, "no split 'validation'; it has dev, test, train"),
    ],
)
def test_bad_configs_are_refused(folder, tmp_path, changes, message):
    changes = {"systems": ("ehi-pq",), "budgets": ("visit-50-8x",)} | changes
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main.run(tiny(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "results.jsonl").exists()


@pytest.mark.skipif(not importlib.util.find_spec("faiss"), reason="needs faiss")
def test_rows_of_libraries_run(folder, tmp_path):
    systems = ("faiss-flat", "faiss-ivf", "faiss-ivfrabitq")
    budgets = ("flat", "visit-50", "visit-50-8x")
    main.run(tiny(folder, systems=systems, budgets=budgets), tmp_path / "run")
    records = read_records(tmp_path / "run" / "results.jsonl")
    assert {record.system for record in records} == set(systems)
