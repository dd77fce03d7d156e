"""Compile what a config would compute, without its data and its weights.

    python -m experiments.main --dry_run \\
        --config=experiments/configs/papers/ehi.py:msmarco

Every phase of every system, and of the systems they start from, is built as in
training, but on abstract arrays: shapes without numbers. Its one jitted step is lowered
and compiled, and the compiler reports how much memory it takes, on one device of the
kind that this runs on. Tables that are larger than `device_table_gib` stay in files;
the rows that a step reads are then part of its batch. The lines behind the phases are
the host's memory, the disk, and the k-means and OPQ starts, by the formula of
`experiments.run.memory`. A phase that needs more memory than an accelerator has, or
than --memory_gib, is refused after it is printed.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.markup import escape

from ehi.data.datasets import open_dataset
from ehi.model.params import has_tower, split_model
from ehi.model.pretrained import resolve
from ehi.model.tower import Tower
from ehi.parallel.mesh import make_mesh, table_sharding
from ehi.train import loop
from ehi.train.batch import side_of
from ehi.train.optimizer import trained_names
from ehi.train.phase import Phase
from ehi.train.starts import drop_query_side
from experiments.run.checks import check_config
from experiments.run.flops import count_flops, measure_flops
from experiments.run.models import build_model
from experiments.run.train import rows_travel, run_name
from experiments.run.vectors import vector_sizes
from experiments.systems import (
    Budget,
    config_of,
    fit_to_corpus,
    freezes_later,
    get_system,
    phase_of,
    phases_of,
)

GIB = 2**30
# Shapes of towers, for configs that state none.
TOWERS = {
    "sentence-transformers/all-MiniLM-L6-v2": {
        "vocab_size": 30522, "width": 384, "num_layers": 6, "num_heads": 12,
        "mlp_width": 1536, "max_positions": 512, "type_vocab_size": 2,
    },
}  # fmt: skip
# Known positives per query in an abstract batch. In a real run it is the number of
# positives of the query with most.
MOST_POSITIVES = 8


@dataclass(frozen=True)
class Sizes:
    """Size of a data set: documents, and train queries, one per labelled pair."""

    documents: int
    train_queries: int


def data_sizes(config) -> Sizes:
    """Return the sizes that a config states, or else those of its data set."""
    if "vectors" in config:
        return Sizes(*vector_sizes(config)[:2])
    stated = config.get("sizes", {})
    if stated.get("documents", 0):
        return Sizes(stated["documents"], stated.get("train_queries", 0))
    dataset = open_dataset(config.dataset)
    pairs = dataset.positives("train")[0] if "train" in dataset.qrels else ()
    return Sizes(len(dataset.documents), len(pairs))


def tower_shape(config) -> dict:
    """Return the arguments of `Tower`: stated, known or from a checkpoint."""
    if "vectors" in config:
        given, mapped = vector_sizes(config)[2:]
        return {"width": mapped, "code_width": given}
    stated = config.tower.get("shape", None)
    if stated:
        return dict(stated)
    name = config.tower.name
    return dict(TOWERS[name]) if name in TOWERS else dict(resolve(name).config)


def output_width(shape: dict) -> int:
    """Return the width of what a tower of these arguments gives out."""
    layers = shape.get("dense", ())
    return layers[-1]["width"] if layers else shape["width"]


def abstract_model(config, system, compression: int | None, sizes: Sizes, shape: dict):
    """Return the module that `build_model` makes, with shapes instead of numbers."""

    def tower() -> Tower:
        dtype = jnp.dtype(config.tower.dtype)
        return Tower(**shape, dtype=dtype, remat=config.tower.remat, rngs=nnx.Rngs(0))

    def build():
        return build_model(
            config, system, compression, tower=tower, tower_width=output_width(shape),
            num_documents=sizes.documents, code_width=shape.get("code_width", 0),
        )  # fmt: skip

    return nnx.eval_shape(build)


def abstract_batch(config, phase: Phase, params: Mapping, sizes: Sizes) -> dict:
    """Return the shapes of what `make_batch` returns for a phase."""
    n, c = phase.batch_size, min(phase.pool, sizes.documents)
    batch = {
        "queries": _array((n,), jnp.int32),
        "documents": _array((c,), jnp.int32),
        "target": _array((n,), jnp.int32),
        "where": _array((n, c), bool),
        "weights": _array((n,), jnp.float32),
    }
    if phase.needs_codes:
        batch["positives"] = _array((n, MOST_POSITIVES), jnp.int32)
    if has_tower(params):
        for side, rows, length in (
            ("queries", phase.encoded or n, config.tower.query_length),
            ("documents", min(phase.encoded, c) or c, config.tower.document_length),
        ):
            batch[f"{side}_ids"] = _array((rows, length), jnp.int32)
            batch[f"{side}_mask"] = _array((rows, length), bool)
    return batch


def abstract_tables(config, phase: Phase, params: Mapping, sizes: Sizes) -> dict:
    """Return the shapes of the read-only arrays that the steps of a phase gather from.

    The rows of the query table are train queries, pseudo-queries, documents and
    synthetic queries.
    """
    in_width, width = params["head/projection"].shape  # (T, D)
    documents, frozen = sizes.documents, not has_tower(params)
    per_document = config.pseudo.per_document + 1 + config.pseudo.synthetic
    queries = sizes.train_queries + documents * per_document
    tables = {}
    if frozen or phase.losses.get("query_anchor"):
        tables["features_queries"] = _array((queries, in_width), jnp.float32)
    if frozen or phase.losses.get("anchor"):
        tables["features_documents"] = _array((documents, in_width), jnp.float32)
    if not frozen and phase.encoded:
        tables["cached_queries"] = _array((queries, in_width), jnp.float32)
        tables["cached_documents"] = _array((documents, in_width), jnp.float32)
    if phase.needs_teacher:
        tables["teacher_queries"] = _array((queries, width), jnp.float32)
        tables["teacher_documents"] = _array((documents, width), jnp.float32)
    if phase.needs_codes:
        m = params["quantiser/codebooks"].shape[0]
        tables["codes"] = _array((documents, m), jnp.uint8)
    if phase.start == "reassign":
        tables["leaves"] = _array((documents, config.tree.spill), jnp.int32)
    return tables


def abstract_rows(tables: Mapping, batch: Mapping, encoded: int) -> dict:
    """Return the shapes of the rows of tables that `make_batch` gathers on the host."""
    rows = {}
    for name, table in tables.items():
        size = batch[side_of(name)].shape[0]
        if name.startswith("cached_"):
            size -= min(encoded, size)
        rows[name] = _array((size, *table.shape[1:]), table.dtype)
    return rows


def _array(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


@dataclass(frozen=True)
class Report:
    """One compiled phase of one system.

    Attributes:
      run, phase: names, as in the log of a real run.
      steps: steps of the phase.
      shapes: array of the batch or the tables -> type and shape.
      parameters: numbers in the model.
      trained: numbers that the phase changes.
      parts: bytes of the arguments, by kind: parameters, optimiser, code table, other
        tables and batch.
      arguments, outputs, temporaries: bytes. Outputs that replace donated arguments are
        not counted twice; temporaries are activations and gradients.
      flops: FLOPs of the matrix products of one step.
      flops_per_second: speed, stated or measured.
      compile_seconds: time to trace, lower and compile.
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
        """Bytes that a step needs; XLA allocates all temporaries at once."""
        return self.arguments + self.outputs + self.temporaries

    @property
    def seconds(self) -> float:
        """Estimated time of all steps."""
        return self.steps * self.flops / self.flops_per_second


