"""Filters of the frameworks in one form, and what it does.

A condition is a tuple:

    ("and", conditions)  ("or", conditions)  ("not", condition)
    (field, operator, value), where the operator is one of `OPERATORS`

A document without the field meets `!=` and `not in` of any value but None, and none of
the others, as in all three frameworks. Where the index keeps the fields as metadata
columns, `Index.where` answers; else every document is read.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

JOINS = ("and", "or", "not")
_OPPOSITE = {
    "==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">",
    "in": "not in", "not in": "in",
}  # fmt: skip
_MISSING_MEETS = ("!=", "not in")
_TESTS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda found, values: found in values,
    "not in": lambda found, values: found not in values,
    "contains": lambda found, value: value in found,
    "any": lambda found, values: any(value in found for value in values),
    "all": lambda found, values: all(value in found for value in values),
    "text": lambda found, value: value in found,
    "text, any case": lambda found, value: value.lower() in found.lower(),
}
OPERATORS = (*_TESTS, "empty")
_KINDS = {bool: "bool", int: "number", float: "number", str: "text"}


def check_condition(condition: Any) -> None:
    """Refuses what is no condition.

    Raises:
        ValueError: naming the part that cannot be read.
    """
    head = condition[0]
    if head in JOINS and len(condition) == 2:
        for part in [condition[1]] if head == "not" else condition[1]:
            check_condition(part)
        return
    _, name, value = condition
    if name not in OPERATORS:
        raise ValueError(
            f"a filter has the operator {name!r}; allowed: {', '.join(OPERATORS)}"
        )
    if name in ("in", "not in", "any", "all") and (
        isinstance(value, str) or not isinstance(value, Sequence)
    ):
        raise ValueError(
            f"a filter with {name!r} needs a list of values, got {value!r}"
        )


def meets(condition: tuple, metadata: Mapping[str, Any]) -> bool:
    """Whether a document of these metadata meets a condition.

    >>> meets(("and", [("year", ">=", 2020), ("lang", "!=", "de")]), {"year": 2021})
    True

    Raises:
        ValueError: values that cannot be compared.
    """
    head = condition[0]
    if head == "and" and len(condition) == 2:
        return all(meets(part, metadata) for part in condition[1])
    if head == "or" and len(condition) == 2:
        return any(meets(part, metadata) for part in condition[1])
    if head == "not" and len(condition) == 2:
        return not meets(condition[1], metadata)
    name, operation, value = condition
    found = metadata.get(name)
    if operation == "empty":
        return found in (None, "", [])
    if operation in ("==", "!=") and value is None:
        return (found is None) == (operation == "==")
    if found is None:
        return operation in _MISSING_MEETS
    try:
        return bool(_TESTS[operation](found, value))
    except TypeError:
        raise ValueError(
            f"the filter on {name!r} cannot compare {found!r} {operation} {value!r}"
        ) from None


def where_text(condition: tuple, fields: Mapping[str, str] | None) -> str | None:
    """The condition as `Index.where` reads it; None if that cannot say it.

    >>> where_text(("not", ("year", ">=", 2020)), {"year": "number"})
    "(field['year'] < 2020 or field['year'] is None)"

    Args:
        condition: as above.
        fields: field -> kind of the index's metadata.
    """
    return _where(condition, fields or {}, False)


def _where(condition, fields, negated):
    if len(condition) == 2:
        head, parts = condition
        if head == "not":
            return _where(parts, fields, not negated)
        texts = [_where(part, fields, negated) for part in parts]
        if None in texts or not texts:
            return None
        word = "or" if (head == "or") != negated else "and"
        return f"({f' {word} '.join(texts)})"
    name, operation, value = condition
    if name not in fields or operation not in _OPPOSITE:
        return None
    shown = f"field[{name!r}]"
    turned = _OPPOSITE[operation] if negated else operation
    if value is None and operation in ("==", "!="):
        return f"{shown} is None" if turned == "==" else f"{shown} is not None"
    values = value if operation in ("in", "not in") else [value]
    if not values or not all(_fits(each, fields[name]) for each in values):
        return None
    if operation in ("in", "not in"):
        value = f"({', '.join(map(repr, values))},)"
    else:
        value = repr(value)
    text = f"{shown} {turned} {value}"
    missing = (operation in _MISSING_MEETS) != negated
    return f"({text} or {shown} is None)" if missing else f"({text})"


def _fits(value, kind):
    finite = not isinstance(value, float) or math.isfinite(value)
    return _KINDS.get(type(value)) == kind and finite


def rows_that_meet(records, condition: tuple | None):
    """The mask by row of a condition on `Records`; None for no condition.

    Raises:
        ValueError: the condition cannot be read, or compares what cannot be compared.
    """
    if condition is None or records.index is None:
        return None
    check_condition(condition)
    text = where_text(condition, records.index.fields)
    if text is not None:
        return records.index.where(text)
    return records.mask(lambda record: meets(condition, record.metadata))
