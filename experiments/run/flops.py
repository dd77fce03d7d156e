"""FLOPs of a step or of texts, and FLOPs per second of a device."""

import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

# Dense bfloat16 FLOP/s of a chip, without sparsity. The key is part of jax's name of
# the device; the first match counts. From memory, not checked against data sheets:
# `--peak-flops` replaces them.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(dtype: str, stated: float | None = None) -> tuple[float, str]:
    """Return the FLOP/s that a device reaches at best, and the source of the number.

    Raises:
      ValueError: the accelerator is not in `PEAKS`.
    """
    if stated:
        return stated, "stated"
    if jax.default_backend() == "cpu":
        return measure_flops(dtype, repeats=20), f"best of 20 {dtype} products here"
    kind = jax.devices()[0].device_kind
    for name, peak in PEAKS.items():
        if name.lower() in kind.lower():
            return peak, f"{name}, dense bfloat16, from memory"
    raise ValueError(f"the peak of {kind!r} is not known: give it with --peak-flops")


def count_flops(jaxpr) -> float:
    """Count the FLOPs of the matrix products of a jaxpr, including loop repetitions.

    XLA's own `cost_analysis` counts the body of a loop once: a batch encoded in 64
    chunks would seem 64 times cheaper than it is.
    """
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _flops(jaxpr)


def text_flops(tower: nnx.Module, lengths: np.ndarray) -> float:
    r"""Count the FLOPs of a tower's matrix products for texts without padding.

    .. math:: F = \sum_i f(n_i), \quad f(n) = a + b n + c n^2

    Linear layers grow as n, attention as n^2, so three lengths give a, b and c.

    Args:
      tower: `Tower`.
      lengths: number of tokens n of each text (N,).
    """
    graphdef, params = nnx.split(tower)

    def of_one(length: int) -> float:
        def apply(params, ids):
            return nnx.merge(graphdef, params)(ids, jnp.ones(ids.shape, bool))

        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return count_flops(jax.make_jaxpr(apply)(params, ids).jaxpr)

    known = np.array([4.0, 8.0, 16.0])
    factors = np.linalg.solve(np.vander(known), [of_one(int(n)) for n in known])
    return float(np.polyval(factors, np.asarray(lengths, float)).sum())


def _flops(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (summed, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            products = math.prod(eqn.outvars[0].aval.shape)
            total += 2.0 * products * math.prod(left[axis] for axis in summed)
        inner = [_flops(part) for part in jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "cond":  # one branch runs: count the largest
            inner = [max(inner)]
        total += eqn.params.get("length", 1) * sum(inner)  # a scan has a `length`
    return total


def measure_flops(dtype: str, size: int = 2048, repeats: int = 5) -> float:
    """Measure the FLOP/s of this device in a square matrix product.

    A train step hardly reaches it. The result is float32, as in the tower: a CPU takes
    three times as long to return bfloat16.
    """
    x = jnp.ones((size, size), dtype)
    matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    product = jax.jit(matmul).lower(x, x).compile()
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds)
