"""Conditions mean the same by the index's columns and document by document."""

import random

import pytest
from retriever_cases import METADATA, text_index

from ehi.retrievers.metadata_filters import (
    OPERATORS,
    meets,
    rows_that_meet,
    where_text,
)
from ehi.retrievers.text_records import Records

FIELDS = {"lang": "text", "year": "number", "ok": "bool"}
VALUES = {"lang": ["en", "de", "fr", ""], "year": [2020, 2021.0, -1], "ok": [True]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filters")
    return [
        Records(text_index(folder / f"{columns}", columns)) for columns in (True, False)
    ]


def a_condition(rng, depth=3):
    kind = rng.choice(["leaf", "and", "or", "not"]) if depth else "leaf"
    if kind == "not":
        return "not", a_condition(rng, depth - 1)
    if kind != "leaf":
        return kind, [a_condition(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    name = rng.choice(list(FIELDS))
    operation = rng.choice(["==", "!=", "<", "<=", ">", ">=", "in", "not in"])
    values = VALUES[name]
    if operation in ("in", "not in"):
        return name, operation, rng.sample(values, rng.randint(1, len(values)))
    return name, operation, rng.choice(values + [None] * (operation in ("==", "!=")))


def test_columns_and_records_agree(sources):
    rng = random.Random(0)
    by_columns, by_records = sources
    found = set()
    for _ in range(300):
        condition = a_condition(rng)
        assert where_text(condition, FIELDS) is not None
        assert where_text(condition, None) is None
        one, other = (
            rows_that_meet(records, condition).tolist()
            for records in (by_columns, by_records)
        )
        assert one == other, condition
        found.add(tuple(one))
    assert len(found) > 15  # the conditions differ


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        (("lang", "==", "en"), [0, 3]),
        (("lang", "!=", "en"), [1, 2, 4]),
        (("lang", "==", None), [2, 4]),
        (("not", ("year", ">", 2020)), [0, 3, 4]),
        (("not", ("and", [("lang", "==", "en"), ("year", "<", 2020)])), [0, 1, 2, 4]),
        (("lang", "text, any case", "E"), [0, 1, 3]),
        (("lang", "empty", None), [2, 4]),
        (("lang", "any", ["d", "x"]), [1]),
        (("city", "==", "Rome"), []),
        (("year", "==", "2020"), []),
        (("and", []), [0, 1, 2, 3, 4]),
    ],
)
def test_what_conditions_mean(sources, condition, rows):
    for records in sources:
        mask = rows_that_meet(records, condition)
        assert [i for i, met in enumerate(mask) if met] == rows


def test_a_quote_in_a_name_or_value_is_no_syntax(sources):
    for name, value in (("lang", "' or year > 0 or lang == '"), ("a'] or ok", "x")):
        for records in sources:
            assert not rows_that_meet(records, (name, "==", value)).any()


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (("lang", "like", "e%"), "operator 'like'; allowed: =="),
        (("lang", "in", "en"), "needs a list of values, got 'en'"),
        (("not", ("year", "in", 3)), "needs a list of values, got 3"),
    ],
)
def test_mistakes(sources, condition, message):
    for records in sources:
        with pytest.raises(ValueError, match=message):
            rows_that_meet(records, condition)


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="on 'year' cannot compare 2020 < 'x'"):
        meets(("year", "<", "x"), METADATA[0])
    assert "empty" in OPERATORS
