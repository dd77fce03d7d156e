"""Paired randomisation test over queries, Holm-corrected within a table."""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from ehi.eval.records import Cell, Record

# Permutations drawn at once, a multiple of 4; more would not fit into the cache.
_CHUNK = 256
# The bits of every byte, as numbers.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype("f4")

Key = TypeVar("Key", bound=Hashable)


def randomisation_test(
    differences: np.ndarray, *, permutations: int = 100_000, seed: int = 0
) -> float:
    """Two-sided p-value of a paired randomisation (sign-flipping) test.

    Under the hypothesis that both systems are equal, the sign of each query's
    difference d_q is a fair coin s_q:

      p = P(|sum_q s_q d_q| >= |sum_q d_q|)

    If there are at most `permutations` sign patterns (2^N), all are enumerated.
    Otherwise random patterns are drawn, and p = (1 + hits) / (1 + permutations), which
    is never 0.

    Args:
        differences: (N,) value of one system minus the value of the other, by query.
        permutations: number of random sign patterns.
        seed: for the random patterns.

    Raises:
        ValueError: `differences` is empty, not one-dimensional or not finite.

    Source: Smucker, Allan, Carterette, CIKM 2007, section 2.1.
    """
    return randomisation_tests([differences], permutations=permutations, seed=seed)[0]


