"""A module as a flat dictionary of named arrays, and back."""

import jax
from flax import nnx


def split_model(model: nnx.Module):
    """A module as (graphdef, {'group/.../name': array}).

    Optimiser, checkpoint and index export work on the flat dictionary. The part of a
    name before the first slash is its group.
    """
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, _flatten(nnx.to_pure_dict(state))


def merge_model(graphdef, params: dict[str, jax.Array]) -> nnx.Module:
    """The inverse of `split_model`; inside jit it costs no run time."""
    nested: dict = {}
    for name, value in params.items():
        *path, last = (int(p) if p.isdigit() else p for p in name.split("/"))
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return nnx.merge(graphdef, nested)


def has_tower(params: dict[str, jax.Array]) -> bool:
    """Whether the model encodes text; else it takes cached tower outputs."""
    return any(name.startswith("tower/") for name in params)


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
