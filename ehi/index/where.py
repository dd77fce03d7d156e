"""Filters over metadata: a condition in words -> the documents that meet it.

    lang == 'en' and (year >= 2020 or not reviewed)

    condition   comparison | field of bools | not condition | condition and condition
                | condition or condition | (condition)
    comparison  field OP value | value OP field | value OP field OP value
                | field in (value, ...) | field not in (value, ...)
                | field is None | field is not None
    OP          ==  !=  <  <=  >  >=
    field       a name; field['any name'] where Python could not spell it
    value       'text', number, True or False

Python's parser reads a condition and nothing is run: what is not listed above is
refused. A comparison with a missing value is neither true nor false, as in SQL, so
neither `lang == 'en'` nor `lang != 'en'` nor their `not` finds a document without
`lang`; `lang is None` does. Texts compare by their characters: dates such as
'2024-05-31' compare as dates.
"""

import ast
import math
import operator
import sys

import numpy as np

from ehi.index.columns import NUMBER, TEXT, TRUTH

_MOST_CHARACTERS = 100_000
_SHOWN = 30  # characters of a condition in a message
_COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_TURNED = {
    ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE,
    ast.Eq: ast.Eq, ast.NotEq: ast.NotEq,
}  # fmt: skip
_ALLOWED = "allowed are comparisons, in, is None, and, or, not and parentheses"


def compile_condition(text, fields):
    """A function: Metadata -> which of its documents meet the condition, (N,) bool.

    >>> from ehi.index.columns import Metadata
    >>> kept = Metadata.of([{"lang": "en", "year": 2021}, {"lang": "de"}, {"year": 3}])
    >>> compile_condition("lang != 'de' or year < 9", kept.fields)(kept).tolist()
    [True, False, True]

    Args:
        text: the condition.
        fields: field -> kind, those of the index.

    Raises:
        ValueError: it cannot be read, names a field that is not there, or compares
            what cannot be compared; the message shows the place.
    """
    if not isinstance(text, str):
        raise ValueError(f'a filter is a text such as "year >= 2020", got {text!r}')
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(
            f"the filter has {len(text):,} characters, at most {_MOST_CHARACTERS:,} "
            "are read"
        )
    text = text.strip().replace("\r", "\n")  # the parser ends lines at both
    try:
        tree = ast.parse(text, mode="eval")
        test = _Compiler(text, fields).condition(tree.body)
    except SyntaxError as error:
        # Python gives no column where a condition ends too early.
        column = (error.offset or len(text) + 1) - 1
        place = _position(text, error.lineno or 1, column)
        raise _unreadable(text, place, error.msg) from None
    except (RecursionError, MemoryError):
        raise _nested() from None
    except UnicodeEncodeError as error:
        raise ValueError(f"the filter is not valid Unicode: {error}") from None

    def meets(metadata):
        try:
            yes, _ = test(metadata)
        except RecursionError:
            raise _nested() from None
        return yes

    return meets


def _nested():
    return ValueError("the filter is nested too deeply to be read")


def _position(text, line, column):
    """The place of a column of a line in the whole text."""
    before = text.split("\n")[: line - 1]
    return min(sum(map(len, before)) + len(before) + column, len(text))


def _unreadable(text, place, why):
    shown = text[place : place + _SHOWN]
    shown = f"before {shown!r}" if shown else "at its end"
    return ValueError(
        f"the filter {_short(text)!r} cannot be read at character {place + 1}, "
        f"{shown}: {why}"
    )


def _short(text):
    return text if len(text) <= 200 else f"{text[:200]}..."


