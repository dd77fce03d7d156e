"""Dry run: what a config would compute, found without its data and its weights.

    python -m experiments.main --dry_run --workdir=runs/dry \\
        --config=experiments/configs/paper_ehi.py:msmarco

Every phase of every system of the config, and of the systems it starts from, is built
as training builds it, but on abstract arrays; its one jitted step is lowered and
compiled, and the compiler says how much memory it takes. Not part of it: encoding the
corpus, k-means and OPQ starts, mining, the index. The memory is that of the kind of
device this runs on, and of one device where there are several. A config that needs more
than an accelerator has, or than a stated limit, is refused after it was shown.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.markup import escape

from ehi.model.params import split_model
from ehi.train import loop
from ehi.train.mesh import make_mesh, table_sharding
from ehi.train.optimizer import trained_names
from ehi.train.phase import Phase
from experiments.abstract import (
    Sizes,
    abstract_batch,
    abstract_model,
    abstract_tables,
    data_sizes,
    tower_shape,
)
from experiments.checks import check_config
from experiments.flops import count_flops, measure_flops
from experiments.systems import (
    Budget,
    config_of,
    fit_to_corpus,
    get_system,
    phase_of,
)
from experiments.training import run_name

GIB = 2**30


@dataclass(frozen=True)
class Report:
    """One phase of one system, as compiled.

    Attributes:
      run, phase: names, as in the log of a real run.
      steps: of the phase.
      shapes: array of the batch or the tables -> type and shape.
      parameters, trained: numbers in the model, and those that the phase changes.
      parts: what the arguments hold -> bytes: parameters, optimiser, code table, and
        other tables and the batch.
      arguments, outputs, temporaries: bytes. Outputs that take the place of donated
        arguments are not counted twice; temporaries are activations and gradients.
      flops: of the matrix products of one step.
      flops_per_second: stated or measured.
      compile_seconds: of tracing, lowering and compiling.
    """

    run: str
    phase: str
    steps: int
    shapes: Mapping[str, str]
    parameters: int
    trained: int
    parts: Mapping[str, int]
    arguments: int
    outputs: int
    temporaries: int
    flops: float
    flops_per_second: float
    compile_seconds: float

    @property
    def peak(self) -> int:
        """Bytes a step needs: XLA allocates all its temporaries at once."""
        return self.arguments + self.outputs + self.temporaries

    @property
    def seconds(self) -> float:
        """Estimated time of all steps."""
        return self.steps * self.flops / self.flops_per_second


def dry_run(config, *, flops_per_second: float | None = None) -> list[Report]:
    """Compile the step of every phase of a config on abstract arrays.

    Args:
      config: an experiment. `sizes.documents` and `sizes.train_queries` are counted in
        the data set where they are missing or 0; the tower is as `tower.shape` says, or
        else its checkpoint.
      flops_per_second: for the estimated times; None to time a product here.

    Returns:
      a report for every phase, in the order in which a run trains them.

    Raises:
      ValueError: the config cannot run; see `check_config`.
    """
    check_config(config)
    sizes, shape = data_sizes(config), tower_shape(config)
    config = fit_to_corpus(config, sizes.documents)
    speed = flops_per_second or measure_flops(config.tower.dtype)
    reports = []
    for name, compression in _runs(config):
        resolved, system = config_of(config, name), get_system(name)
        for phase_name in system.phases:
            phase = phase_of(resolved, phase_name, sizes.documents)
            if phase.steps:
                model = abstract_model(resolved, system, compression, sizes, shape)
                report = compile_phase(
                    resolved, phase, model, sizes,
                    run=run_name(name, compression), name=phase_name, speed=speed,
                )  # fmt: skip
                reports.append(report)
    return reports


def compile_phase(
    config, phase: Phase, model, sizes: Sizes, *, run: str, name: str, speed: float
) -> Report:
    """Lower and compile the real step of a phase.

    Args:
      config: of the system.
      phase: what is trained.
      model: from `abstract_model`.
      sizes: of the data set.
      run, name: of the system and of the phase.
      speed: FLOP/s.
    """
    started, made, mesh = time.monotonic(), [], make_mesh()
    graphdef, params = split_model(model)

    def begin(params):
        step, state, sharding = loop.make_phase_step(
            graphdef, params, phase, mesh, config.shard_state
        )
        made.extend((step, sharding))
        return state

    state = jax.eval_shape(begin, params)
    tables = abstract_tables(config, phase, params, sizes)
    batch = abstract_batch(config, phase, params, sizes)
    key, lies = jax.eval_shape(lambda: jax.random.key(0)), table_sharding(mesh, tables)
    placed = (
        jax.tree.map(_at, state, made[1]),
        {name: _at(x, lies[name]) for name, x in tables.items()},
        _placed(mesh, batch),
    )
    traced = made[0].trace(*placed, key)
    memory = traced.lower().compile().memory_analysis()
    trained = trained_names(params, phase.rates, phase.last_n)
    return Report(
        run=run,
        phase=name,
        steps=phase.steps,
        shapes={
            array: f"{value.dtype.name}{list(value.shape)}"
            for array, value in (batch | tables).items()
        },
        parameters=sum(value.size for value in params.values()),
        trained=sum(params[name].size for name in trained),
        parts=_parts(placed[0], placed[1], memory.argument_size_in_bytes),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=count_flops(traced.jaxpr.jaxpr) / mesh.size,
        flops_per_second=speed,
        compile_seconds=time.monotonic() - started,
    )


def show_dry_run(
    reports: list[Report],
    console: Console | None = None,
    memory_gib: float | None = None,
) -> None:
    """Print a paragraph for every phase, then refuse what does not fit.

    Args:
      reports: from `dry_run`.
      console: to print to.
      memory_gib: of a device; None for what an accelerator has to give. A CPU stands
        for another machine and has no limit of its own.

    Raises:
      ValueError: a phase needs more memory than that.
    """
    console = console or Console()
    for r in reports:
        memory = ", ".join(
            f"{name} {size / GIB:.3f}"
            for name, size in (
                *r.parts.items(), ("outputs", r.outputs),
                ("activations", r.temporaries), ("peak", r.peak),
            )
        )  # fmt: skip
        shapes = ", ".join(f"{name} {shape}" for name, shape in r.shapes.items())
        for line in (
            f"[bold]{r.run}, {r.phase}[/bold]: {r.steps:,} steps, compiled in "
            f"{r.compile_seconds:.1f} s",
            f"  parameters  {r.parameters:,}, of which {r.trained:,} train",
            f"  memory GiB  {memory}",
            f"  time        {r.flops:.3g} FLOP a step, {r.seconds / 3600:.3g} hours at "
            f"{r.flops_per_second:.3g} FLOP/s",
            f"  shapes      {escape(shapes)}",
        ):
            console.print(line, highlight=False, soft_wrap=True)
    check_memory(reports, memory_gib)


def check_memory(reports: list[Report], memory_gib: float | None = None) -> None:
    """Refuse a config of which a phase needs more than a device has."""
    limit = _device_gib() if memory_gib is None else memory_gib
    worst = max(reports, key=lambda r: r.peak, default=None)
    if worst is None or limit is None or worst.peak <= limit * GIB:
        return
    parts = {**worst.parts, "activations": worst.temporaries}
    largest = max(parts, key=parts.get)
    raise ValueError(
        f"{worst.run}, {worst.phase} needs {worst.peak / GIB:.3g} GiB on every device, "
        f"most of it {largest} ({parts[largest] / GIB:.3g} GiB), but there are "
        f"{limit:.3g} GiB"
    )


def _device_gib() -> float | None:
    """What an accelerator gives to one process, in GiB; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return limit / GIB if limit and jax.default_backend() != "cpu" else None


def _runs(config) -> Iterator[tuple[str, int | None]]:
    """(system, compression) of every run that trains, a parent before its children."""
    runs = {}

    def add(name, compression):
        system = get_system(name)
        parent = config.library_parent if system.library else system.parent
        if parent is not None:
            add(parent, None)
        runs[name, compression] = None

    budgets = [Budget.parse(budget) for budget in config.budgets]
    for name in config.systems:
        for budget in budgets:
            if budget.applies_to(get_system(name)):
                add(name, budget.compression)
    return iter(runs)


def _parts(state, tables, arguments: int) -> dict[str, int]:
    """Bytes on one device of what goes into a step."""

    def held(tree) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )

    parts = {
        "parameters": held(state["params"]),
        "optimiser": held(state["opt_state"]),
        "code table": held(tables.get("codes", ())),
    }
    # What the step does not read is no argument of the compiled one.
    return parts | {"other tables and batch": max(0, arguments - sum(parts.values()))}


def _placed(mesh, tree):
    """Abstract arrays on a mesh, as `shard_batch` places real ones."""

    def put(x):
        even = x.shape[0] % mesh.size == 0
        spec = PartitionSpec("data") if even else PartitionSpec()
        return _at(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def _at(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