def dry_run(config, *, flops_per_second: float | None = None) -> list[Report]:
    """Compile the step of every phase of a config on abstract arrays.

    Args:
      config: an experiment. If `sizes.documents` is 0 or missing, the documents and
        train queries of the data set are counted. The tower has the shape of
        `tower.shape`, or else that of its checkpoint.
      flops_per_second: speed for the estimated times; None: measure it here.

    Returns:
      a report for every phase, in training order.

    Raises:
      ValueError: the config cannot run; see `check_config`.
    """
    check_config(config)
    sizes, shape = data_sizes(config), tower_shape(config)
    config = fit_to_corpus(config, sizes.documents)
    speed = flops_per_second or measure_flops(config.tower.dtype)
    reports = []
    for name, compression in runs_of(config):
        resolved, system = config_of(config, name), get_system(name)
        for phase_name in phases_of(resolved, system):
            phase = phase_of(resolved, phase_name, sizes.documents)
            if phase.steps:
                model = abstract_model(resolved, system, compression, sizes, shape)
                if freezes_later(resolved, system, phase_name):
                    drop_query_side(model)
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
      config: config of the system.
      phase: the phase.
      model: from `abstract_model`.
      sizes: sizes of the data set.
      run, name: names of the system's run and of the phase.
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
    if rows_travel(config, tables):
        travelling = {n: tables.pop(n) for n in list(tables) if n != "codes"}
        batch |= abstract_rows(travelling, batch, phase.encoded)
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
    plan=None,
) -> None:
    """Print a paragraph for every phase, then refuse a phase that does not fit.

    Args:
      reports: from `dry_run`.
      console: console to print to.
      plan: from `experiments.run.memory.plan_memory`, to print; or None.
      memory_gib: memory of a device; None: that of the accelerator. A CPU has no limit,
        since it stands for another machine.

    Raises:
      ValueError: a phase needs more memory than the limit.
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
    if plan is not None:
        _show_plan(plan, console)
    check_memory(reports, memory_gib)


def _show_plan(plan, console: Console) -> None:
    stage = max(plan.stages, key=plan.stages.get)
    host = plan.host | {stage: plan.stages[stage]}
    del host["largest stage"]
    for title, total, parts in (
        ("host memory", plan.peak, host),
        ("disk", sum(plan.disk.values()), plan.disk),
        ("starts (k-means, OPQ), on the device", max(plan.starts.values(), default=0),
         plan.starts),
    ):  # fmt: skip
        listed = ", ".join(f"{name} {size / GIB:.3f}" for name, size in parts.items())
        line = f"[bold]{title}[/bold] GiB: {total / GIB:.3f} ({escape(listed)})"
        console.print(line, highlight=False, soft_wrap=True)


def check_memory(reports: list[Report], memory_gib: float | None = None) -> None:
    """Refuse a config if one of its phases needs more memory than a device has."""
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
    """Return the GiB that an accelerator gives to one process; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return limit / GIB if limit and jax.default_backend() != "cpu" else None


def runs_of(config) -> Iterator[tuple[str, int | None]]:
    """Return (system, compression) of every run that trains, parents first."""
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
    """Return the bytes on one device of each kind of argument of a step."""

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
    # The compiler removes arguments that the step does not read.
    return parts | {"other tables and batch": max(0, arguments - sum(parts.values()))}


def _placed(mesh, tree):
    """Place abstract arrays on a mesh as `shard_batch` places real ones."""

    def put(x):
        even = x.shape[0] % mesh.size == 0
        spec = PartitionSpec("data") if even else PartitionSpec()
        return _at(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def _at(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
