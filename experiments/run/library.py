"""A library's index for a budget, with the options that are best on other queries.

All of `ehi.eval.baselines.options` are tried at the budget, on queries of dev, or of
train if dev is evaluated. Each trial is a line of `trials.jsonl` in the workdir.
"""

import json
import logging
from pathlib import Path
from time import monotonic

import numpy as np

from ehi.eval.baselines.build import WITH_LISTS, build_baseline
from ehi.eval.baselines.options import ROUTERS, options_text, trials_of
from ehi.eval.measure import curve
from ehi.files import atomic_write
from experiments.run.evaluate import Built, budget_queries, search_setting, spaced
from experiments.run.prepare import Inputs
from experiments.run.train import Trained, run_name
from experiments.systems import Budget

LOG = logging.getLogger("ehi")


class LibraryBuilds:
    """The indexes of one library and compression, each built once.

    Args:
      config: the experiment.
      name, compression: the system and the compression of its codes, or None.
      parent: the system whose embeddings are indexed.
      inputs: from `load_inputs`.
      workdir: receives `trials.jsonl`.
    """

    def __init__(
        self, config, name: str, compression: int | None, parent: Trained,
        inputs: Inputs, workdir: Path,
    ):  # fmt: skip
        self._config, self._name, self._compression = config, name, compression
        self._parent, self._inputs = parent, inputs
        self._path = workdir / "trials.jsonl"
        self._built: dict[tuple, Built] = {}

    def best_for(self, budget: Budget) -> Built:
        """Return the index whose options are best at a budget."""
        lists = lists_of(self._config, self._name, budget)
        trials = trials_of(self._name, num_leaves=lists)
        split, rows = choice_queries(self._inputs, self._config.split)
        if len(trials) == 1 or not len(rows):
            return self._build(lists, trials[0])
        values = [self._value(budget, lists, t, split, rows) for t in trials]
        best = int(np.argmax(values))
        self._write(budget, split, trials, values, best)
        LOG.info(
            "%s %s: %s, the best of %d trials on %s",
            run_name(self._name, self._compression), budget.name,
            options_text(trials[best]), len(trials), split,
        )  # fmt: skip
        return self._build(lists, trials[best])

    def _value(self, budget, lists, options, split, rows) -> float:
        """nDCG@10 of one trial; -1 if its smallest search is over the budget."""
        index, inputs, config = (
            self._build(lists, options).index,
            self._inputs,
            self._config,
        )
        setting = {"beam": index.num_leaves}
        if budget.visit is not None:
            setters = self._parent.queries[budget_queries(inputs, config.split)[1]]
            setting = search_setting(config, index, setters, budget.visit)
            if None in setting.values():
                return -1.0
        dataset = inputs.dataset
        ids = [dataset.query_ids[row] for row in rows]
        qrels = {name: dataset.qrels[split][name] for name in ids}
        ignored = dataset.identical_ids(split, config.ignore_identical_ids)
        ((_, value),) = curve(
            index, self._parent.queries[rows], ids, qrels, [setting],
            ignore_identical_ids=ignored,
        )  # fmt: skip
        return value

    def _build(self, lists, options) -> Built:
        key = (lists, *options.items())
        if key not in self._built:
            code_bytes = None
            if self._compression is not None:
                code_bytes = 4 * self._inputs.code_width // self._compression
            queries = None
            if self._name in ROUTERS:
                rows = router_queries(self._inputs, self._config.split)
                queries = self._parent.queries[rows]
            started = monotonic()
            index = build_baseline(
                self._name, self._parent.documents, options=options, queries=queries,
                num_leaves=lists, code_bytes=code_bytes, seed=self._config.seed,
                doc_ids=self._inputs.dataset.doc_ids,
            )  # fmt: skip
            self._built[key] = Built(index, Path(), monotonic() - started)
        return self._built[key]

    def _write(self, budget, split, trials, values, best) -> None:
        """Add the trials of a budget to the file; those of an earlier run go."""
        cell = {
            "system": self._name, "variant": self._config.variant,
            "dataset": self._inputs.dataset.name, "seed": self._config.seed,
            "budget": budget.name,
        }  # fmt: skip
        lines = [
            cell
            | {"queries": split, "options": options_text(options)}
            | {"ndcg@10": round(value, 6), "kept": number == best}
            for number, (options, value) in enumerate(zip(trials, values, strict=True))
        ]
        replace_lines(self._path, cell, lines)


def replace_lines(path: Path, cell: dict, lines: list[dict]) -> None:
    """Write the trials of a cell into a file; those of an earlier run go.

    Args:
      path: a JSON object on each line.
      cell: what the old and the new lines of the cell have in common.
      lines: the new ones.
    """
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in map(json.loads, old) if not cell.items() <= line.items()]
    text = "".join(json.dumps(line) + "\n" for line in (*kept, *lines))
    atomic_write(path, text.encode())


def choice_queries(inputs: Inputs, split: str) -> tuple[str, np.ndarray]:
    """Return the split and the rows of the queries that choose a library's options.

    They are those of dev, or of train if dev is evaluated or does not exist; without
    either there are none.
    """
    dataset = inputs.dataset
    row_of = {name: row for row, name in enumerate(dataset.query_ids)}
    for other in ("dev", "train"):
        if other != split and dataset.qrels.get(other):
            rows = np.array([row_of[name] for name in dataset.qrels[other]], np.int64)
            return other, spaced(rows)
    return "", np.zeros(0, np.int64)


def router_queries(inputs: Inputs, split: str) -> np.ndarray:
    """Return the rows of the training queries that a linear router learns from.

    Those that set its budget or choose its options are left out: their probabilities
    would be surer than those of new queries.
    """
    pairs = inputs.training.pairs
    rows = np.union1d(pairs["labelled"][0], pairs["pseudo"][0])
    for held in (budget_queries(inputs, split)[1], choice_queries(inputs, split)[1]):
        rows = np.setdiff1d(rows, held)
    return rows


def lists_of(config, name: str, budget: Budget) -> int | None:
    """Return the number of lists of a library's index: that of our leaves, or None.

    ScaNN has none where every document is scored.
    """
    asks_all = budget.visit is None and budget.compression is not None
    if name not in WITH_LISTS or (name == "scann" and asks_all):
        return None
    return config.tree.branching**config.tree.height
