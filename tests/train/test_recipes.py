"""Recipes: complete, plain, and strict about names."""

import json
from dataclasses import fields

import pytest

from ehi.train.phase import SOURCES, TERMS, Phase
from ehi.train.recipes import PAIRS, RECIPES, phase


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_every_field_of_a_phase_and_makes_one(name):
    recipe = RECIPES[name]()
    assert recipe.keys() == {field.name for field in fields(Phase)}
    assert tuple(recipe["losses"]) == TERMS
    assert tuple(recipe["sources"]) == SOURCES
    assert json.loads(json.dumps(recipe)) == recipe  # plain values only
    assert Phase.from_mapping(recipe).steps == recipe["steps"]
    assert RECIPES[name]() is not recipe  # a caller may change its own


def test_a_library_call_changes_a_field_of_a_recipe():
    changed = Phase.from_mapping(RECIPES["joint"]() | {"steps": 7})
    assert (changed.steps, changed.batch_size) == (7, 320)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temprature": 0.1}, "unknown field 'temprature' .*allowed: .* temperature,"),
        ({"lambda_cutt": 10}, "unknown field 'lambda_cutt' .*allowed: .* lambda_cut,"),
        ({"losses": {"symantic": 1.0}}, "unknown loss 'symantic'; allowed: semantic,"),
        ({"rates": {"heads": 1.0}}, "unknown group 'heads' in rates; allowed: .*head,"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_allowed_ones(change, message):
    given = {"steps": 1, "batch_size": 8, "losses": {}, "rates": {}, **PAIRS}
    with pytest.raises(ValueError, match=message):
        phase(**given | change)


def test_defaults_are_stated_once():
    given = {"steps": 1, "batch_size": 8, "losses": {}, "rates": {}, "sources": {}}
    plain, recipe = Phase(**given), phase(**given)
    for field in fields(Phase)[len(given) + 1 :]:
        assert recipe[field.name] == getattr(plain, field.name), field.name
