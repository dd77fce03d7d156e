"""The optimiser of a phase: which parameters train, at which rate."""

import functools
from collections.abc import Mapping

import jax
import optax

from ehi.train.givens import givens_descent
from ehi.train.phase import Phase

# Steps between two repairs of a rotation, and the memory of its slopes: the same for
# every method.
_GIVENS = {"every": 1000, "decay": 0.99}


def trained_names(
    params: Mapping[str, jax.Array], rates: Mapping[str, float], last_n: int = 0
) -> frozenset[str]:
    """Names of the parameters that a phase trains.

    Args:
      params: name -> array; a name is 'group/.../leaf'.
      rates: group -> learning rate. A group that is absent or has rate 0 is frozen.
      last_n: if above 0, only the last n layers of the tower train.
    """
    layers = [
        int(n.split("/")[2]) for n in params if n.startswith("tower/layers/")
    ]  # tower/layers/<i>/...
    first = max(layers, default=0) + 1 - last_n if last_n else 0

    # A rotation is a fixed orthogonal matrix times one that learns, a head with a
    # hidden layer is a fixed projection plus a residual that learns.
    fixed = {"rotation/start", "quantiser/assign_codebooks"} | {
        f"{head}/projection"
        for head in ("head", "query_head")
        if f"{head}/w_in" in params
    }

    def is_trained(name: str) -> bool:
        parts = name.split("/")
        if parts[0].endswith("tower") and last_n:
            # Projection and Dense layers of a tower follow its last layer.
            in_last = parts[1] in ("projection", "dense") or (
                parts[1] == "layers" and int(parts[2]) >= first
            )
            return bool(rates.get(parts[0])) and in_last
        return bool(rates.get(parts[0])) and name not in fixed

    return frozenset(name for name in params if is_trained(name))


def make_optimizer(phase: Phase) -> optax.GradientTransformation:
    """Adam with a learning rate per group; weight decay and clipping for the towers.

    A rotation by Givens pairs is turned by `givens_descent` instead.
    """

    def schedule(peak: float):
        rest = max(phase.steps - phase.warmup, 1)
        after = {
            "cosine": optax.cosine_decay_schedule(peak, rest),
            "linear": optax.linear_schedule(peak, 0.0, rest),
            "constant": optax.constant_schedule(peak),
        }[phase.decay]
        if not phase.warmup:
            return after
        ramp = optax.linear_schedule(peak / phase.warmup, peak, phase.warmup)
        return optax.join_schedules([ramp, after], [phase.warmup])

    def of_group(group: str, rate: float):
        if not group.endswith("tower"):
            return optax.adam(schedule(rate))
        matrices = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
        adamw = optax.adamw(
            schedule(rate), weight_decay=phase.weight_decay, mask=matrices
        )
        if not phase.clip:
            return adamw
        return optax.chain(optax.clip_by_global_norm(phase.clip), adamw)

    rates = phase.rates
    transforms = {group: of_group(group, rate) for group, rate in rates.items() if rate}
    if rates.get("rotation"):
        # Adding to an orthogonal matrix would not keep it orthogonal.
        transforms["givens"] = givens_descent(schedule(rates["rotation"]), **_GIVENS)

    def label(name: str) -> str:
        return "givens" if name == "rotation/turned" else name.split("/")[0]

    return optax.multi_transform(
        transforms, lambda params: {name: label(name) for name in params}
    )
