"""Ageing of an index: documents that it was not trained on are added or replace others.

A system is trained on one half of the documents. Its index then gets the other half, or
a part of it in place of as many documents. It is repaired by training on from its own
parameters, for a tenth of the steps, on all documents. The same system trained anew on
all documents stands beside it.

What is added later is unseen: the data set of the first training lacks these documents
and the judgements of them, so no pair, pseudo-query or synthetic query is made of them,
and its queries and index set the search, which stays as it is when documents come. A
learned router is less sure of new topics and then visits more, so each index is also
measured with the search set again, on all train queries: that needs no labels. It is
scored in two ways then. Codes fit the documents that they were trained on better, and a
score that corrects for the fit ranks new documents higher, others the old ones.
"""

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ehi.data.datasets import RetrievalDataset
from ehi.eval.measure import measure
from ehi.eval.metrics import unlabelled_queries
from ehi.eval.records import Cell, Record, read_records, write_records
from ehi.index import Index, build_index
from ehi.model.export import index_arrays
from ehi.train.logs import MetricLog
from experiments.run.checks import check_config, check_corpus
from experiments.run.evaluate import (
    budget_queries,
    record_of,
    search_setting,
)
from experiments.run.prepare import Inputs, embeddings, inputs_of, open_split
from experiments.run.train import Trained, train_system
from experiments.run.workdir import claim, claim_inputs, trained_on, write_config
from experiments.systems import Budget, fit_to_corpus

LOG = logging.getLogger("ehi")

SYSTEMS = ("kmeans-tree-opq", "ehi-pq")
BUDGET = "visit-10-64x"
# Variants: what a system was trained on. RESET are HALF with the search set again.
# Repairs train on from HALF, on all documents: REPAIRED with the labels of the half,
# RELABELLED with those of the others too.
HALF, WHOLE = "half", ""
RESET = {"half-cosine": "cosine", "half-corrected": "corrected"}  # -> score
REPAIRED, RELABELLED = REPAIRS = "half-continued", "half-labels-continued"
# Training -> the variants that are measured of it.
TRAININGS = {HALF: (HALF, *RESET)} | {name: (name,) for name in (*REPAIRS, WHOLE)}
VARIANTS = tuple(itertools.chain(*TRAININGS.values()))
REPAIR_STEPS = 0.1  # of the steps of a training anew
REPLACED = (10, 20, 30, 40, 50)  # percent of the documents of the index
STAGES = ("all", "added", "old", *(f"replaced-{percent}" for percent in REPLACED))


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
    """Every stage: all later documents are added, or some replace as many kept ones.

    The first three have the same index. They ask for everything, for what was added,
    and for what was there before.
    """
    rng, nothing = np.random.default_rng(0), np.zeros(0, np.int64)
    old, new = rng.permutation(kept), rng.permutation(later)
    everything = np.concatenate([kept, later])
    asked = {"all": everything, "added": later, "old": kept}
    found = [Stage(name, nothing, later, rows) for name, rows in asked.items()]
    for name, percent in zip(STAGES[3:], REPLACED, strict=True):
        count = min(round(percent / 100 * len(kept)), len(new))
        present = np.concatenate([old[count:], new[:count]])
        found.append(Stage(name, old[:count], new[:count], asked=present))
    return found


def only(dataset: RetrievalDataset, rows: np.ndarray) -> RetrievalDataset:
    """The same data set with some documents, and the judgements of these."""
    doc_ids = [dataset.doc_ids[row] for row in rows]
    here = set(doc_ids)
    qrels = {}
    for split, asked in dataset.qrels.items():
        known = {
            query: {doc: grade for doc, grade in judged.items() if doc in here}
            for query, judged in asked.items()
        }
        qrels[split] = {
            query: judged
            for query, judged in known.items()
            if any(grade > 0 for grade in judged.values())
        }
    named = "\0".join((dataset.corpus_sha256, *doc_ids))
    return dataclasses.replace(
        dataset,
        documents=[dataset.documents[row] for row in rows.tolist()],
        doc_ids=doc_ids,
        qrels=qrels,
        groups=None if dataset.groups is None else dataset.groups[rows],
        corpus_sha256=hashlib.sha256(named.encode()).hexdigest(),
    )


def age(
    config, workdir: Path, systems: Sequence[str] = SYSTEMS, budget: str = BUDGET
) -> Iterator[tuple[Path, Record]]:
    """Train on half, repair, train on all; evaluate every stage of each.

    Results that are complete in the workdir are reused.

    Args:
      config: the base config.
      workdir: receives a folder for each variant.
      systems: systems with trees and PQ leaves.
      budget: the one budget of all records.

    Yields:
      the folder that has the record, and the record, of split '<split>-<stage>'.
    """
    check_config(config)
    dataset = open_split(config)
    kept, later = halves(dataset)
    half = only(dataset, kept)
    # A system that is repaired sees all documents, and may lack their labels.
    unlabelled = dataclasses.replace(dataset, qrels=half.qrels)
    whole = inputs_of(config, dataset)
    for variant, searches in TRAININGS.items():
        part = {HALF: half, REPAIRED: unlabelled}.get(variant)
        inputs = whole if part is None else inputs_of(config, part)
        own = config.copy_and_resolve_references()
        own.variant, own.systems, own.budgets = variant, tuple(systems), (budget,)
        if variant in REPAIRS:
            own.start_from = str(folder_of(workdir, HALF))
            own.start_from_steps = REPAIR_STEPS
            own = trained_on(own)
        run = _open(own, folder_of(workdir, variant), inputs, whole, kept)
        for name in systems:
            system = _train(run, name)
            for search, stage in itertools.product(searches, stages(kept, later)):
                record = _evaluate(run, name, search, system, stage)
                if record is not None:
                    yield run.folder, record


