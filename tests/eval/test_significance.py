import itertools

import numpy as np
import pytest

from ehi.eval.significance import (
    compare,
    compare_tables,
    compare_values,
    holm,
    randomisation_test,
    randomisation_tests,
    row_of,
)


def enumerate_p(differences):
    """The definition, one sign pattern at a time."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    return sum(s >= observed - 1e-12 for s in sums) / len(sums)


@pytest.mark.parametrize(
    "differences",
    [
        [0.3],
        [0.1, 0.2, 0.3],
        [0.5, -0.5],
        [0.1, 0.2, -0.05, 0.4, 0.0, 0.0, 0.3],
        [1 / 3, -1 / 7, 0.2, 0.2, 0.2, -0.6, 0.11, 0.9, 0.35, 0.5],
    ],
)
def test_p_value_equals_exact_enumeration(differences):
    exact = enumerate_p(differences)
    assert randomisation_test(differences) == pytest.approx(exact)


def test_random_patterns_estimate_the_exact_p_value():
    differences = np.random.default_rng(3).normal(size=14) + 0.4
    exact = randomisation_test(differences, permutations=2**14)
    assert exact == pytest.approx(enumerate_p(differences))
    estimate = randomisation_test(differences, permutations=2**14 - 1)
    assert estimate == pytest.approx(exact, abs=5 * np.sqrt(exact / 2**14))


def test_symmetric_in_sign_and_repeatable():
    differences = np.random.default_rng(0).normal(size=200) + 0.1
    p = randomisation_test(differences, permutations=20_000)
    assert 0.01 < p < 0.9
    assert randomisation_test(differences, permutations=20_000) == p
    assert randomisation_test(-differences, permutations=20_000) == pytest.approx(
        p, abs=0.02
    )


def test_never_zero_and_one_where_nothing_differs():
    assert randomisation_test(np.ones(100), permutations=999) == 1 / 1000
    assert randomisation_test(np.zeros(100)) == 1.0


def one_pattern_at_a_time(differences, permutations):
    """The definition, by the same stream of random bytes."""
    differences = differences[differences != 0]
    rng, observed = np.random.default_rng(0), abs(differences.sum()) - 1e-9
    hits = 0
    for _ in range(permutations // 4):  # bytes are drawn in fours
        packed = np.frombuffer(rng.bytes(4 * -(-differences.size // 8)), np.uint8)
        bits = np.unpackbits(packed.reshape(4, -1), axis=1)[:, : differences.size]
        signs = 2.0 * bits - 1
        hits += (abs(signs @ differences) >= observed).sum()
    return (1 + hits) / (1 + permutations)


def test_many_tests_have_the_p_values_that_each_has_alone():
    rng = np.random.default_rng(5)
    many = [rng.normal(size=n) + 0.1 for n in (30, 31, 64, 65, 200)]
    # Sums of tenths meet the observed sum exactly, so rounding must not decide.
    many += [rng.integers(-3, 4, size=300) / 10, rng.normal(size=100), np.zeros(4)]
    many += [many[0], np.ones(5)]
    found = randomisation_tests(many, permutations=2000)
    assert found == [randomisation_test(d, permutations=2000) for d in many]
    for differences, p in zip(many[:7], found[:7], strict=True):
        assert p == one_pattern_at_a_time(differences, 2000)


def test_each_table_is_corrected_by_itself():
    rng = np.random.default_rng(0)
    first = {k: ("opq", {0: rng.normal(size=40)}, {0: np.zeros(40)}) for k in "ab"}
    second = {k: ("opq", {0: rng.normal(size=40)}, {0: np.zeros(40)}) for k in "cde"}
    found = compare_tables({"T1": first, "T2": second})
    assert found == {"T1": compare_values(first), "T2": compare_values(second)}


@pytest.mark.parametrize("bad", [[], [[0.1]], [0.1, np.nan]])
def test_bad_differences_are_refused(bad):
    with pytest.raises(ValueError, match="differences"):
        randomisation_test(bad)


def test_holm_by_hand():
    # 4 x 0.01; 3 x 0.02; 2 x 0.03 is raised to 0.06 and stays; 1 x 0.9.
    np.testing.assert_allclose(holm([0.03, 0.01, 0.9, 0.02]), [0.06, 0.04, 0.9, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])
    assert holm([]).shape == (0,)


COUNTERPARTS = {"ehi": "kmeans-tree", "joint-pq": "opq"}


def test_compares_seed_means_at_equal_budget(make_record):
    rng = np.random.default_rng(0)
    base = rng.normal(size=50)
    records, values = [], {}
    for seed, gain in ((0, 0.2), (1, 0.3), (2, -0.05)):
        for system, value in (("kmeans-tree", base), ("ehi", base + gain)):
            record = make_record(system=system, seed=seed)
            records.append(record)
            values[record.cell] = value
    # Another budget, a seed of one side only, and a system without a counterpart.
    for record in (
        make_record(budget="visit-5"),
        make_record(seed=9),
        make_record(system="dense"),
    ):
        records.append(record)
        values[record.cell] = base
    found = compare(records, values, COUNTERPARTS)
    assert list(found) == [row_of(make_record().cell)]
    (comparison,) = found.values()
    assert comparison.counterpart == "kmeans-tree"
    assert comparison.difference == pytest.approx(0.15)
    assert comparison.seeds == (0, 1, 2)
    assert comparison.signs == (1, 1, -1)
    assert comparison.p_value == comparison.p_holm == 1 / 100_001


def test_p_values_of_a_table_are_corrected_together(make_record):
    values, records = {}, []
    noise = np.random.default_rng(0).normal(size=30)
    for joint, separate in COUNTERPARTS.items():
        for system, value in ((joint, noise + 0.5), (separate, np.zeros(30))):
            records.append(make_record(system=system))
            values[records[-1].cell] = value
    found = compare(records, values, COUNTERPARTS).values()
    assert [c.p_holm for c in found] == pytest.approx([2 * c.p_value for c in found])


def test_variants_are_compared_with_their_own_kind(make_record):
    tuned = make_record(variant="finetune")
    plain = make_record(system="kmeans-tree")
    values = {tuned.cell: np.ones(3), plain.cell: np.zeros(3)}
    assert compare([tuned, plain], values, COUNTERPARTS) == {}


def test_different_queries_are_refused(make_record):
    ours, theirs = make_record(), make_record(system="kmeans-tree")
    values = {ours.cell: np.ones(3), theirs.cell: np.zeros(4)}
    with pytest.raises(ValueError, match="3 queries, its counterpart has 4"):
        compare([ours, theirs], values, COUNTERPARTS)
