"""T6: rows that were trained on half of the documents, as documents come and go."""

from collections.abc import Mapping, Sequence

import numpy as np

from ehi.eval.records import Cell, Record
from ehi.eval.significance import compare_pairs
from ehi.eval.tables import Number, Table, mean_of
from experiments.paper.fill import ALPHA, NOT_RUN
from experiments.run.ageing import BUDGET, HALF, STAGES, WHOLE

# Row: joint system -> the separate one that it is tested against.
RIVALS = {"kmeans-tree-opq": None, "ehi-pq": "kmeans-tree-opq"}
TRAINED_ON = {HALF: "half", WHOLE: "all documents"}
NOTES = (
    "nDCG@10, mean ± sample standard deviation over the seeds, R@100 in parentheses. † "
    "better, ‡ worse than kmeans-tree-opq trained on the same documents with p < 0.05 "
    "(paired randomisation test over queries, Holm-corrected over the table).",
    "Trained on half: the index holds half of the documents, and the other half is "
    "added to it (added: queries whose answers were added), or a part of it replaces "
    "10 to 50% of the documents (all queries that the index can answer). Trained on "
    "all documents: training has seen the same ones, without labels of these queries.",
)


def ageing_table(
    dataset: str,
    split: str,
    records: Sequence[Record],
    per_query: Mapping[Cell, np.ndarray],
) -> Table | None:
    """T6 of one dataset, or None if it has no such records.

    Args:
      dataset, split: whose records are shown.
      records: of any table.
      per_query: cell -> (N,) values of the same N queries in the same order.
    """
    found: dict[tuple[str, str, str], list[Record]] = {}
    names = {f"{split}-{stage}": stage for stage in STAGES}
    for r in records:
        if (r.dataset, r.budget) == (dataset, BUDGET) and r.split in names:
            found.setdefault((r.system, r.variant, r.split), []).append(r)
    if not found:
        return None
    rows = [(system, variant) for variant in TRAINED_ON for system in RIVALS]
    pairs = {
        (system, variant, name): tuple(
            (row, variant, dataset, name, BUDGET) for row in (system, RIVALS[system])
        )
        for system, variant in rows
        for name in names
        if RIVALS[system]
    }
    tests = compare_pairs(pairs.values(), per_query)

    def cell(system: str, variant: str, name: str):
        of_row = found.get((system, variant, name))
        if not of_row:
            return NOT_RUN
        test = tests.get(pairs.get((system, variant, name)))
        sign = ""
        if test is not None and test.p_holm < ALPHA:
            sign = "†" if test.difference > 0 else "‡"
        values = [record.ndcg_at_10 for record in of_row]
        beside = mean_of(of_row, "recall_at_100", ".3f")
        return Number.mean(values, ".3f", sign=sign, beside=beside)

    lines = [
        (system, TRAINED_ON[variant], *(cell(system, variant, name) for name in names))
        for system, variant in rows
    ]
    title = f"T6: added and replaced documents at {BUDGET}. {dataset}, {split} split"
    header = ("system", "trained on", *STAGES)
    return Table(title, header, tuple(lines), NOTES, text_columns=2)