def folder_of(workdir: Path, variant: str) -> Path:
    """The folder of what was trained for a variant."""
    return workdir / (variant or "whole")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of T6.

    Attributes:
      config: its config, fitted to its corpus.
      folder: of its files.
      inputs: what it is trained on.
      whole: the same data set with all documents and labels.
      kept: rows of the documents that the half has.
      log, trained: as in an `Experiment`.
    """

    config: object
    folder: Path
    inputs: Inputs
    whole: Inputs
    kept: np.ndarray
    log: MetricLog
    trained: dict[str, Trained] = dataclasses.field(default_factory=dict)

    @property
    def budget(self) -> Budget:
        return Budget.parse(self.config.budgets[0])


def _open(config, folder: Path, inputs: Inputs, whole: Inputs, kept) -> Run:
    """Claim the folder of a training for its config and its data."""
    documents = len(inputs.dataset.doc_ids)
    config = fit_to_corpus(config, documents)
    claim(config, folder)
    claim_inputs(inputs, folder, start_from=config.start_from)
    check_corpus(config, documents, inputs.tower_width)
    write_config(config, folder)
    log = MetricLog(folder / "metrics.jsonl")
    return Run(config, folder, inputs, whole, kept, log)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A trained system, and its embeddings of all documents and of their query table.

    The query table of `trained` is that of what it was trained on.
    """

    trained: Trained
    documents: np.ndarray
    queries: np.ndarray


def _train(run: Run, name: str) -> Embedded:
    trained = train_system(
        run.config, name, run.budget.compression, run.inputs, run.folder, run.log,
        run.trained,
    )  # fmt: skip
    outputs = run.folder / "outputs"
    both = embeddings(trained.graphdef, trained.params, run.whole, outputs)
    return Embedded(trained, *both)


def _evaluate(
    run: Run, name: str, variant: str, system: Embedded, stage: Stage
) -> Record | None:
    """Return the record of one stage; None if no query is asked or no search fits."""
    config, dataset, inputs = run.config, run.whole.dataset, run.inputs
    cell = Cell(
        name, variant, dataset.name, f"{config.split}-{stage.name}", config.seed,
        run.budget.name,
    )  # fmt: skip
    path = run.folder / "results.jsonl"
    for record in read_records(path) if path.exists() else ():
        if record.cell == cell:
            return record
    asked = answered_by(dataset, config.split, stage.asked)
    if not asked:
        LOG.warning("%s: no query asks only for these documents", stage.name)
        return None
    index = _index_of(run, system, stage, RESET.get(variant))
    setters, setting = _search(run, index, system.trained.queries, inputs)
    if config.variant == HALF:
        _age(index, dataset, system.documents, stage)
    if variant != HALF:
        setters, setting = _search(run, index, system.queries, run.whole)
    if None in setting.values():
        LOG.warning("%s %s: the smallest search is over the budget", name, stage.name)
        return None
    row_of = {query: row for row, query in enumerate(dataset.query_ids)}
    queries = system.queries[[row_of[query] for query in asked]]
    fields = measure(
        index, queries, list(asked), asked, **setting, tower_width=inputs.tower_width,
        run_path=run.folder / "trec" / f"{cell.stem}.run.gz",
        ignore_identical_ids=run.whole.identical_ids,
        unlabelled=unlabelled_queries(asked, inputs.dataset.qrels.get("train", {})),
    )  # fmt: skip
    fields |= {"budget_queries": setters, "build_seconds": 0.0}
    record = record_of(config, run.whole, system.trained, cell, fields)
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


def _search(run: Run, index: Index, queries, inputs: Inputs) -> tuple[str, dict]:
    """The name of the queries that set the search of an index, and its setting."""
    setters, rows = budget_queries(inputs, run.config.split)
    percent = run.budget.visit
    return setters, search_setting(run.config, index, queries[rows], percent)


def _index_of(run: Run, system: Embedded, stage: Stage, score: str | None) -> Index:
    """The index of the half before the stage, or that of the stage's documents."""
    rows = run.kept
    if run.config.variant != HALF:
        rows = np.concatenate([np.setdiff1d(rows, stage.gone), stage.added])
    arrays = index_arrays(system.trained.graphdef, system.trained.params)
    return build_index(
        system.documents[rows],
        _ids(run.whole.dataset, rows),
        **arrays | ({"score": score} if score else {}),
        spill=run.config.tree.spill,
    )


def _age(index: Index, dataset: RetrievalDataset, documents, stage: Stage) -> None:
    """Delete and add the documents of a stage."""
    index.delete(_ids(dataset, stage.gone))
    index.add(documents[stage.added], _ids(dataset, stage.added))
    index.compact()


def _ids(dataset: RetrievalDataset, rows: np.ndarray) -> list[str]:
    return [dataset.doc_ids[row] for row in rows.tolist()]
