"""Every config file with each of its arguments, and every system, dry-runs."""

import dataclasses
from pathlib import Path

import pytest
from shrunken import shrunk

from ehi.model.params import split_model
from ehi.train.optimizer import trained_names
from experiments import configs
from experiments.ablations import VARIANTS
from experiments.configs import base, own, pydocs, scifact, vectors
from experiments.configs.papers import ehi, jpq, poeem
from experiments.run import dry_run as dry_run_module
from experiments.run.checks import check_config
from experiments.run.dry_run import abstract_model, data_sizes, dry_run, tower_shape
from experiments.systems import SYSTEMS, config_of, fit_to_corpus

ABLATIONS = tuple(name for name in VARIANTS if name)
# Config file -> its arguments besides the names of ablations.
FILES = {
    own: ("",),
    vectors: ("",),
    pydocs: ("", "smoke"),
    scifact: ("", "finetune"),
    ehi: [name + c for name in ehi.DATA_SETS for c in ("", "-encoder")],
    jpq: jpq.ARGUMENTS,
    poeem: tuple(poeem.DATA_SETS),
}
PAPERS = (ehi, jpq, poeem)
ALL = [(file, name) for file, names in FILES.items() for name in names]
PARTS = {"base"}  # of the files above, not an experiment itself
COMPILED = {}  # outline of a step -> its report


def outline(fields):
    """Reduce a phase to what decides its program: numbers become whether they are 0."""
    if isinstance(fields, dict):
        return {name: outline(value) for name, value in fields.items()}
    return fields if isinstance(fields, str) else bool(fields)


@pytest.fixture(autouse=True)
def quick_compilation(monkeypatch):
    """Compile each outline once; the result never runs."""
    compile_phase = dry_run_module.compile_phase

    def once(config, phase, model, sizes, *, run, name, speed):
        graphdef, params = split_model(model)
        shapes = tuple((n, value.shape) for n, value in params.items())
        key = graphdef, shapes, repr(outline(dataclasses.asdict(phase)))
        if key not in COMPILED:
            COMPILED[key] = compile_phase(
                config, phase, model, sizes, run=run, name=name, speed=speed
            )
        return dataclasses.replace(COMPILED[key], run=run, phase=name)

    monkeypatch.setattr(dry_run_module, "compile_phase", once)


def label(value):
    return getattr(value, "__name__", str(value)).rpartition(".")[2] or "default"


def load(file, name):
    c = file.get_config(name)
    if file in (own, vectors):
        c.dataset = "folder"
    return c


def test_no_config_file_is_forgotten():
    names = {path.stem for path in Path(configs.__path__[0]).rglob("*.py")}
    found = {label(file) for file in FILES}
    assert names - {"__init__"} == found | PARTS


@pytest.mark.parametrize(("file", "name"), ALL, ids=label)
def test_every_argument_is_valid(file, name):
    c = load(file, name)
    check_config(c)
    if file not in PAPERS:
        return
    assert c.sizes.documents and c.sizes.train_queries
    flat = c.to_dict()
    for field in c.from_memory:
        value = flat
        for part in field.split("."):
            value = value[part]


@pytest.mark.parametrize("file", [own, pydocs, scifact], ids=label)
def test_every_ablation_is_valid(file):
    for name in ABLATIONS:
        c = load(file, name)
        check_config(c)
        assert c.variant == name


@pytest.mark.parametrize(("file", "name"), ALL, ids=label)
def test_every_argument_dry_runs(file, name):
    c = shrunk(load(file, name))
    wanted = [
        (system, phase)
        for system in c.systems
        for phase in SYSTEMS[system].phases
        if c[phase].steps
    ]
    reports = dry_run(c, flops_per_second=1e9)
    found = [(r.run.removesuffix("-8x"), r.phase) for r in reports]
    assert sorted(found) == sorted(wanted) and found
    assert all(r.peak > 0 < r.trained for r in reports)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_dry_runs(name):
    c = shrunk(base.get_config())
    c.systems, c.budgets = (name,), ("flat", "flat-8x", "visit-10", "visit-10-8x")
    reports = dry_run(c, flops_per_second=1e9)
    own = [r.phase for r in reports if r.run.removesuffix("-8x") == name]
    assert own == list(SYSTEMS[name].phases)
    parents = {r.run for r in reports} - {name, f"{name}-8x"}
    assert parents <= {SYSTEMS[name].parent}


def test_published_jpq_trains_the_query_tower_and_leaves_the_documents():
    c = shrunk(jpq.get_config("passage-48"))
    sizes, shape = data_sizes(c), tower_shape(c)
    resolved = config_of(fit_to_corpus(c, sizes.documents), "jpq")
    model = abstract_model(resolved, SYSTEMS["jpq"], 8, sizes, shape)
    names = trained_names(split_model(model)[1], resolved.jpq.rates)
    assert {name.split("/")[0] for name in names} == {"query_tower", "quantiser"}
    assert "quantiser/assign_codebooks" not in names


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_dry_runs(name):
    c = shrunk(pydocs.get_config(name))
    found = {r.run.removesuffix("-8x") for r in dry_run(c, flops_per_second=1e9)}
    assert found >= {name for name in c.systems if SYSTEMS[name].phases}


@pytest.mark.parametrize(
    ("file", "allowed"),
    [(ehi, "scifact"), (jpq, "passage-16-star"), (poeem, "amazon")],
    ids=label,
)
def test_unknown_arguments_name_the_known_ones(file, allowed):
    with pytest.raises(ValueError, match=f"unknown argument 'x' .*{allowed}"):
        file.get_config("x")


@pytest.mark.parametrize("variant", ["", "finetune"])
def test_fields_that_are_none_keep_their_types_for_flags(variant):
    config = own.get_config(variant)
    assert config.get_type("ignore_identical_ids") is bool
    assert config.tower.get_type("query_prefix") is str
    assert config.tower.get_type("normalise") is bool
