"""The dry run against real batches, tables and steps."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from shrunken import TOWER, shrunk

from ehi.model.params import split_model
from ehi.model.tower import Tower
from ehi.train.batch import TrainingSet, make_batch
from ehi.train.phase import Phase
from experiments.configs import pydocs
from experiments.run import dry_run as dry_run_module
from experiments.run.dry_run import (
    GIB,
    Report,
    Sizes,
    abstract_batch,
    abstract_model,
    abstract_tables,
    check_memory,
    data_sizes,
    dry_run,
    show_dry_run,
    tower_shape,
)
from experiments.run.flops import count_flops
from experiments.systems import config_of, get_system

FIXTURES = Path(__file__).parent.parent / "fixtures"


def test_reports_of_a_frozen_tower_and_what_is_shown(capsys):
    c = shrunk(pydocs.get_config())
    c.head.hidden = c.tree.hidden = 8
    c.systems = ("kmeans-tree", "ehi-pq")
    c.budgets = ("visit-10", "visit-10-8x")
    reports = dry_run(c, flops_per_second=1e9)
    # The parent is first and only once; the system without training is missing.
    assert [(r.run, r.phase) for r in reports] == [
        ("dense", "dense"),
        ("ehi-pq-8x", "joint"),
    ]
    joint = reports[1]
    # 300 train queries; for each document two pseudo-queries, itself, two synthetic.
    assert joint.shapes["teacher_queries"] == "float32[2800, 16]"
    assert joint.shapes["features_documents"] == "float32[500, 16]"
    assert joint.seconds == joint.steps * joint.flops / 1e9 > 0
    assert joint.peak >= joint.arguments > 4 * 2800 * 16
    assert 0 < joint.trained < joint.parameters
    # Adam keeps two moments of every trained number, and little else here.
    assert 8 * joint.trained <= joint.parts["optimiser"] < 8.1 * joint.trained + 1000
    assert joint.parts["parameters"] == 4 * joint.parameters
    assert sum(joint.parts.values()) == joint.arguments
    show_dry_run(reports, Console(width=40))
    shown = capsys.readouterr().out
    assert "ehi-pq-8x, joint: 400 steps" in shown and "peak 0.0" in shown
    assert "where bool[8, 16]" in shown


def report(**changes):
    fields = {
        "run": "jpq-64x", "phase": "jpq", "steps": 1, "shapes": {}, "parameters": 1,
        "trained": 1, "parts": {"parameters": GIB, "code table": 3 * GIB},
        "arguments": 4 * GIB, "outputs": 0, "temporaries": 2 * GIB, "flops": 1.0,
        "flops_per_second": 1.0, "compile_seconds": 0.0,
    }  # fmt: skip
    return Report(**fields | changes)


def test_what_does_not_fit_is_refused_after_it_is_shown(capsys, monkeypatch):
    reports = [report(), report(phase="small", temporaries=0)]
    show_dry_run(reports, memory_gib=6.0)
    words = (
        r"jpq-64x, jpq needs 6 GiB on every device, most of it code table \(3 GiB\), "
        "but there are 5.9 GiB"
    )
    with pytest.raises(ValueError, match=words):
        show_dry_run(reports, memory_gib=5.9)
    assert "code table 3.000, outputs 0.000, activations 2.000" in (
        capsys.readouterr().out
    )
    check_memory(reports)  # a CPU has no limit of its own
    monkeypatch.setattr(dry_run_module, "_device_gib", lambda: 4.0)
    with pytest.raises(ValueError, match="there are 4 GiB"):
        check_memory(reports)


class Tokens:
    """The part of a `TokenArray` that `make_batch` uses."""

    def __len__(self):
        return 100

    def pad(self, rows, length):
        return np.zeros((len(rows), length), np.int32), np.ones(
            (len(rows), length), bool
        )


@pytest.mark.parametrize(("trains", "encoded"), [(False, 0), (True, 0), (True, 4)])
def test_abstract_arrays_are_those_of_a_real_step(trains, encoded):
    documents, queries = 60, 40
    asked = np.arange(queries), np.arange(queries)
    rows = queries + documents  # every document is a query for itself, too
    data = TrainingSet(rows, documents, {"labelled": asked}, Tokens(), Tokens())
    c = shrunk(pydocs.get_config())
    c.pseudo.per_document = c.pseudo.synthetic = 0
    c.tower.trainable = "all" if trains else "head"
    c.joint.losses.lambda_rank, c.joint.encoded = 1.0, encoded
    for name in c.joint.sources:
        c.joint.sources[name] = float(name == "labelled")
    sizes = Sizes(documents, queries)
    own = config_of(c, "joint-pq")
    model = abstract_model(own, get_system("joint-pq"), 8, sizes, TOWER)
    _, params = split_model(model)
    phase = Phase.from_mapping(c.joint.to_dict())
    lengths = (8 * trains, 12 * trains)
    batch = make_batch(data, phase, seed=0, step=0, lengths=lengths)
    found = abstract_batch(c, phase, params, sizes)
    assert found.keys() == batch.keys()
    for name, value in batch.items():
        assert found[name].dtype == value.dtype, name
        if name != "positives":  # as wide as the data has it
            assert found[name].shape == value.shape, name
    tables = {
        "teacher_queries": ((rows, 16), np.float32),
        "teacher_documents": ((documents, 16), np.float32),
        "codes": ((documents, 16), np.uint8),  # 8 bytes of 4-bit codes
    }
    if not trains:
        tables["features_queries"] = tables["teacher_queries"]
        tables["features_documents"] = tables["teacher_documents"]
    if encoded:
        tables["cached_queries"] = tables["teacher_queries"]
        tables["cached_documents"] = tables["teacher_documents"]
    found = abstract_tables(c, phase, params, sizes)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == tables


def test_flops_are_those_of_xla_and_loops_count_fully():
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def once(x, w):
        unused = w @ w  # never runs
        return (x @ w).sum(), unused.shape

    def looped(x, w):
        return jax.lax.map(lambda row: row @ w, x).sum()

    def flops(function):
        return count_flops(jax.make_jaxpr(lambda x, w: function(x, w))(x, w).jaxpr)

    exact = 2.0 * 32 * 64 * 64
    assert flops(lambda x, w: once(x, w)[0]) == flops(looped) == exact
    gradient = jax.grad(lambda w, x: jnp.square(x @ w).sum())
    assert flops(lambda x, w: gradient(w, x)) == 2 * exact
    choice = flops(
        lambda x, w: jax.lax.cond(x[0, 0] > 0, looped, lambda x, w: 0.0, x, w)
    )
    assert choice == exact


def test_sizes_and_tower_come_from_data_where_the_config_has_none(beir_folder):
    c = pydocs.get_config()
    assert tower_shape(c)["width"] == 384
    c.tower.name = str(FIXTURES / "minilm_tiny")
    encoder = nnx.eval_shape(lambda: Tower(**tower_shape(c), rngs=nnx.Rngs(0)))
    assert encoder.width == tower_shape(c)["width"] < 384
    c.dataset = str(beir_folder)
    assert data_sizes(c) == Sizes(documents=6, train_queries=4)


def test_a_config_that_cannot_run_is_refused():
    c = shrunk(pydocs.get_config())
    c.tree.kind = "oak"
    with pytest.raises(ValueError, match="tree.kind is 'oak'"):
        dry_run(c, flops_per_second=1e9)
