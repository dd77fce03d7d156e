"""The indexes that Faiss or ScaNN build and search."""

from pathlib import Path
from time import monotonic

from ehi.eval.baselines import WITH_LISTS, build_baseline
from experiments.evaluation import Built
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
