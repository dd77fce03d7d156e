"""The mesh of all devices, and how batches, tables and states are placed on it."""

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# Arrays of fewer elements are not cut over the devices; 256 kB of float32.
SHARDED_FROM = 2**16


def make_mesh() -> jax.sharding.Mesh:
    """One axis 'data' over all devices; the compiler places what lies on it (Auto)."""
    auto = (jax.sharding.AxisType.Auto,)
    if jax.process_count() == 1:
        return jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    # The devices of a process are neighbours, so that its rows of a batch are, too.
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return jax.sharding.Mesh(np.array(devices), ("data",), axis_types=auto)


def local_mesh() -> jax.sharding.Mesh:
    """`make_mesh` over the devices of this process alone."""
    devices, auto = jax.local_devices(), (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(devices),), ("data",), axis_types=auto, devices=devices)


def shard_batch(mesh: jax.sharding.Mesh, batch: Mapping) -> dict:
    """Arrays with their rows over the devices; uneven ones whole on each device."""

    def put(x):
        even = x.shape[0] % mesh.size == 0
        spec = PartitionSpec("data") if even else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, dict(batch))


def batch_slice(mesh: jax.sharding.Mesh, size: int) -> slice:
    """The rows of a batch of `size` that this process holds.

    These are all rows if the devices cannot divide them evenly.
    """
    if size % mesh.size:
        return slice(size)
    processes = [device.process_index for device in mesh.devices.flat]
    first, count = processes.index(jax.process_index()), jax.local_device_count()
    rows = size // mesh.size
    return slice(first * rows, (first + count) * rows)


def join_batch(
    mesh: jax.sharding.Mesh, batch: Mapping, num_queries: int, num_documents: int,
    encoded: int = 0,
) -> dict:  # fmt: skip
    """One global batch, made of the `batch_slice` of every process.

    Args:
      mesh: over the devices of all processes.
      batch: the rows that this process holds.
      num_queries, num_documents: N and C, of all processes together.
      encoded: how many queries, and how many documents, have tokens; 0 for all.
    """

    def put(name, x):
        # 'documents_ids', but also 'teacher_documents', and 'leaves' of documents.
        of_documents = "documents" in name or name == "leaves"
        size = num_documents if of_documents else num_queries
        if encoded and name.endswith(("_ids", "_mask")):
            size = min(encoded, size)
        if encoded and name.startswith("cached_"):
            size -= min(encoded, size)
        even = size % mesh.size == 0
        spec = PartitionSpec("data") if even else PartitionSpec()
        shape = (size, *x.shape[1:])
        return jax.make_array_from_process_local_data(
            NamedSharding(mesh, spec), x, shape
        )

    return {name: put(name, x) for name, x in batch.items()}


def check_batch(
    mesh: jax.sharding.Mesh, batch_size: int, pool: int, num_documents: int,
    encoded: int = 0,
) -> None:  # fmt: skip
    """Refuse a batch that the devices cannot divide evenly.

    A pool of the whole corpus may have any size: every device scores all of it.
    """
    sizes = {"batch_size": batch_size, "encoded": encoded}
    if pool < num_documents:
        sizes["pool"] = pool
    for name, size in sizes.items():
        if size % mesh.size:
            raise ValueError(
                f"{name}={size} does not divide over the {mesh.size} devices of "
                f"{jax.process_count()} processes; allowed: multiples of {mesh.size}"
            )


def replicate(mesh: jax.sharding.Mesh, tree):
    """The same arrays on every device. All processes pass the same arrays."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return place(tree, jax.tree.map(lambda _: everywhere, tree))


def table_sharding(mesh: jax.sharding.Mesh, tables: dict) -> dict:
    """Shardings of the tables of a step: codes in equal parts, all others whole.

    Each device searches its own part of the code table, see `search_codes`. If the
    devices cannot divide its rows evenly, it lies whole on each.
    """
    parts = {
        name: "data" if name == "codes" and len(table) % mesh.size == 0 else None
        for name, table in tables.items()
    }
    return {
        name: NamedSharding(mesh, PartitionSpec(part)) for name, part in parts.items()
    }


def state_sharding(mesh: jax.sharding.Mesh, state: dict, shard: bool = False) -> dict:
    """Shardings of the arrays of a state: whole on every device, or a part on each.

    With `shard`, an array of at least `SHARDED_FROM` elements is cut along the longest
    axis that the devices divide evenly. The compiler gathers a parameter where it is
    used and leaves each device its part of the gradient. That needs more traffic and
    less memory.

    Args:
      mesh: over the devices.
      state: from `start_state`; arrays, or their shapes.
      shard: whether to cut parameters and moments at all.

    References:
      ZeRO, stage 3: Rajbhandari et al. 2020, arXiv 1910.02054.
    """

    def choose(x):
        axes = [axis for axis, size in enumerate(x.shape) if size % mesh.size == 0]
        if not shard or not axes or x.size < SHARDED_FROM:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(choose, state)


def place(tree, shardings):
    """The arrays of a tree, put where the same place in `shardings` says.

    All processes pass the same arrays.
    """

    def put(x, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def over_local_devices(apply: Callable, params) -> Callable:
    """`apply(params, *arrays)`, its rows spread over the devices of this process."""
    mesh = local_mesh()
    if mesh.size == 1:
        return functools.partial(apply, params)
    params = replicate(mesh, params)

    def spread(*arrays):
        batch = shard_batch(mesh, dict(enumerate(arrays)))
        return apply(params, *batch.values())

    return spread


def own_copy(tree):
    """Whole copies of arrays, on devices of this process alone.

    Computing with them involves no other process.
    """

    def whole(x):
        if not x.is_fully_replicated:
            everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
            x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
        return x if jax.process_count() == 1 else x.addressable_data(0)

    return jax.tree.map(whole, tree)
