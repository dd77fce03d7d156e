"""The values that a sweep gives to fields of a config, from the command line."""

import contextlib
import difflib
import re
from ast import literal_eval
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from ehi.eval.provenance import config_hash
from experiments.command import explain_flags

# Fields that name or choose records -> what to do instead.
NOT_SWEPT = {
    "seed": "use --seeds",
    "systems": "use --systems",
    "budgets": "use --budget",
    "dataset": "each data set is a sweep of its own",
    "split": "a sweep chooses, so it is on dev",
    "variant": "it is the name of the cell",
    "recipe": "it says how old numbers are",
}


def parse_config(path: str, words: Sequence[str]):
    """Return the config of a file with overrides, as the flag --config reads them.

    Raises:
      ValueError: a field is unknown, or a value has another type.
    """
    if not Path(path.partition(":")[0]).is_file():
        raise ValueError(f"--config={path}: there is no such file")
    argv, values = ["sweep", f"--config={path}", *words], flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_file(
            "config", flag_values=values, lock_config=True, sys_argv=argv
        )
        values(argv)
        return holder.value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(explain_flags(error)) from None


def parse_grid(config, words: Sequence[str]) -> dict[str, list[object]]:
    """Read 'FIELD=VALUE,VALUE' words.

    >>> from experiments.configs import base
    >>> parse_grid(base.get_config(), ["joint.steps=10,20", "leaves.score='',ip"])
    {'joint.steps': [10, 20], 'leaves.score': ['', 'ip']}

    Raises:
      ValueError: names the field, and what it may be.
    """
    grid: dict[str, list[object]] = {}
    for word in words:
        field, sign, text = word.partition("=")
        field = field.removeprefix("config.")
        if not sign:
            raise ValueError(f"--set {word}: write it as FIELD=VALUE,VALUE,...")
        if field in grid:
            raise ValueError(f"--set names {field} twice: give all its values at once")
        if field in NOT_SWEPT:
            raise ValueError(f"--set cannot change {field}: {NOT_SWEPT[field]}")
        now = _value_of(config, field)
        values = [_parse_value(field, now, part) for part in split_values(field, text)]
        for at, value in enumerate(values):
            if value in values[:at]:
                raise ValueError(f"--set {field} has the value {value!r} twice")
        grid[field] = values
    return grid


def split_values(field: str, text: str) -> list[str]:
    """Split at the commas that are outside of brackets and quotes.

    >>> split_values("f", "('a', 'b'),('c',),None")
    ["('a', 'b')", "('c',)", 'None']

    Raises:
      ValueError: there is no value, an empty one, or a bracket without its partner.
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter in "\"'":
            quote = "" if letter == quote else quote or letter
        elif not quote:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not quote and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    if quote or depth:
        raise ValueError(f"--set {field}={text}: a bracket or quote is not closed")
    parts = [part.strip() for part in parts]
    if "" in parts:
        raise ValueError(
            f"--set {field}={text} has an empty value (an empty string is '')"
        )
    return parts


def _value_of(config, field: str):
    """Return the value of a field; refuse what is none."""
    at, path = config, []
    for name in field.split("."):
        known = sorted(at) if isinstance(at, ml_collections.ConfigDict) else []
        if name not in known:
            flat = sorted(_flat(config))
            near = difflib.get_close_matches(field, flat, 3, 0.7)
            near += [f for f in flat if f.split(".")[-1] == name and f not in near][:3]
            said = f"; near ones are {', '.join(near)}" if near else ""
            where = ".".join(path)
            said += f"; {where or 'the config'} has {', '.join(known) or 'no fields'}"
            raise ValueError(f"--set {field}: the config has no such field{said}")
        at = at[name]
        path.append(name)
    if isinstance(at, ml_collections.ConfigDict):
        raise ValueError(
            f"--set {field}: it is a section; name one of its fields, "
            f"{', '.join(f'{field}.{name}' for name in at)}"
        )
    return at


def _flat(config, before: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name


def _parse_value(field: str, now, text: str):
    """Return the value that --config.FIELD=TEXT gives a field whose value is `now`."""
    if isinstance(now, str) and re.fullmatch(r"([\"']).*\1", text):
        return text[1:-1]
    if now is None:  # a placeholder: ml_collections has no parser for it
        with contextlib.suppress(ValueError, SyntaxError):
            return literal_eval(text)
        return text
    argv, values = ["sweep", f"--config.value={text}"], flags.FlagValues()
    config = ml_collections.ConfigDict({"value": now})
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, TypeError, ValueError):
        raise ValueError(
            f"--set {field}: {text} is no {type(now).__name__}, as {now!r} is"
        ) from None
    return config.value


def cell_name(changed: Mapping[str, object]) -> str:
    """Return the name of a combination, which names files.

    >>> cell_name({"joint.rates.head": 3e-4, "leaves.score": "ip"})
    'rates.head-0.0003_score-ip'
    """
    parts = []
    for field, value in changed.items():
        short = field.split(".", 1)[-1]
        parts.append(f"{short}-{value}")
    exact = "_".join(parts)
    name = re.sub(r"[^\w.-]+", "-", exact, flags=re.ASCII)
    if name == exact and len(name) <= 80:
        return name
    return f"{name[:70]}-{config_hash(dict(changed), without=())[:6]}"
