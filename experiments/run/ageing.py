"""Ageing of an index: documents that it was not trained on are added or replace others.

A system is trained on one half of the documents. Its index then gets the other half, or
a part of it in place of as many documents. The same system trained on all documents
stands beside it: they are unlabelled there too, but training has seen them.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ehi.data.datasets import RetrievalDataset
from ehi.eval.measure import measure
from ehi.eval.metrics import unlabelled_queries
from ehi.eval.records import Cell, Record, read_records, write_records
from ehi.index import Index
from ehi.train.logs import MetricLog
from experiments.run.checks import check_config, check_corpus
from experiments.run.evaluate import (
    budget_queries,
    in_memory,
    record_of,
    search_setting,
)
from experiments.run.prepare import embeddings, inputs_of, open_split
from experiments.run.train import Trained, train_system
from experiments.run.workdir import claim, claim_inputs, write_config
from experiments.systems import Budget, fit_to_corpus

LOG = logging.getLogger("ehi")

SYSTEMS = ("kmeans-tree-opq", "ehi-pq")
BUDGET = "visit-10-64x"
HALF, WHOLE = "half", ""  # variants: what a system was trained on
REPLACED = (10, 20, 30, 40, 50)  # percent of the documents of the index
STAGES = ("added", *(f"replaced-{percent}" for percent in REPLACED))


@dataclasses.dataclass(frozen=True)
class Stage:
    """The documents of an index at one moment, and whose queries are asked.

    Attributes:
      name: one of `STAGES`; the split of its records ends with it.
      gone, added: rows of documents that were deleted from, and added to, the half.
      asked: rows of documents; queries with all their answers among them are asked.
    """

    name: str
    gone: np.ndarray
    added: np.ndarray
    asked: np.ndarray


def halves(dataset: RetrievalDataset) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the documents to train on, and rows of those that come later.

    The halves are the same for every seed, and divide no group of documents.
    """
    num = len(dataset.doc_ids)
    groups = np.arange(num) if dataset.groups is None else dataset.groups
    names, sizes = np.unique(groups, return_counts=True)
    order = np.random.default_rng(0).permutation(len(names))
    first = order[np.cumsum(sizes[order]) <= num / 2]
    mine = np.isin(groups, names[first])
    return np.flatnonzero(mine), np.flatnonzero(~mine)


def stages(kept: np.ndarray, later: np.ndarray) -> list[Stage]:
    """Every stage: all later documents are added, or some replace as many kept ones."""
    rng, nothing = np.random.default_rng(0), np.zeros(0, np.int64)
    old, new = rng.permutation(kept), rng.permutation(later)
    found = [Stage(STAGES[0], nothing, later, asked=later)]
    for name, percent in zip(STAGES[1:], REPLACED, strict=True):
        count = min(round(percent / 100 * len(kept)), len(new))
        present = np.concatenate([old[count:], new[:count]])
        found.append(Stage(name, old[:count], new[:count], asked=present))
    return found


def only(dataset: RetrievalDataset, rows: np.ndarray) -> RetrievalDataset:
    """The same data set with some documents, and the train judgements of these."""
    doc_ids = [dataset.doc_ids[row] for row in rows]
    here = set(doc_ids)
    train = {
        query: {doc: grade for doc, grade in judged.items() if doc in here}
        for query, judged in dataset.qrels.get("train", {}).items()
    }
    answered = {
        query: judged
        for query, judged in train.items()
        if any(grade > 0 for grade in judged.values())
    }
    return dataclasses.replace(
        dataset,
        documents=[dataset.documents[row] for row in rows.tolist()],
        doc_ids=doc_ids,
        qrels=dataset.qrels | ({"train": answered} if train else {}),
        groups=None if dataset.groups is None else dataset.groups[rows],
    )


