"""Options of each library index. The same number is tried for each of them.

`OPTIONS[name]` are the settings that are tried on queries which are not evaluated; the
first is the default. Every index that has anything to choose gets `TRIALS` of them, so
that no row of a table is tuned more than another.

What the options mean:
    metric: 'ip' ranks by the inner product with the reconstruction, 'l2' by the
        distance to it. They differ, since reconstructions have no unit norm.
    residual: code the difference from the centroid of the list.
    scale: lists are visited whose probability, the softmax of `scale` times the inner
        products with the centroids, is above one threshold; None: the same number of
        lists for every query.
    links: M of a graph, half of the links of a document in the lowest level.
    iterations: of k-means.
    start: rotation that OPQ starts from.
    query: 'float' scores sign bits by the query itself, 'bits' by its own bits.
    centred: the bits are those of documents minus their mean.
    rotation: before codes or bits; 'pca' stands for principal axes as they are.
    reduce: the way to as many dimensions as fit the bytes.
    kept: share of the principal axes that codes see.
    bits: of a number of a scalar quantiser.
    share: of the bytes that hold the leading axes in 8 bits; the rest are sign bits.
    breadth: hypotheses that the encoder of a residual quantiser keeps.
    rounds: of the encoder of a local search quantiser.
    splits: parts of a vector, each with its own residual quantiser.
    soar: weight of the orthogonal residual when ScaNN puts a document into a second
        list; None: one list for each document.
    anisotropic: threshold of ScaNN's loss.
    rate, start_scale: of the optimiser of a linear router, and of its centroids.
"""

import itertools
from typing import Any

TRIALS = 4
ROUTERS = {"linear-router", "linear-router-opq"}  # need queries to learn from
# So they need no least number of documents.
WITHOUT_CODEBOOKS = {
    "lsh", "itq-lsh", "binary-int8", "faiss-sq", "faiss-rabitq", "faiss-ivfrabitq",
}  # fmt: skip
RABITQ_FACTORS = 8  # bytes: Faiss stores two floats with the bits of RaBitQ

Options = dict[str, Any]


def _grid(**values: tuple) -> tuple[Options, ...]:
    """Every combination of some values, the first of each first."""
    return tuple(
        dict(zip(values, some, strict=True))
        for some in itertools.product(*values.values())
    )


_METRIC = ("ip", "l2")
_LINKS = (32, 16, 12, 8)
_RESIDUAL = _grid(metric=_METRIC, residual=(True, False))
_REDUCED = _grid(metric=_METRIC, reduce=("pca", "random"))
_ROUTER = _grid(rate=(0.003, 0.001), start_scale=(20.0, 10.0))

OPTIONS: dict[str, tuple[Options, ...]] = {
    "faiss-flat": ({},),
    "faiss-ivf": _grid(scale=(20.0, 10.0, 40.0, None)),
    "linear-router": _ROUTER,
    "faiss-hnsw": _grid(links=_LINKS),
    "faiss-hnsw-sq": _grid(links=_LINKS),
    "faiss-hnsw-pq": _grid(metric=("l2", "ip"), links=(16, 8)),
    "faiss-pq": _grid(metric=_METRIC, iterations=(25, 100)),
    "faiss-opq": _grid(metric=_METRIC, start=("random", "pca")),
    "faiss-fastscan": _grid(metric=_METRIC, rotation=("none", "opq")),
    "faiss-ivfpq": _RESIDUAL,
    "faiss-opq-ivfpq": _RESIDUAL,
    "linear-router-opq": _grid(metric=_METRIC, rate=(0.003, 0.001)),
    "lsh": _grid(query=("float", "bits"), centred=(False, True)),
    "itq-lsh": _grid(query=("float", "bits"), rotation=("itq", "random")),
    "binary-int8": _grid(share=(0.125, 0.25), rotation=("random", "pca")),
    "faiss-rabitq": _REDUCED,
    "faiss-ivfrabitq": _REDUCED,
    "faiss-rq": _grid(metric=_METRIC, breadth=(5, 16)),
    "faiss-lsq": _grid(metric=_METRIC, rounds=(16, 32)),
    "faiss-prq": _grid(metric=_METRIC, splits=(4, 2)),
    "faiss-pca-pq": _grid(metric=_METRIC, kept=(0.5, 0.25)),
    "faiss-sq": _grid(metric=_METRIC, bits=(8, 4)),
    "scann": _grid(soar=(None, 1.5), anisotropic=(0.2, 0.1)),
}


def check_options(name: str, options: Options | None) -> Options:
    """The options of an index with the defaults of those that are not given.

    Raises:
        ValueError: an option that the index does not have, or a value outside of those
            that `OPTIONS` lists.
    """
    trials, given = OPTIONS[name], options or {}
    for key, value in given.items():
        allowed = list(dict.fromkeys(trial[key] for trial in trials if key in trial))
        if not allowed:
            names = ", ".join(trials[0]) or "none"
            raise ValueError(f"{name} has no option {key!r}; its options: {names}")
        if value not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise ValueError(f"{key} of {name} is {value!r}; must be one of {listed}")
    return trials[0] | given


def trials_of(name: str, *, num_leaves: int | None = None) -> tuple[Options, ...]:
    """The options to try; those that only act on lists are left out without lists."""
    if num_leaves is not None or name != "scann":
        return OPTIONS[name]
    return tuple(options for options in OPTIONS[name] if options["soar"] is None)


def options_text(options: Options) -> str:
    """'metric=l2 residual=False', for records and logs."""
    return " ".join(f"{key}={value}" for key, value in options.items())
