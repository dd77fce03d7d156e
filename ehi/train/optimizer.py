"""The optimiser of a phase: which parameters train, at which rate."""

import functools
from collections.abc import Mapping

import jax
import optax

from ehi.model.joint import GROUPS
from ehi.train.givens import givens_descent

DECAYS = ("cosine", "linear", "constant")


def trained_names(params: Mapping, rates: Mapping[str, float], last_n: int = 0):
    """Names of the parameters that a phase trains.

    Args:
      params: name -> array, a name being 'group/.../leaf'.
      rates: group -> learning rate; a group that is absent or 0 is frozen.
      last_n: if not 0, only the last n layers of the tower train.
    """
    for group, rate in rates.items():
        if group not in GROUPS:
            raise ValueError(
                f"unknown group {group!r} in rates; allowed: {', '.join(GROUPS)}"
            )
        if not rate >= 0:
            raise ValueError(f"learning rate of {group!r} is {rate}; must be >= 0")
    layers = [
        int(n.split("/")[2]) for n in params if n.startswith("tower/layers/")
    ]  # tower/layers/<i>/...
    first = max(layers, default=0) + 1 - last_n if last_n else 0

    # A rotation starts from a fixed orthogonal matrix, of which only the skew part
    # learns; a head with a hidden layer from a fixed projection, likewise.
    fixed = {"rotation/start", "quantiser/assign_codebooks"} | {
        f"{head}/projection"
        for head in ("head", "query_head")
        if f"{head}/w_in" in params
    }

    def is_trained(name: str) -> bool:
        parts = name.split("/")
        if parts[0].endswith("tower") and last_n:
            # The projection of a STAR lies behind the layers.
            in_last = parts[1] == "projection" or (
                parts[1] == "layers" and int(parts[2]) >= first
            )
            return bool(rates.get(parts[0])) and in_last
        return bool(rates.get(parts[0])) and name not in fixed

    return frozenset(name for name in params if is_trained(name))


def make_optimizer(
    rates: Mapping[str, float],
    *,
    steps: int,
    warmup: int = 0,
    decay: str = "cosine",
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> optax.GradientTransformation:
    """Adam with a learning rate per group; weight decay and clipping on the towers.

    Args:
      rates: group -> peak learning rate.
      steps: length of the phase.
      warmup: steps of linear warm-up.
      decay: 'cosine' (to 0 at the end), 'linear' or 'constant'.
      weight_decay: decoupled, of a tower's matrices only.
      clip: global gradient norm of a tower; 0 for none.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay is {decay!r}; allowed: {', '.join(map(repr, DECAYS))}")

    def schedule(peak: float):
        rest = max(steps - warmup, 1)
        after = {
            "cosine": optax.cosine_decay_schedule(peak, rest),
            "linear": optax.linear_schedule(peak, 0.0, rest),
            "constant": optax.constant_schedule(peak),
        }[decay]
        ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup, 1))
        return optax.join_schedules([ramp, after], [warmup]) if warmup else after

    def of_group(group: str, rate: float):
        if not group.endswith("tower"):
            return optax.adam(schedule(rate))
        matrices = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
        adamw = optax.adamw(schedule(rate), weight_decay=weight_decay, mask=matrices)
        return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw

    transforms = {g: of_group(g, r) for g, r in rates.items() if r}
    if rates.get("rotation"):
        # An orthogonal matrix is turned, plane by plane, and never added to.
        transforms["givens"] = givens_descent(schedule(rates["rotation"]))

    def label(name: str) -> str:
        return "givens" if name == "rotation/turned" else name.split("/")[0]

    return optax.multi_transform(
        transforms, lambda params: {name: label(name) for name in params}
    )