def age(
    config, workdir: Path, systems: Sequence[str] = SYSTEMS, budget: str = BUDGET
) -> Iterator[tuple[Path, Record]]:
    """Train on half and on all, then evaluate every stage.

    Results that are complete in the workdir are reused.

    Args:
      config: the base config.
      workdir: receives a folder for each half.
      systems: systems with trees and PQ leaves.
      budget: the one budget of all records.

    Yields:
      the folder that has the record, and the record, of split '<split>-<stage>'.
    """
    check_config(config)
    limits = Budget.parse(budget)
    dataset = open_split(config)
    whole = inputs_of(config, dataset)
    kept, later = halves(dataset)
    for variant in (HALF, WHOLE):
        folder = workdir / (variant or "whole")
        inputs = whole if variant == WHOLE else inputs_of(config, only(dataset, kept))
        own = fit_to_corpus(config, len(inputs.dataset.doc_ids))
        own.variant, own.systems, own.budgets = variant, tuple(systems), (budget,)
        claim(own, folder)
        claim_inputs(inputs, folder)
        check_corpus(own, len(inputs.dataset.doc_ids), inputs.tower_width)
        write_config(own, folder)
        log, trained = MetricLog(folder / "metrics.jsonl"), {}
        for name in systems:
            system = train_system(
                own, name, limits.compression, inputs, folder, log, trained
            )
            outputs = folder / "outputs"
            vectors, _ = embeddings(system.graphdef, system.params, whole, outputs)
            for stage in stages(kept, later):
                record = _evaluate(
                    own, name, limits, system, inputs, whole, vectors, kept, stage,
                    folder,
                )  # fmt: skip
                if record is not None:
                    yield folder, record


def _evaluate(
    config, name, limits, trained, inputs, whole, vectors, kept, stage, folder
) -> Record | None:
    """Return the record of one stage; None if no query is asked or no search fits."""
    dataset = whole.dataset
    cell = Cell(
        name, config.variant, dataset.name, f"{config.split}-{stage.name}",
        config.seed, limits.name,
    )  # fmt: skip
    path = folder / "results.jsonl"
    for record in read_records(path) if path.exists() else ():
        if record.cell == cell:
            return record
    asked = answered_by(dataset, config.split, stage.asked)
    if not asked:
        LOG.warning("%s: no query asks only for these documents", stage.name)
        return None
    index = _index_at(config, trained, dataset, vectors, kept, stage)
    setters, rows = budget_queries(inputs, config.split)
    setting = search_setting(config, index, trained.queries[rows], limits.visit)
    if None in setting.values():
        LOG.warning("%s %s: the smallest search is over the budget", name, stage.name)
        return None
    row_of = {query: row for row, query in enumerate(dataset.query_ids)}
    queries = trained.queries[[row_of[query] for query in asked]]
    known = inputs.dataset.qrels.get("train", {})
    fields = measure(
        index, queries, list(asked), asked, **setting, tower_width=inputs.tower_width,
        run_path=folder / "trec" / f"{cell.stem}.run.gz",
        ignore_identical_ids=whole.identical_ids,
        unlabelled=unlabelled_queries(asked, known),
    )  # fmt: skip
    fields |= {"budget_queries": setters, "build_seconds": 0.0}
    record = record_of(config, whole, trained, cell, fields)
    write_records(path, [record])
    return record


def answered_by(
    dataset: RetrievalDataset, split: str, rows: np.ndarray
) -> dict[str, dict[str, int]]:
    """The judgements of the queries whose relevant documents are all among some."""
    here = {dataset.doc_ids[row] for row in rows.tolist()}
    found = {}
    for query, judged in dataset.judgements(split).items():
        relevant = [doc for doc, grade in judged.items() if grade > 0]
        if relevant and here.issuperset(relevant):
            found[query] = judged
    return found


def _index_at(
    config, trained: Trained, dataset: RetrievalDataset, vectors, kept, stage: Stage
) -> Index:
    """The index at a stage: an old one with additions, or one of its documents."""

    def ids(rows: np.ndarray) -> list[str]:
        return [dataset.doc_ids[row] for row in rows.tolist()]

    rows = kept
    if config.variant == WHOLE:
        rows = np.concatenate([np.setdiff1d(kept, stage.gone), stage.added])
    first = dataclasses.replace(trained, documents=vectors[rows], leaves=None)
    index = in_memory(config, first, ids(rows))
    if config.variant == HALF:
        index.delete(ids(stage.gone))
        index.add(vectors[stage.added], ids(stage.added))
        index.compact()
    return index
