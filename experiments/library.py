"""The cells of systems that Faiss or ScaNN build and search."""

from pathlib import Path
from time import monotonic

from ehi.eval.baselines import WITH_LISTS, build_baseline
from ehi.eval.measure import beam_for_budget, measure
from ehi.eval.records import Record
from experiments.evaluation import Built, cell_of, over_budget, record_of
from experiments.inputs import Inputs
from experiments.systems import Budget
from experiments.training import Trained


def build_library(
    config, name: str, budget: Budget, parent: Trained, inputs: Inputs
) -> Built:
    """Build a library's index of the parent's embeddings, in memory.

    It gets as many lists as our trees have leaves, and as many bytes as our codes.
    """
    code_bytes = None
    if budget.compression is not None:
        code_bytes = 4 * inputs.pretrained.config["width"] // budget.compression
    started = monotonic()
    index = build_baseline(
        name, parent.documents, doc_ids=inputs.dataset.doc_ids,
        num_leaves=lists_of(config, name, budget),
        code_bytes=code_bytes, seed=config.seed,
    )  # fmt: skip
    return Built(index, Path(), monotonic() - started)


def lists_of(config, name: str, budget: Budget) -> int | None:
    """Inverted lists of a library's index; None for one without lists."""
    asks_all = budget.visit is None and budget.compression is not None
    if name not in WITH_LISTS or (name == "scann" and asks_all):
        return None
    return config.tree.branching**config.tree.height


def evaluate_library(
    config, built: Built, parent: Trained, inputs: Inputs, name: str, budget: Budget,
    folder: Path,
) -> Record | None:  # fmt: skip
    """The record of one cell; None where the smallest search is over the budget."""
    index, queries = built.index, parent.queries[inputs.eval_rows]
    beam = index.num_leaves
    if budget.visit is not None:
        beam = beam_for_budget(index, queries, budget.visit)
        if beam is None:
            return over_budget(name, budget)
    cell = cell_of(config, inputs, name, budget)
    fields = measure(
        index, queries, inputs.eval_ids, inputs.dataset.qrels[config.split],
        beam=beam, tower_width=inputs.pretrained.config["width"],
        run_path=folder / f"{cell.stem}.run.gz",
    )  # fmt: skip
    return record_of(config, inputs, cell, fields, parent.seconds, built.seconds)
