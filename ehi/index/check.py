"""Errors, and checks of arguments: what is wrong is refused in one sentence."""

import importlib.util
import json
import numbers
import operator

import numpy as np

# Norms of documents and parameters, and of queries: a score, which is the sum of two
# products at most, then stays below 2^127, and float32 ends at 2^128.
_MOST_NORM, MOST_QUERY_NORM = 2.0**40, 2.0**86
# float16 rounds values from 65520 on to infinity; those below 2^-14 lose digits.
_MOST_HALF, _LEAST_HALF = 65520, 2.0**-14
_UNIT = 1e-3  # largest error of a unit vector's norm, also as float16 or bfloat16
_PADDED = 2**20  # a search of any index may ask for this many results
# What search needs, texts included: no JAX.
INSTALL = (
    "python -m pip install numpy threadpoolctl tokenizers safetensors && "
    "python -m pip install --no-deps ."
)


class IndexCorruptError(ValueError):
    """A file of an index is missing, truncated, altered or does not fit the others."""


class IndexLockedError(RuntimeError):
    """Another process, or another thread, is writing to the index."""


def check_installed(what, *libraries):
    """Refuses what needs a library that is not installed.

    Raises:
        ImportError: it names the line that installs all that search needs.
    """
    for name in libraries:
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"{what} needs {name}, which is not installed: in a checkout of ehi "
                f"run `{INSTALL}`"
            )


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
    # The abstract class comes last, since its check takes ten times as long.
    if isinstance(value, (float, int, numbers.Real)) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}")


def check_choice(name, value, allowed):
    """`value`, if it is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


def check_results(name, value, num_documents, least=1):
    """`value`, a number of results, as an int that memory can hold.

    A million may always be asked for: missing results are padded.
    """
    value, most = check_count(name, value, least), max(num_documents, _PADDED)
    if value > most:
        raise ValueError(
            f"{name} must be at most {most}, got {value}: the index holds "
            f"{num_documents} documents"
        )
    return value


def check_json(name, value):
    """`value`, a dict of plain JSON or None, as it will be read from a file."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict of JSON values or None, got {value!r}")
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be plain JSON: {error}") from None


def check_same_encoder(expected, got):
    """Refuses an encoder whose identity differs in an entry that both have.

    Without any common entry nothing could be compared, so that is refused too.
    """
    got = check_json("encoder", got)
    if not expected.keys() & got.keys():
        raise ValueError(
            f"an encoder with the entries {sorted(got)} cannot be compared with that "
            f"of the index, which has {sorted(expected)}"
        )
    for key in expected.keys() & got.keys():
        if expected[key] != got[key]:
            raise ValueError(
                f"these embeddings come from another encoder: its {key} is "
                f"{got[key]!r}, the index was built with {expected[key]!r}"
            )


def check_queries(queries, width):
    """Queries as float32 (N, D)."""
    queries = np.asarray(queries)
    if not is_float(queries):
        raise ValueError(f"queries must be floats, got dtype {queries.dtype}")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(
            f"queries must have shape (N, {width}), the width of the index, "
            f"got {queries.shape}"
        )
    return finite_rows("queries", as_float32(queries), most=MOST_QUERY_NORM)


def check_embeddings(embeddings):
    """Document embeddings as float32 (N, D), at least one."""
    embeddings = np.asarray(embeddings)
    if not is_float(embeddings) or embeddings.ndim != 2:
        raise ValueError(
            "embeddings must be floats of shape (N, D), "
            f"got {embeddings.dtype} of shape {embeddings.shape}"
        )
    if not embeddings.size:
        raise ValueError(f"an empty corpus: embeddings have shape {embeddings.shape}")
    return finite_rows("embeddings", as_float32(embeddings))


def check_leaves(leaves, num, spill, num_leaves):
    """The given leaves of all documents as an (N, s) array of int64."""
    array = np.asarray(leaves)
    if array.shape != (num, spill) or array.dtype.kind not in "iu":
        raise ValueError(
            f"leaves must be whole numbers of shape {(num, spill)}, got {array.dtype} "
            f"of shape {array.shape}"
        )
    bad = (array < 0) | (array >= num_leaves)
    if bad.any():
        raise ValueError(
            f"leaves has {array[bad][0]} in row {np.flatnonzero(bad.any(1))[0]}; "
            f"allowed: 0 to {num_leaves - 1}"
        )
    ordered = np.sort(array, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if twice.any():
        raise ValueError(f"leaves has one leaf twice in row {np.flatnonzero(twice)[0]}")
    return array.astype(np.int64)


def is_float(array):
    """Whether an array holds floats; NumPy has no kind for JAX's bfloat16."""
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def as_float32(array):
    """An array of floats as float32, C-ordered; too large values become infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


def finite_rows(name, rows, *, half=False, most=_MOST_NORM, unit_for=None):
    """`rows` unchanged, if their products are finite: see `misfits`."""
    bad, what = misfits(rows, half, most, unit_for)
    if len(bad):
        raise ValueError(
            f"{name} hold {what} in {len(bad)} rows, first in row {bad[0]}"
        )
    return rows


def misfits(rows, half=False, most=_MOST_NORM, unit_for=None):
    """The rows (N, D) float32 that an index cannot hold, and what is wrong with them.

    Args:
        rows: embeddings, queries or parameters.
        half: whether they are stored as float16.
        most: the largest norm allowed.
        unit_for: the score that needs unit vectors, or None.

    Returns:
        Numbers of rows, none if all fit; and a few words.
    """
    # If the sum of squares is small, no value is NaN and no row is long: one pass, no
    # temporary. Not true of NaN.
    if not float(np.vdot(rows, rows)) <= most**2:
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            return bad, "NaN or infinity"
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
        bad = np.flatnonzero(norms > most)
        if len(bad):
            found = f"{norms[bad[0]]:.3g}, beyond {most:.3g}"
            return bad, f"a vector of norm {found}, where float32 products overflow,"
    if half:
        largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
        bad = np.flatnonzero(largest >= _MOST_HALF)
        if len(bad):
            return bad, "a value too large for float16"
        bad = np.flatnonzero((largest < _LEAST_HALF) & (largest > 0))
        if len(bad):
            found = f"{largest[bad[0]]:.3g}, where {_LEAST_HALF:.3g} is needed,"
            return bad, f"only values too small for float16, the largest {found}"
    if unit_for is not None:
        norms = np.sqrt(np.vecdot(rows, rows))
        bad = np.flatnonzero(np.abs(norms - 1) > _UNIT)
        if len(bad):
            needs = f"where score {unit_for!r} needs unit vectors,"
            return bad, f"a vector of norm {norms[bad[0]]:.6g}, {needs}"
    return (), ""
