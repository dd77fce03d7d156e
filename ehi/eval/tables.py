"""One table as Markdown, CSV and LaTeX, and how its cells are made of records."""

import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ehi.eval.records import Record
from ehi.eval.significance import Comparison


@dataclass(frozen=True)
class Number:
    """A number, or the mean of several with their sample standard deviation.

    Attributes:
        value: the number or the mean.
        deviation: sample standard deviation of several numbers; None for one.
        spec: format of both, such as '.4f'.
        floor: a smaller value is shown as '<floor', as p-values are; CSV has the value.
        style: '', 'bold' or 'italic'.
        sign: marks after the number, such as '†'.
        beside: another number, shown behind the sign in parentheses.
    """

    value: float
    deviation: float | None = None
    spec: str = ".4f"
    floor: float | None = None
    style: str = ""
    sign: str = ""
    beside: "Number | None" = None

    @classmethod
    def mean(cls, values: Sequence[float], spec: str = ".4f", **marks) -> "Number":
        """The mean; several values also have a sample standard deviation."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), deviation, spec, **marks)

    def __str__(self) -> str:
        """'0.6451', '0.6451 ± 0.0010' or '<0.001': without style, sign and beside."""
        if self.floor is not None and self.value < self.floor:
            return f"<{self.floor:g}"
        text = format(self.value, self.spec)
        if self.deviation is None:
            return text
        # '+' asks for the sign of the mean; a deviation has none.
        return f"{text} ± {format(self.deviation, self.spec.lstrip('+'))}"


# None means that a column does not apply to a row; it is shown as '-'.
Value = str | Number | None


@dataclass(frozen=True)
class Table:
    """A table that all formats can show. In `notes`, code is between backticks."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()
    text_columns: int = 1  # the first columns, which are left-aligned

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"{self.title}: row {row[0]!r} has {len(row)} cells, the header "
                    f"has {len(self.header)}"
                )


def text(value: Value) -> str:
    """A cell as plain text, '-' for None."""
    return "-" if value is None else str(value)


def mean_of(
    records: Sequence[Record],
    field: str,
    spec: str = ".4f",
    *,
    factor: float = 1,
    deviation: bool = False,
) -> Number | None:
    """Mean of a field over records; None if there is no record or one has no value.

    Args:
        records: of one row, usually one a seed.
        field: of `Record`.
        spec: format of the number.
        factor: multiplies the values, such as 100 for percent.
        deviation: also show the sample standard deviation.
    """
    values = [getattr(record, field) for record in records]
    if not values or None in values:
        return None
    number = Number.mean([factor * value for value in values], spec)
    return number if deviation else dataclasses.replace(number, deviation=None)


def tested(comparison: Comparison | None) -> tuple[Value, Value, Value]:
    """Difference, sign of each seed ('-', '0' or '+'), and corrected p-value."""
    if comparison is None:
        return None, None, None
    signs = "".join("-0+"[sign + 1] for sign in comparison.signs)
    p_value = Number(comparison.p_holm, spec=".3f", floor=0.001)
    return Number(comparison.difference, spec="+.4f"), signs, p_value


def means_only(table: Table, spec: str) -> Table:
    """The same table with means alone; `spec` formats its numbers."""
    rows = tuple(
        tuple(
            dataclasses.replace(cell, deviation=None, spec=spec, beside=None)
            if isinstance(cell, Number)
            else cell
            for cell in row
        )
        for row in table.rows
    )
    return dataclasses.replace(table, rows=rows)


def markdown(table: Table) -> str:
    """GitHub Markdown: the table and a bullet for each note, without the title."""
    stars = {"": "", "bold": "**", "italic": "*"}

    def shown(cell: Value) -> str:
        if not isinstance(cell, Number):
            return text(cell).replace("|", r"\|")
        star = stars[cell.style]
        return f"{star}{cell}{star}{cell.sign}{_beside(cell)}"

    left = table.text_columns
    rule = [":--" if i < left else "--:" for i in range(len(table.header))]
    lines = [table.header, rule, *([shown(c) for c in row] for row in table.rows)]
    shown_table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"{shown_table}\n\n{notes}" if notes else shown_table


