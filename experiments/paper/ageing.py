"""T6: rows that were trained on half of the documents, as documents come and go."""

from collections.abc import Mapping, Sequence

import numpy as np

from ehi.eval.records import Cell, Record
from ehi.eval.significance import Comparison, compare_pairs
from ehi.eval.tables import Number, Table, mean_of
from experiments.paper.fill import ALPHA, NOT_RUN
from experiments.run.ageing import (
    BUDGET,
    HALF,
    RELABELLED,
    REPAIRED,
    RESET,
    STAGES,
    VARIANTS,
    WHOLE,
)

# Row: joint system -> the separate one that it is tested against.
RIVALS = {"kmeans-tree-opq": None, "ehi-pq": "kmeans-tree-opq"}
TRAINED_ON = {
    HALF: "half",
    **{variant: f"half, reset, {score}" for variant, score in RESET.items()},
    REPAIRED: "half, repaired",
    RELABELLED: "half, repaired with new labels",
    WHOLE: "all, anew",
}
AGAINST = " minus anew"  # rows of differences, which are tested too
NOTES = (
    "nDCG@10, mean ± sample standard deviation over the seeds, R@100 in parentheses. † "
    "better, ‡ worse than the kmeans-tree-opq of the same kind of row with p < 0.05 "
    "(paired randomisation test over queries, Holm-corrected over the table).",
    "The index holds half of the documents. Then the other half is added to it (all "
    "queries; added: queries whose answers were added; old: those whose answers were "
    "there before), or a part of it replaces 10 to 50% of the documents (all queries "
    "that the index can answer). The added half has no part in training on half: no "
    "pair, pseudo-query or synthetic query is made of it.",
    "Half: its search was set for 10% before documents came, and stayed. Reset, and "
    "all rows below: it is set on each index by all train queries, also those whose "
    "answers are new, without labels. Visited %: what the evaluated queries visit, "
    "over all columns. Cosine and corrected: the same codes, scored so; others are "
    "scored as dev chose for each system.",
    "Repaired: trained on from the parameters of the half for a tenth of the steps, on "
    "all documents with the labels of the half, or with those of the added half too; "
    "then indexed again. kmeans-tree-opq is fitted again to the `dense` that was "
    "repaired so. Anew: trained on all documents and labels, with as many leaves as "
    "they ask for, which may be twice as many.",
    f"Rows '{AGAINST.strip()}' are differences; ‡ there means that the joint index "
    "loses more than the separate one.",
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
    names = [f"{split}-{stage}" for stage in STAGES]
    for r in records:
        if (r.dataset, r.budget) == (dataset, BUDGET) and r.split in names:
            found.setdefault((r.system, r.variant, r.split), []).append(r)
    if not found:
        return None
    kinds = [*VARIANTS, *(variant + AGAINST for variant in VARIANTS[:-1])]
    tests = _tests(dataset, names, kinds, dict(per_query) | _losses(per_query))
    lines = []
    for kind in kinds:
        for system in RIVALS:
            variant, against = kind.removesuffix(AGAINST), kind.endswith(AGAINST)
            rows = [found.get((system, variant, name), []) for name in names]
            anew = [found.get((system, WHOLE, name), []) for name in names]
            if against and not any(map(_both, rows, anew)):
                continue
            label = TRAINED_ON[variant] + AGAINST * against
            cells = [
                _lost(of, other, tests.get((system, kind, name)))
                if against
                else _shown(of, tests.get((system, kind, name)))
                for of, other, name in zip(rows, anew, names, strict=True)
            ]
            visited = mean_of(sum(rows, []), "docs_visited", ".1f", factor=100)
            lines.append((system, label, None if against else visited, *cells))
    title = f"T6: added and replaced documents at {BUDGET}. {dataset}, {split} split"
    header = ("system", "trained on", "visited %", *STAGES)
    return Table(title, header, tuple(lines), NOTES, text_columns=2)


def _losses(per_query: Mapping[Cell, np.ndarray]) -> dict[Cell, np.ndarray]:
    """What the queries of each row lose against training anew, as rows of their own."""
    return {
        cell._replace(variant=cell.variant + AGAINST): values - per_query[anew]
        for cell, values in per_query.items()
        if cell.variant in VARIANTS[:-1]
        and (anew := cell._replace(variant=WHOLE)) in per_query
    }


def _tests(dataset, names, kinds, values) -> dict[tuple[str, str, str], Comparison]:
    """(system, kind of row, split) -> the test against the row's rival."""
    pairs = {
        (system, kind, name): tuple(
            (row, kind, dataset, name, BUDGET) for row in (system, rival)
        )
        for system, rival in RIVALS.items()
        for kind in kinds
        for name in names
        if rival
    }
    tests = compare_pairs(pairs.values(), values)
    return {key: tests[pair] for key, pair in pairs.items() if pair in tests}


def _sign(test: Comparison | None) -> str:
    if test is None or test.p_holm >= ALPHA:
        return ""
    return "†" if test.difference > 0 else "‡"


def _shown(of_row: Sequence[Record], test: Comparison | None):
    if not of_row:
        return NOT_RUN
    values = [record.ndcg_at_10 for record in of_row]
    beside = mean_of(of_row, "recall_at_100", ".3f")
    return Number.mean(values, ".3f", sign=_sign(test), beside=beside)


def _lost(of_row: Sequence[Record], anew: Sequence[Record], test: Comparison | None):
    """The difference from training anew, over the seeds that both have."""
    losses = [
        ours.ndcg_at_10 - theirs.ndcg_at_10 for ours, theirs in _both(of_row, anew)
    ]
    return Number.mean(losses, "+.3f", sign=_sign(test)) if losses else NOT_RUN


def _both(of_row: Sequence[Record], anew: Sequence[Record]):
    """The pairs of records that have the same seed."""
    theirs = {record.seed: record for record in anew}
    return [(record, theirs[record.seed]) for record in of_row if record.seed in theirs]
