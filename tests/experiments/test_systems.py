"""Every system and every variant is a valid config, and every system trains."""

import numpy as np
import pytest
from topics import PHASES, tiny

from ehi.eval.records import read_records
from ehi.index import open_index
from ehi.train.phase import Phase
from experiments import main
from experiments.ablations import VARIANTS, apply_variant, get_variant
from experiments.configs import own
from experiments.run.checks import check_config
from experiments.systems import SYSTEMS, Budget, config_of, get_system, phase_of

TRAINED = [name for name, system in SYSTEMS.items() if system.phases]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of all systems: `dense` trains once."""
    return tmp_path_factory.mktemp("systems")


@pytest.mark.parametrize("name", TRAINED)
def test_a_system_trains_builds_saves_opens_and_searches(corpus, workdir, name):
    config = tiny(corpus, systems=(name,))
    # Of 4 leaves that hold every document twice, one may already exceed half.
    config.budgets += ("visit-90",)
    for phase in PHASES:
        config[phase].steps = 20
    main.run(config, workdir)
    records = read_records(workdir / "results.jsonl")
    assert name in {record.system for record in records}
    index = open_index(workdir / "index")
    queries = np.eye(index.width, dtype=np.float32)[:4]
    hits = index.search(queries, 5, beam=index.num_leaves)
    assert (hits.visited == index.spill * index.num_documents).all()
    assert len({*hits.ids[0]}) == 5
    for phase in get_system(name).phases:
        folders = (workdir / "checkpoints").glob(f"{name}*/{phase}")
        assert any(folders), f"{name} has not trained {phase}"


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_loads_and_validates(corpus, name):
    config = tiny(corpus)
    resolved = config_of(config, name)
    assert resolved.tree.branching**resolved.tree.height <= 8
    for phase in get_system(name).phases:
        Phase.from_mapping(resolved[phase].to_dict())
    system = get_system(name)
    if system.counterpart:
        assert not get_system(system.counterpart).phases
    for parent in (system.parent,):
        assert parent is None or parent in SYSTEMS


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_applies_to_the_base_and_validates(corpus, name):
    enough = {"dense.batch_size": 32, "joint.batch_size": 32}  # for what is encoded
    config = apply_variant(tiny(corpus, **enough), name)
    config.systems = get_variant(name).systems or config.systems
    check_config(config)
    assert config.variant == name
    changed = dict(get_variant(name).overrides)
    before = tiny(corpus, **enough)
    for field, value in changed.items():
        section = config
        for part in field.split("."):
            section = section[part]
        assert section == value
    if name:
        before.variant, before.systems = name, config.systems
        assert config.to_json() != before.to_json()


def test_a_larger_corpus_gets_more_steps_up_to_five_times():
    config = own.get_config()
    for documents, steps in ((100, 400), (6144, 400), (12288, 800), (10**6, 2000)):
        for phase in ("dense", "joint"):
            assert phase_of(config, phase, documents).steps == steps
    config.corpus_of_steps = 0
    assert phase_of(config, "joint", 10**6).steps == 400


def test_unknown_variants_are_named():
    with pytest.raises(ValueError, match="unknown variant 'no-path-'.*no-path"):
        get_variant("no-path-")


@pytest.mark.parametrize("variant", ["paper", "per-level", "spill-2", "givens"])
def test_a_variant_trains(corpus, tmp_path, variant):
    (system,) = get_variant(variant).systems
    config = apply_variant(tiny(corpus, systems=(system,)), variant)
    if config.joint.refresh:
        config.joint.refresh = 3
    main.run(config, tmp_path)
    records = read_records(tmp_path / "results.jsonl")
    assert {record.variant for record in records} == {variant}
    if variant == "spill-2":
        (record,) = records
        assert record.compression == Budget.parse(record.budget).compression
