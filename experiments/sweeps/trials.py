"""The named trials: one change of a system, in every phase that trains it."""

from collections.abc import Callable, Mapping

from experiments.systems import get_system

HEADS = ("tower", "query_tower", "head", "query_head")


def overrides(config, system: str, trial: str) -> dict[str, object]:
    """Dotted config fields that a trial changes -> their values.

    >>> from experiments.configs import base
    >>> overrides(base.get_config(), "jtr", "steps-double")["jtr.steps"]
    800
    """
    if isinstance(TRIALS[trial], Mapping):
        return dict(TRIALS[trial])
    changed = {}
    for phase in get_system(system).phases:
        for field, value in TRIALS[trial](config[phase]).items():
            changed[f"{phase}.{field}"] = value
    return changed


def _rates(times: float, chosen: Callable[[str], bool]) -> Callable:
    def change(phase) -> Mapping[str, object]:
        return {
            f"rates.{group}": times * rate
            for group, rate in phase.rates.items()
            if rate and chosen(group)
        }

    return change


def _times(times: int, *fields: str) -> Callable:
    return lambda phase: {field: times * phase[field] for field in fields}


# Name -> changed fields, or a function: section of a phase -> its changed fields.
TRIALS: dict[str, Callable | Mapping] = {
    "as-it-is": lambda phase: {},
    "heads-third": _rates(1 / 3, lambda group: group in HEADS),
    "heads-triple": _rates(3.0, lambda group: group in HEADS),
    "index-third": _rates(1 / 3, lambda group: group not in HEADS),
    "index-triple": _rates(3.0, lambda group: group not in HEADS),
    "steps-double": _times(2, "steps"),
    "steps-five": _times(5, "steps"),
    "pool-double": _times(2, "pool", "top_k"),
    "score-ip": {"leaves.score": "ip"},
    "score-l2": {"leaves.score": "l2"},
    "score-cosine": {"leaves.score": "cosine"},
}
