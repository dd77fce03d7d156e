"""What a table lacks: cells that were not run, and records of an older recipe."""

from experiments.paper.contest import older_rows
from experiments.paper.definitions import PaperTable, budgets_of, cells, rows_of
from experiments.paper.results import SCORED, Results, recipes_of

SEEDS = 3


def missing(table: PaperTable, results: Results) -> str | None:
    """Return a line on the cells that were not run, with the command that runs them."""
    wanted = cells(table)
    seeds = [len(results.records.get(cell, ())) for cell in wanted]
    absent, fewer = seeds.count(0), sum(0 < n < SEEDS for n in seeds)
    if not absent and not fewer:
        return None
    what = [f"{absent} of {len(wanted)} cells not run"] * bool(absent)
    what += [f"{fewer} with fewer than {SEEDS} seeds"] * bool(fewer)
    usual = results.split in ("test", table.split)
    split = "" if usual else f" --split={results.split}"
    return _rows_without_records(table, results) + (
        f"{', '.join(what)}; to make them: `python -m experiments.reproduce "
        f"--table={table.name} --dataset={_dataset_argument(results.dataset)} "
        f"--seeds={SEEDS}{split} --workdir=DIR`"
    )


def _rows_without_records(table: PaperTable, results: Results) -> str:
    """'Not run: NAMES. ' for the rows that the table leaves out, or ''."""
    names = [
        row.label
        for row in rows_of(table)
        if not any(results.of(row, b) for b in budgets_of(table, row).values())
    ]
    return f"Not run: {', '.join(names)}. " if names else ""


def aged(table: PaperTable, results: Results) -> str | None:
    """Return a line on records of recipes before `SCORED`, and on choices of test.

    None if the table has neither.
    """
    found = [r for cell in cells(table) for r in results.records.get(cell, ())]
    old = [record for record in found if record.recipe < SCORED]
    of_test = "These records are of test; choices are made on dev"
    lines = (
        [of_test] if found and (results.split, table.split) == ("test", "dev") else []
    )
    how = "set budgets on the evaluated queries and scored codes by inner product"
    if old and older_rows(table, results):
        lines.append(
            f"Rows of ({recipes_of(old)}) wait to be made again: they {how}, and are "
            "not compared with the others"
        )
    elif old:
        lines.append(f"All of it is of {recipes_of(old)}, which {how}")
    return ". ".join(lines) or None


def _dataset_argument(name: str) -> str:
    """Return the --dataset argument for the name of a data set in records."""
    if name == "pydocs":
        return name
    # Reading the list of public sets loads tensorflow_datasets.
    from ehi.data.download import public_sets

    return f"beir/{name}" if name in public_sets() else f"PATH/{name}"