def randomisation_tests(
    many: Sequence[np.ndarray], *, permutations: int = 100_000, seed: int = 0
) -> list[float]:
    """The p-values of many tests: those that `randomisation_test` has for each.

    Tests that need equally many bytes of random signs share the patterns, and equal
    tests are made once, so many tests cost little more than one of each size.

    Args:
        many: (N,) differences of each test; N may differ.
        permutations, seed: of `randomisation_test`.

    Raises:
        ValueError: as `randomisation_test`.
    """
    found = [_without_ties(differences) for differences in many]
    unique = {differences.tobytes(): differences for differences in found}
    p_values: dict[bytes, float] = {b"": 1.0}
    by_width: dict[int, list[bytes]] = {}
    for key, differences in unique.items():
        if differences.size < 63 and 2**differences.size <= permutations:
            p_values[key] = _enumerated(differences)
        else:
            by_width.setdefault(-(-differences.size // 8), []).append(key)
    with threadpool_limits(1, "blas"):  # the products are small
        for width, keys in by_width.items():
            columns = [unique[key] for key in keys]
            hits = _hits(columns, width, permutations, seed)
            for key, count in zip(keys, hits, strict=True):
                p_values[key] = (1 + int(count)) / (1 + permutations)
    return [p_values[differences.tobytes()] for differences in found]


def _without_ties(differences: np.ndarray) -> np.ndarray:
    """Check differences; leave out queries on which both systems are equal."""
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 1 or differences.size == 0:
        raise ValueError(f"expected (N,) differences, found {differences.shape}")
    if not np.isfinite(differences).all():
        raise ValueError("differences are not finite")
    return differences[differences != 0]


def _observed(differences: np.ndarray) -> float:
    """|sum d|; rounding makes equal sums differ in the last bits, and the slack counts
    them as equal."""
    return abs(differences.sum()) - 1e-12 * np.abs(differences).sum()


def _enumerated(differences: np.ndarray) -> float:
    """The p-value from all 2^N sign patterns."""
    if not differences.size:
        return 1.0
    hits, total = 0, 2**differences.size
    for start in range(0, total, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, total))
        bits = rows[:, None] >> np.arange(differences.size) & 1
        # The sum of s d, with s = 2 bit - 1.
        sums = 2 * (bits @ differences) - differences.sum()  # (rows,)
        hits += int((np.abs(sums) >= _observed(differences)).sum())
    return hits / total


def _hits(columns, width: int, permutations: int, seed: int) -> np.ndarray:
    """Random patterns whose sum is at least the observed one, of each test: (T,).

    Sums in float32 decide, unless they are so near to the observed one that rounding
    could: those few are added up again in float64.

    Args:
        columns: differences of T tests, none longer than 8 width.
        width: bytes of a pattern of signs.
        permutations: number of patterns.
        seed: for the random patterns.
    """
    wide = np.zeros((8 * width, len(columns)))  # (N, T)
    for column, differences in zip(wide.T, columns, strict=True):
        column[: differences.size] = differences
    narrow = np.asarray(2 * wide, np.float32)
    total = wide.sum(axis=0)  # (T,)
    observed = np.array([_observed(differences) for differences in columns])
    # Adding up n numbers of float32 errs by at most n 2^-24 of their absolute sum.
    margin = 16 * width * 2.0**-22 * np.abs(wide).sum(axis=0)
    hits = np.zeros(len(columns), np.int64)
    rng = np.random.default_rng(seed)
    offset = total.astype(np.float32)
    buffer = np.empty((_CHUNK, width, 8), np.float32)
    for start in range(0, permutations, _CHUNK):
        rows = min(_CHUNK, permutations - start)
        random = rng.bytes(rows * width)
        packed = np.frombuffer(random, dtype=np.uint8).reshape(rows, width)
        np.take(_BITS, packed, axis=0, out=buffer[:rows], mode="clip")
        bits = buffer[:rows].reshape(rows, 8 * width)
        over = np.abs(bits @ narrow - offset) - observed  # (rows, T)
        hits += (over > margin).sum(axis=0)
        row, test = np.nonzero(np.abs(over) <= margin)
        signed = np.einsum("rn,rn->r", 2.0 * bits[row] - 1.0, wide.T[test])
        hits += np.bincount(
            test, np.abs(signed) >= observed[test], len(columns)
        ).astype(np.int64)
    return hits


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction: p_(i) <- max over j <= i of (n - j + 1) p_(j).

    Args:
        p_values: the n p-values of one table.

    Returns:
        (n,) corrected p-values in the same order, at most 1.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A system compared with its counterpart at one budget, over their common seeds."""

    counterpart: str
    difference: float  # mean over queries and seeds
    p_value: float
    p_holm: float
    seeds: tuple[int, ...]
    signs: tuple[int, ...]  # sign of each seed's mean difference: 1, 0 or -1


Row = tuple[str, str, str, str, str]  # a cell without its seed
# System of the second row, and seed -> (N,) values of the first row and of the second.
ValuePair = tuple[str, Mapping[int, np.ndarray], Mapping[int, np.ndarray]]


def row_of(cell: Cell) -> Row:
    """(system, variant, dataset, split, budget): one row of a table."""
    return (cell.system, cell.variant, cell.dataset, cell.split, cell.budget)


def compare(
    records: Iterable[Record],
    per_query: Mapping[Cell, np.ndarray],
    counterparts: Mapping[str, str],
) -> dict[Row, Comparison]:
    """Test each row against its counterpart's row of the same variant and budget.

    Rows without a counterpart or without per-query values are left out.

    Args:
        records: of one table.
        per_query: cell -> (N,) values of the same N queries in the same order.
        counterparts: system -> system, such as 'ehi' -> 'kmeans-tree'.

    Raises:
        ValueError: two compared cells have different numbers of queries.
    """
    return compare_values(counterpart_pairs(records, per_query, counterparts))


def counterpart_pairs(
    records: Iterable[Record],
    per_query: Mapping[Cell, np.ndarray],
    counterparts: Mapping[str, str],
) -> dict[Row, ValuePair]:
    """Row -> what `compare` tests: an argument of `compare_values`."""
    cells = [record.cell for record in records if record.cell in per_query]
    pairs = [
        (row, (counterparts[row[0]], *row[1:]))
        for row in dict.fromkeys(map(row_of, cells))
        if row[0] in counterparts
    ]
    values = _value_pairs(pairs, {cell: per_query[cell] for cell in cells})
    return {row: pair for (row, _), pair in values.items()}


def compare_pairs(
    pairs: Iterable[tuple[Row, Row]],
    per_query: Mapping[Cell, np.ndarray],
) -> dict[tuple[Row, Row], Comparison]:
    """Test the first row of each pair against the second.

    The value of a query is its mean over the seeds that both rows have. Pairs without a
    common seed or without per-query values are left out. The p-values of one call (one
    table) are Holm-corrected together.

    Args:
        pairs: (row, the row that it is tested against).
        per_query: cell -> (N,) values of the same N queries in the same order.

    Raises:
        ValueError: two compared cells have different numbers of queries.
    """
    return compare_values(_value_pairs(pairs, per_query))


def _value_pairs(pairs, per_query) -> dict[tuple[Row, Row], ValuePair]:
    by_row: dict[Row, dict[int, np.ndarray]] = {}
    for cell, values in per_query.items():
        by_row.setdefault(row_of(cell), {})[cell.seed] = values
    return {
        (row, other): (other[0], by_row.get(row, {}), by_row.get(other, {}))
        for row, other in dict.fromkeys(pairs)
    }


def compare_values(pairs: Mapping[Key, ValuePair]) -> dict[Key, Comparison]:
    """Test the first values of each pair against the second: see `compare_pairs`.

    Raises:
        ValueError: two compared rows have different numbers of queries.
    """
    return compare_tables({"": pairs})[""]


def compare_tables(
    tables: Mapping[Key, Mapping[Hashable, ValuePair]],
) -> dict[Key, dict[Hashable, Comparison]]:
    """`compare_values` of many tables, each Holm-corrected by itself, in one go.

    Raises:
        ValueError: two compared rows have different numbers of queries.
    """
    found = {name: _differences(pairs) for name, pairs in tables.items()}
    means = [d.mean(axis=0) for of in found.values() for _, d in of.values()]
    p_values = iter(randomisation_tests(means))
    return {
        name: _corrected(tables[name], of, [next(p_values) for _ in of])
        for name, of in found.items()
    }


def _differences(pairs) -> dict[Hashable, tuple[list[int], np.ndarray]]:
    """Key -> the seeds that both rows have, and the differences (seeds, N)."""
    found = {}
    for key, (_, ours, theirs) in pairs.items():
        if seeds := sorted(set(ours) & set(theirs)):
            differences = [_subtract(key, ours[s], theirs[s]) for s in seeds]
            found[key] = (seeds, np.stack(differences))
    return found


def _corrected(pairs, found, p_values: Sequence[float]) -> dict[Hashable, Comparison]:
    """The comparisons of one table; its p-values are Holm-corrected together."""
    return {
        key: Comparison(
            counterpart=pairs[key][0],
            difference=float(differences.mean()),
            p_value=p_value,
            p_holm=float(p_holm),
            seeds=tuple(seeds),
            signs=tuple(int(s) for s in np.sign(differences.mean(axis=1))),
        )
        for (key, (seeds, differences)), p_value, p_holm in zip(
            found.items(), p_values, holm(p_values), strict=True
        )
    }


def _subtract(key: Hashable, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    if len(ours) != len(theirs):
        raise ValueError(
            f"{key}: {len(ours)} queries, its counterpart has {len(theirs)}"
        )
    return np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