class _Compiler:
    """Nodes of Python's syntax -> functions: Metadata -> (yes, no), (N,) bool each.

    A document that is in neither has no value to compare.
    """

    def __init__(self, text, fields):
        self.text, self.fields = text, fields

    def condition(self, node):
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(value) for value in node.values]
            return _all(parts) if isinstance(node.op, ast.And) else _any(parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return _not(self.condition(node.operand))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            return _all(
                [
                    self.comparison(node, *sides[i : i + 2], op)
                    for i, op in enumerate(node.ops)
                ]
            )
        name = self.field(node)
        if name is None:
            raise self.refused(node, _ALLOWED)
        if self.fields[name] != TRUTH:
            kind = self.fields[name]
            raise self.refused(node, f"{name} is a {kind}, so compare it with one")
        return _of_column(name, lambda column: column.values == 1)

    def comparison(self, node, left, right, op):
        name = self.field(left)
        if isinstance(op, ast.Is | ast.IsNot):
            return self.missing(node, name, right, op)
        if isinstance(op, ast.In | ast.NotIn):
            return self.membership(node, name, right, op)
        other, kind = self.field(right), type(op)
        if name is not None and other is not None:
            raise self.refused(right, "a field is compared with a value, not a field")
        if name is None and other is None:
            raise self.refused(left, f"no field is compared here; {_ALLOWED}")
        if name is None:
            name, right, kind = other, left, _TURNED[kind]
        value = self.value(right, name)
        return _of_column(name, lambda column: _compared(column, kind, value))

    def missing(self, node, name, right, op):
        none = isinstance(right, ast.Constant) and right.value is None
        if name is None or not none:
            raise self.refused(node, "`is` compares a field with None only")
        absent = isinstance(op, ast.Is)

        def test(metadata):
            known = metadata.columns[name].known
            return (~known, known) if absent else (known, ~known)

        return test

    def membership(self, node, name, right, op):
        if name is None or not isinstance(right, ast.Tuple | ast.List | ast.Set):
            raise self.refused(node, "`in` needs a field, and values in parentheses")
        values = {self.value(each, name) for each in right.elts}
        found = _of_column(name, lambda column: _among(column, values))
        return found if isinstance(op, ast.In) else _not(found)

    def field(self, node):
        """The name of a field, or None if the node is something else."""
        name = None
        if isinstance(node, ast.Name):
            name = node.id
        elif isinstance(node, ast.Subscript):
            inside = node.slice
            called = isinstance(node.value, ast.Name) and node.value.id == "field"
            if called and isinstance(inside, ast.Constant):
                name = inside.value
        if name is None:
            return None
        if name not in self.fields:
            known = ", ".join(f"{name} ({kind})" for name, kind in self.fields.items())
            raise self.refused(
                node, f"there is no field {name!r}; known are {known or 'none'}"
            )
        return name

    def value(self, node, name):
        """The constant of a node, of the kind of a field."""
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            sign, node = -1 if isinstance(node.op, ast.USub) else 1, node.operand
        value = node.value if isinstance(node, ast.Constant) else None
        kinds = {bool: TRUTH, int: NUMBER, float: NUMBER, str: TEXT}
        kind = kinds.get(type(value))
        if isinstance(node, ast.Constant) and value is None:
            raise self.refused(node, f"write `{name} is None` for a missing value")
        if kind is None or (sign < 0 and kind != NUMBER):
            raise self.refused(node, "a value is a text in quotes, a number or a bool")
        if kind != self.fields[name]:
            ours = self.fields[name]
            raise self.refused(node, f"{name} is a {ours}, and {value!r} is a {kind}")
        if kind == TEXT and not _is_unicode(value):
            raise self.refused(node, "this text is not valid Unicode")
        if kind == NUMBER and value > sys.float_info.max:
            value = math.inf  # no column holds a larger number
        if kind == NUMBER and isinstance(value, float) and value.is_integer():
            value = int(value)  # beside a float NumPy rounds int64
        return -value if sign < 0 else value

    def refused(self, node, why):
        line = self.text.split("\n")[node.lineno - 1].encode()
        column = len(line[: node.col_offset].decode())  # it counts bytes
        return _unreadable(self.text, _position(self.text, node.lineno, column), why)


def _is_unicode(text):
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, written as an escape
        return False
    return True


def _not(test):
    return lambda metadata: test(metadata)[::-1]


def _all(tests):
    if len(tests) == 1:
        return tests[0]

    def test(metadata):
        yes, no = zip(*(each(metadata) for each in tests), strict=True)
        return np.logical_and.reduce(yes), np.logical_or.reduce(no)

    return test


def _any(tests):
    return _not(_all([_not(each) for each in tests]))


def _of_column(name, compare):
    def test(metadata):
        column = metadata.columns[name]
        yes, known = compare(column), column.known
        return yes & known, ~yes & known

    return test


def _compared(column, kind, value):
    """Which values of a column are `kind`, as ast.Lt, of a value; any if missing."""
    codes = column.values
    if column.kind != TEXT:
        return _COMPARE[kind](codes, value)
    # Texts ascend with their codes.
    first, behind = column.place(value), column.place(value, after=True)
    return {
        ast.Eq: lambda: (codes >= first) & (codes < behind),
        ast.NotEq: lambda: (codes < first) | (codes >= behind),
        ast.Lt: lambda: codes < first,
        ast.LtE: lambda: codes < behind,
        ast.Gt: lambda: codes >= behind,
        ast.GtE: lambda: codes >= first,
    }[kind]()


def _among(column, values):
    """Which values of a column are among some; any if missing."""
    if column.kind == TEXT:
        places = [(column.place(text), column.place(text, True)) for text in values]
        values = [first for first, behind in places if first < behind]
        return np.isin(column.values, np.array(values, np.uint32))
    if column.values.dtype.kind != "f":  # values beyond int64 are in no column
        values = [int(v) for v in values if abs(v) < 2**63 and int(v) == v]
        return np.isin(column.values, np.array(values, np.int64))
    return np.isin(column.values, np.array([float(v) for v in values]))
