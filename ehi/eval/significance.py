"""Paired randomisation test over queries, Holm-corrected within a table."""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from ehi.eval.records import Cell, Record

# Permutations drawn at once; memory is proportional to this x queries.
_CHUNK = 1000

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
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 1 or differences.size == 0:
        raise ValueError(f"expected (N,) differences, found {differences.shape}")
    if not np.isfinite(differences).all():
        raise ValueError("differences are not finite")
    # A query on which both systems are equal adds 0 to both sums.
    differences = differences[differences != 0]
    if differences.size == 0:
        return 1.0
    # Rounding makes equal sums differ in the last bits; the slack counts them as equal.
    observed = abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    exact = differences.size < 63 and 2**differences.size <= permutations
    total = 2**differences.size if exact else permutations
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, total, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, total))
        if exact:
            bits = rows[:, None] >> np.arange(differences.size) & 1
        else:
            random = rng.bytes(len(rows) * -(-differences.size // 8))
            packed = np.frombuffer(random, dtype=np.uint8).reshape(len(rows), -1)
            bits = np.unpackbits(packed, axis=1, count=differences.size)
        # The sum of s d, with s = 2 bit - 1.
        sums = 2 * (bits @ differences) - differences.sum()  # (rows,)
        hits += int((np.abs(sums) >= observed).sum())
    return hits / total if exact else (1 + hits) / (1 + total)


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
    cells = [record.cell for record in records if record.cell in per_query]
    pairs = [
        (row, (counterparts[row[0]], *row[1:]))
        for row in dict.fromkeys(map(row_of, cells))
        if row[0] in counterparts
    ]
    values = {cell: per_query[cell] for cell in cells}
    found = compare_pairs(pairs, values)
    return {row: comparison for (row, _), comparison in found.items()}


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
    by_row: dict[Row, dict[int, np.ndarray]] = {}
    for cell, values in per_query.items():
        by_row.setdefault(row_of(cell), {})[cell.seed] = values
    values = {
        (row, other): (other[0], by_row.get(row, {}), by_row.get(other, {}))
        for row, other in dict.fromkeys(pairs)
    }
    return compare_values(values)


# System of the second row, and seed -> (N,) values of the first row and of the second.
ValuePair = tuple[str, Mapping[int, np.ndarray], Mapping[int, np.ndarray]]


def compare_values(pairs: Mapping[Key, ValuePair]) -> dict[Key, Comparison]:
    """Test the first values of each pair against the second: see `compare_pairs`.

    Raises:
        ValueError: two compared rows have different numbers of queries.
    """
    found = {}
    for key, (_, ours, theirs) in pairs.items():
        if seeds := sorted(set(ours) & set(theirs)):
            differences = [_subtract(key, ours[s], theirs[s]) for s in seeds]
            found[key] = (seeds, np.stack(differences))  # (seeds, N)
    p_values = [randomisation_test(d.mean(axis=0)) for _, d in found.values()]
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
