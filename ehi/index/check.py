"""Refuses what does not fit, in one sentence, before any work is done."""

import json
import math
import numbers
import operator

import numpy as np

_PADDED = 2**20  # results that may always be asked for


def check_count(name, value, least=1):
    """`value` as an int of at least `least`."""
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_share(name, value):
    """`value` as a float between 0 and 1."""
    # An abstract class is asked last: that takes ten times as long.
    if isinstance(value, (float, int, numbers.Real)) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}")


def check_choice(name, value, allowed):
    """`value`, if it is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


def check_results(name, value, num_documents, least=1):
    """`value`, how many results are wanted, as an int that memory can hold.

    A million may be asked for whatever there is: what is missing is padded.
    """
    value, most = check_count(name, value, least), max(num_documents, _PADDED)
    if value > most:
        raise ValueError(
            f"{name} must be at most {most}, got {value}: the index holds "
            f"{num_documents} documents"
        )
    return value


def check_json(name, value):
    """`value`, if it is a dict of plain JSON or None."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict of JSON values or None, got {value!r}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be plain JSON: {error}") from None
    return value


def check_same_encoder(expected, got):
    """Refuses an encoder whose identity differs in an entry that both name.

    One that names nothing the other does is refused as well: nothing was compared.
    """
    check_json("encoder", got)
    if not expected.keys() & got.keys():
        raise ValueError(
            f"an encoder of {sorted(got)} cannot be compared with that of the index, "
            f"of {sorted(expected)}"
        )
    for key in expected.keys() & got.keys():
        if expected[key] != got[key]:
            raise ValueError(
                f"these embeddings are of another encoder: its {key} is {got[key]!r}, "
                f"the index was built with {expected[key]!r}"
            )


def check_queries(queries, width):
    """Queries as float32 (N, D)."""
    queries = np.asarray(queries)
    if queries.dtype.kind != "f":
        raise ValueError(f"queries must be floats, got dtype {queries.dtype}")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(
            f"queries must have shape (N, {width}), the width of the index, "
            f"got {queries.shape}"
        )
    return finite_rows("queries", np.ascontiguousarray(queries, np.float32))


def check_embeddings(embeddings):
    """Document embeddings as float32 (N, D), at least one."""
    embeddings = np.asarray(embeddings)
    if embeddings.dtype.kind != "f" or embeddings.ndim != 2:
        raise ValueError(
            "embeddings must be floats of shape (N, D), "
            f"got {embeddings.dtype} of shape {embeddings.shape}"
        )
    if not embeddings.size:
        raise ValueError(f"an empty corpus: embeddings have shape {embeddings.shape}")
    return finite_rows("embeddings", np.ascontiguousarray(embeddings, np.float32))


def finite_rows(name, rows):
    """`rows` unchanged, if all values are finite."""
    # A sum is finite unless a value is not (or it overflows): one pass, no temporary.
    if rows.dtype == np.float32:  # BLAS: of one query a quarter of the time
        total = np.vdot(rows, rows)
    else:
        with np.errstate(invalid="ignore"):
            total = rows.sum(dtype=np.float64)
    if not math.isfinite(total):
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{name} hold NaN or infinity in {len(bad)} rows, first in row {bad[0]}"
            )
    return rows
