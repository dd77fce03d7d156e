"""Which parameters a phase trains, and which rates and schedules are refused."""

import pytest
from tiny import phase_of

from ehi.train.optimizer import trained_names


def test_last_n_trains_the_last_layers_of_the_tower_only(tiny_model):
    _, params = tiny_model(tower=True)
    names = trained_names(params, {"tower": 1e-5, "head": 1e-4}, last_n=1)
    tower = {name for name in names if name.startswith("tower/")}
    assert tower and all(name.startswith("tower/layers/1/") for name in tower)


def test_last_n_trains_the_projection_behind_the_layers_too():
    params = ("tower/projection/linear/kernel", "tower/words/embedding")
    assert trained_names(params, {"tower": 1e-5}, last_n=1) == {params[0]}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"heads": 1.0}, "unknown group 'heads'"),
        ({"head": -1.0}, "rates.head is -1.0; must be at least 0"),
    ],
)
def test_bad_rates_are_refused(rates, message):
    with pytest.raises(ValueError, match=message):
        phase_of(rates=rates)


def test_bad_decay_is_refused():
    with pytest.raises(ValueError, match="'cosine', 'linear', 'constant'"):
        phase_of(rates={"head": 1.0}, decay="step")