def _beside(number: Number) -> str:
    return "" if number.beside is None else f" ({number.beside})"


def columns(table: Table, names: Iterable[str], title: str) -> Table:
    """The same table with some of its columns; rows with nothing in them go.

    The first `text_columns` columns, which name a row, do not count as something.

    Args:
        table: the whole table.
        names: of columns; those that the table lacks are left out.
        title: of the new table.
    """
    kept = [table.header.index(name) for name in names if name in table.header]
    rows = (tuple(row[i] for i in kept) for row in table.rows)
    left = table.text_columns
    return dataclasses.replace(
        table,
        title=title,
        header=tuple(table.header[i] for i in kept),
        rows=tuple(row for row in rows if any(v is not None for v in row[left:])),
    )


def without_empty(table: Table, columns: Iterable[str]) -> Table:
    """The same table without those of some columns that have no value in any row."""
    kept = [
        i
        for i, name in enumerate(table.header)
        if name not in columns or any(row[i] is not None for row in table.rows)
    ]
    return dataclasses.replace(
        table,
        header=tuple(table.header[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in table.rows),
    )


def to_csv(table: Table) -> str:
    """CSV with six digits. Deviations have their own columns, '<column> sd'.

    A cell that does not apply is empty.
    """
    spread = [
        any(isinstance(c, Number) and c.deviation is not None for c in column)
        for column in ([row[i] for row in table.rows] for i in range(len(table.header)))
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = ([n, f"{n} sd"] if s else [n] for n, s in _zip(table.header, spread))
    writer.writerow(sum(names, []))
    for row in table.rows:
        cells = []
        for cell, has_spread in _zip(row, spread):
            number = isinstance(cell, Number)
            cells.append(_digits(cell.value) if number else cell or "")
            if has_spread:
                cells.append(_digits(cell.deviation) if number else "")
        writer.writerow(cells)
    return buffer.getvalue()


def latex(table: Table) -> str:
    r"""A LaTeX table; needs `\usepackage{booktabs}`."""
    left = table.text_columns
    columns = "".join("l" if i < left else "r" for i in range(len(table.header)))
    lines = [" & ".join(_escaped(name) for name in table.header)]
    lines += [" & ".join(map(_latex_cell, row)) for row in table.rows]
    head, *body = (rf"{line} \\" for line in lines)
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\small",
            rf"\caption{{{_escaped(table.title)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\smallskip{{\footnotesize {_code(n)}}}" for n in table.notes),
            r"\end{table}",
            "",
        ]
    )


def _latex_cell(cell: Value) -> str:
    if not isinstance(cell, Number):
        return "--" if cell is None else _escaped(cell)
    number = str(cell).replace("±", r"\pm").replace("%", r"\%")
    # Bold mathematics needs another package, so only the signs are mathematics.
    number = re.sub(r"(\\pm|[-+<])", r"$\1$", number)
    macro = {"": "{}", "bold": r"\textbf{{{}}}", "italic": r"\emph{{{}}}"}[cell.style]
    return macro.format(number) + _escaped(cell.sign + _beside(cell))


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "§": r"$^\S$",
    "¶": r"$^\P$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _escaped(plain: str) -> str:
    escaped = "".join(_SPECIAL.get(character, character) for character in plain)
    # LaTeX shows two hyphens, as of an option, as one dash.
    return escaped.replace("--", "-{}-").replace("–", "--")


def _code(note: str) -> str:
    parts = [_escaped(part) for part in note.split("`")]
    parts[1::2] = [rf"\texttt{{{part}}}" for part in parts[1::2]]
    return "".join(parts)


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _zip(*sequences):
    return zip(*sequences, strict=True)
