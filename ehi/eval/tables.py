"""One table as Markdown, CSV and LaTeX."""

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Number:
    """A number, or the mean of several with their sample standard deviation.

    Attributes:
      value: the number or mean.
      deviation: of several; None of one.
      spec: format of both, such as '.4f'.
      floor: a smaller value is shown as '<floor', as p-values are; CSV has the value.
      style: '', 'bold' or 'italic'.
      sign: what follows: '', '†' or '‡'.
    """

    value: float
    deviation: float | None = None
    spec: str = ".4f"
    floor: float | None = None
    style: str = ""
    sign: str = ""

    @classmethod
    def mean(cls, values: Sequence[float], spec: str = ".4f", **marks) -> "Number":
        """Mean and, of several values, their sample standard deviation."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), deviation, spec, **marks)

    def __str__(self) -> str:
        """'0.6451', '0.6451 ± 0.0010' or '<0.001', without style and sign."""
        if self.floor is not None and self.value < self.floor:
            return f"<{self.floor:g}"
        text = format(self.value, self.spec)
        if self.deviation is None:
            return text
        # A deviation has no sign, whatever the mean is shown with.
        return f"{text} ± {format(self.deviation, self.spec.lstrip('+'))}"


# None is what does not apply to a row; it is shown as '-'.
Value = str | Number | None


@dataclass(frozen=True)
class Table:
    """What is shown, whatever the format; code in `notes` stands between backticks."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()
    text_columns: int = 1  # the first ones are left-aligned

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"{self.title}: row {row[0]!r} has {len(row)} cells, the header "
                    f"has {len(self.header)}"
                )


def means_only(table: Table, spec: str) -> Table:
    """The table without deviations, its numbers in another format."""
    rows = tuple(
        tuple(
            dataclasses.replace(cell, deviation=None, spec=spec)
            if isinstance(cell, Number)
            else cell
            for cell in row
        )
        for row in table.rows
    )
    return dataclasses.replace(table, rows=rows)


def markdown(table: Table) -> str:
    """GitHub Markdown: the table and a bullet for each note; the title is left out."""
    stars = {"": "", "bold": "**", "italic": "*"}

    def shown(cell: Value) -> str:
        if not isinstance(cell, Number):
            return "-" if cell is None else cell.replace("|", r"\|")
        star = stars[cell.style]
        return f"{star}{cell}{star}{cell.sign}"

    left = table.text_columns
    rule = [":--" if i < left else "--:" for i in range(len(table.header))]
    lines = [table.header, rule, *([shown(c) for c in row] for row in table.rows)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"{text}\n\n{notes}" if notes else text


def to_csv(table: Table) -> str:
    """CSV to six digits; deviations in a column of their own, '<column> sd'.

    What does not apply is empty.
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
    text = str(cell).replace("±", r"\pm").replace("%", r"\%")
    # Bold mathematics would need a package: the number is text, its signs are not.
    text = re.sub(r"(\\pm|[-+<])", r"$\1$", text)
    macro = {"": "{}", "bold": r"\textbf{{{}}}", "italic": r"\emph{{{}}}"}[cell.style]
    return macro.format(text) + _escaped(cell.sign)


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _escaped(text: str) -> str:
    escaped = "".join(_SPECIAL.get(character, character) for character in text)
    # Two hyphens of an option would become one dash.
    return escaped.replace("--", "-{}-")


def _code(note: str) -> str:
    parts = [_escaped(part) for part in note.split("`")]
    parts[1::2] = [rf"\texttt{{{part}}}" for part in parts[1::2]]
    return "".join(parts)


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _zip(*sequences):
    return zip(*sequences, strict=True)
