"""What a sweep tries: its cells, their configs, and the workdir that it claims."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_collections

from ehi.files import atomic_write
from ehi.train.recipes import RECIPES
from experiments.run.checks import check_config
from experiments.run.workdir import CONTINUED, described
from experiments.sweeps.grid import cell_name
from experiments.sweeps.trials import overrides
from experiments.systems import Budget, config_of, get_system


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a command line asks for.

    Attributes:
      workdir: receives a folder for each cell, `results`, and the table.
      base: function: seed -> the config that every cell changes.
      budgets: system -> the budget of its records.
      grid: field -> its values; empty for named trials.
      trials: keys of `TRIALS`; empty for a grid.
      seeds: the seeds.
      metric: sorts the table; as records name it.
    """

    workdir: Path
    base: Callable[[int], ml_collections.ConfigDict]
    budgets: Mapping[str, str]
    grid: Mapping[str, Sequence[object]]
    trials: Sequence[str]
    seeds: Sequence[int]
    metric: str

    def columns(self, system: str) -> dict[str, dict[str, object]]:
        """Name of each cell of a system -> column of the table -> its value."""
        if not self.grid:  # the score of raw leaves is exact
            pq = get_system(system).pq
            names = [t for t in self.trials if pq or not t.startswith("score-")]
            return {name: {"trial": name} for name in names}
        products = itertools.product(*self.grid.values())
        cells = [dict(zip(self.grid, values, strict=True)) for values in products]
        return {cell_name(cell): cell for cell in cells}

    def config(self, system: str, cell: str, seed: int):
        """Return the config of a cell."""
        config = self.base(seed)
        changed = self.columns(system)[cell]
        if not self.grid:
            changed = overrides(config, system, cell)
        config.update_from_flattened_dict(changed)
        config.systems = (system,)
        config.variant = "-".join((cell, CONTINUED) if config.start_from else (cell,))
        return config

    def folder(self, seed: int, system: str, cell: str) -> Path:
        """Return the workdir of a cell."""
        return self.workdir / f"seed{seed}" / f"{system}-{cell}"

    def end_file(self, seed: int, system: str, cell: str) -> Path:
        """Return the file that says how a cell ended."""
        folder = self.folder(seed, system, cell)
        return folder / f"finished-{self.budgets[system]}.json"

    def finished(self, seed: int, system: str, cell: str) -> dict | None:
        """Return how a cell ended; None if it has not."""
        path = self.end_file(seed, system, cell)
        return json.loads(path.read_text()) if path.exists() else None

    def cells(self) -> list[tuple[int, str, str]]:
        """(seed, system, name) of every cell."""
        return [
            (seed, system, cell)
            for seed in self.seeds
            for system in self.budgets
            for cell in self.columns(system)
        ]


def check_sweep(sweep: Sweep, processes: int = 1) -> None:
    """Refuse what cannot run, before any work.

    Raises:
      ValueError: a cell has no valid config, a budget does not fit its system, a field
        has no effect, no record has the metric, or there are more processes than cores.
    """
    cores = len(os.sched_getaffinity(0))
    if not 1 <= processes <= cores:
        raise ValueError(f"--processes={processes}; it may be 1 to {cores}, the cores")
    for system, budget in sweep.budgets.items():
        if (Budget.parse(budget).compression is not None) != get_system(system).pq:
            raise ValueError(
                f"budget {budget!r} does not apply to {system}: a budget of bytes "
                "needs PQ leaves"
            )
    for seed, system, cell in sweep.cells():
        config = sweep.config(system, cell, seed)
        if config.split == "test":
            raise ValueError("the split is 'test': a sweep chooses, so it is on dev")
        check_config(config)
        if sweep.metric.startswith("exact_") and "vectors" not in config:
            raise ValueError(
                f"--metric={sweep.metric}: only records of vectors have it (a config "
                "such as experiments/configs/vectors.py)"
            )
        for field, value in sweep.columns(system)[cell].items() if sweep.grid else ():
            _check_effect(config, system, field, value)


def _check_effect(config, system: str, field: str, value) -> None:
    """Refuse a field that a system sets itself, or that belongs to another's phase."""
    at = config_of(config, system)
    phases = [
        phase for name in ancestry(config, system) for phase in get_system(name).phases
    ]
    if (section := field.split(".")[0]) in RECIPES and section not in phases:
        raise ValueError(
            f"--set {field}: {system} has no phase {section}, but {', '.join(phases)}"
        )
    for name in field.split("."):
        at = at[name]
    if at != value:
        raise ValueError(f"--set {field}: {system} always has {at!r} there")


def ancestry(config, system: str) -> list[str]:
    """Return a system and those that it starts from."""
    found = [system]
    while system is not None:
        of = get_system(system)
        system = config.library_parent if of.library else of.parent
        found += [system] if system else []
    return found


def claim_sweep(sweep: Sweep) -> None:
    """Refuse a workdir of another sweep; else note in it what this one is.

    More values, systems and seeds may be added later.

    Raises:
      ValueError: the workdir is a file, or its sweep has another config or fields.
    """
    if sweep.workdir.exists() and not sweep.workdir.is_dir():
        raise ValueError(f"--workdir={sweep.workdir} is a file, not a folder")
    config = sweep.base(sweep.seeds[0])
    free = ("systems", "budgets", "seed", "variant")
    kept = {name: v for name, v in described(config).items() if name not in free}
    ours = {"fields": list(sweep.grid) or ["trial"], "config": kept}
    path = sweep.workdir / "sweep.json"
    if not path.exists():
        if (sweep.workdir / "config.json").exists():
            raise ValueError(
                f"{sweep.workdir} holds an experiment, not a sweep; choose another "
                "--workdir (nothing was changed)"
            )
        atomic_write(path, (json.dumps(ours, indent=2) + "\n").encode())
        return
    try:
        theirs = json.loads(path.read_text())
        fields, other = theirs["fields"], theirs["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: it describes no sweep ({error})"
        ) from None
    if fields != ours["fields"]:
        said = f"a sweep of {', '.join(fields)}, not of {', '.join(ours['fields'])}"
    elif differ := sorted(
        n for n in kept.keys() | other if kept.get(n) != other.get(n)
    ):
        said = f"a sweep of another config, which differs in {', '.join(differ)}"
    else:
        return
    raise ValueError(
        f"{sweep.workdir} holds {said}; choose another --workdir (nothing was changed)"
    )
