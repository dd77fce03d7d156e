"""A trained system -> its index, and one record for each budget."""

import dataclasses
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import numpy as np

from ehi.eval import provenance
from ehi.eval.measure import beam_for_budget, curve, measure, min_prob_for_budget
from ehi.eval.records import Cell, Record
from ehi.index import Index, build_index, open_index, save_index
from ehi.model.pretrained import resolve
from ehi.model.saved import save_tower
from ehi.train.export import index_arrays, query_head_arrays
from experiments.inputs import Inputs, known_pairs
from experiments.systems import Budget
from experiments.training import Trained, run_name

LOG = logging.getLogger("ehi")

# Percent of the documents, or leaves, that a search visits by default.
DEFAULT_PERCENT = 10
# Queries whose leaves say what is probable; in steps, so that all kinds are among them.
CALIBRATION_QUERIES = 2000


@dataclass(frozen=True)
class Built:
    """An index and what it cost."""

    index: Index = field(repr=False)
    path: Path
    seconds: float


def build(config, trained: Trained, inputs: Inputs, path: Path) -> Built:
    """Build and save the index of a trained system, or open the one that is there."""
    if path.exists():
        index = open_index(path)
        # `index` serves the last system of a config, which may have been another.
        if index.encoder["run"] == trained.run:
            return Built(index, path, float(index.config["build_seconds"]))
    identity = identity_of(config, trained, inputs)
    identity |= save_query_tower(inputs, trained.params, path)
    started = monotonic()
    index = build_index(
        trained.documents,
        inputs.dataset.doc_ids,
        **index_arrays(trained.graphdef, trained.params),
        spill=config.tree.spill,
        encoder=identity,
        query_head=query_head_arrays(trained.graphdef, trained.params),
    )
    seconds = monotonic() - started
    index = dataclasses.replace(
        index,
        config={"build_seconds": seconds},
        encoder=identity | _default_search(config, index, trained, inputs),
    )
    save_index(index, path, documents=shown(inputs.dataset))
    drop_old_towers(path, identity)
    return Built(open_index(path), path, seconds)


def evaluate_budget(
    config, built: Built, trained: Trained, inputs: Inputs, name: str, budget: Budget,
    folder: Path,
) -> Record | None:  # fmt: skip
    """The record of one cell; None where the smallest search is over the budget."""
    index, queries = built.index, trained.queries[inputs.eval_rows]
    setting = {"beam": index.num_leaves}
    if budget.visit is not None:
        setting = _setting(config, index, queries, budget.visit)
        if None in setting.values():
            LOG.warning(
                "%s: the smallest search visits more than %s%% of the documents",
                run_name(name, budget.compression), budget.visit,
            )  # fmt: skip
            return None
    cell = Cell(
        name, config.variant, inputs.dataset.name, config.split, config.seed,
        budget.name,
    )  # fmt: skip
    fields = measure(
        index, queries, inputs.eval_ids, inputs.dataset.qrels[config.split],
        **setting, tower_width=inputs.pretrained.config["width"],
        run_path=folder / f"{cell.stem}.run.gz",
    )  # fmt: skip
    return Record(
        **cell._asdict(),
        **fields,
        examples_per_second=trained.examples_per_second,
        train_seconds=trained.seconds,
        build_seconds=built.seconds,
        config_hash=provenance.config_hash(
            json.loads(config.to_json()), without=("systems", "budgets", "seed")
        ),
        recipe=config.recipe,
        git_commit=provenance.git_commit(Path(__file__).parent),
        versions=provenance.versions(),
        hardware=provenance.hardware(),
        corpus_sha256=inputs.dataset.corpus_sha256,
    )


def _setting(config, index, queries, percent: float) -> dict:
    """How an index is searched within a budget; a value is None where that cannot be.

    Faiss and ScaNN know no probabilities: all queries visit as many of their lists.
    """
    if config.tree.adaptive and isinstance(index, Index):
        min_prob = min_prob_for_budget(index, queries, percent)
        return {"beam": index.num_leaves, "min_prob": min_prob}
    return {"beam": beam_for_budget(index, queries, percent)}


def visited_curve(config, built: Built, trained: Trained, inputs: Inputs, split: str):
    """nDCG@10 against documents visited, from one leaf a query to all documents."""
    index, queries = built.index, trained.queries[inputs.eval_rows]
    least = index.count_visited(queries, 1).mean() / index.num_documents
    least = max(least, 1 / index.num_documents)  # the best leaves may all be empty
    settings = [{"beam": 1}] + [
        _setting(config, index, queries, percent)
        for percent in np.geomspace(100 * least, 100, 12)[1:]
    ]
    return curve(index, queries, inputs.eval_ids, inputs.dataset.qrels[split], settings)


def _default_search(config, index, trained: Trained, inputs: Inputs) -> dict:
    """How `experiments.search` searches, found on the queries of training."""
    if not config.tree.adaptive or index.num_leaves == 1:
        leaves = index.num_leaves * DEFAULT_PERCENT / 100
        return {"default_beam": max(1, round(leaves))}
    rows = np.unique(known_pairs(inputs.training.pairs)[0])
    rows = rows[:: -(-len(rows) // CALIBRATION_QUERIES)]
    min_prob = min_prob_for_budget(index, trained.queries[rows], DEFAULT_PERCENT)
    # One leaf may be too much already: then it is the only one.
    min_prob = 1.0 if min_prob is None else min_prob
    return {"default_beam": index.num_leaves, "default_min_prob": min_prob}


def save_query_tower(inputs: Inputs, params: dict, path: Path) -> dict:
    """Save a trained tower beside the index at `path`: what its identity then says."""
    own = any(name.startswith("query_tower/") for name in params)
    group = "query_tower/" if own else "tower/"  # what a searcher needs
    tower = {
        name.removeprefix(group): value
        for name, value in params.items()
        if name.startswith(group)
    }
    if not tower:
        return {}
    made = path.parent / f".{path.name}-tower"
    save_tower(inputs.pretrained, tower, made)
    sha256 = resolve(made).sha256
    # Named after its weights: an index that is there keeps its own, whatever happens.
    folder = path.parent / f"{path.name}-tower-{sha256[:8]}"
    if folder.exists():
        shutil.rmtree(made)
    else:
        os.rename(made, folder)
    # The index names it relative to itself, so that both can be moved together.
    return {"tower": f"../{folder.name}", "tower_sha256": sha256}


def drop_old_towers(path: Path, identity: dict) -> None:
    """Remove the towers of indexes that stood at `path` before the one there now."""
    kept = Path(identity["tower"]).name
    for folder in path.parent.glob(f"{path.name}-tower-*"):
        if folder.name != kept:
            shutil.rmtree(folder)


def identity_of(config, trained: Trained, inputs: Inputs) -> dict:
    """What a searcher must know to embed a query as this index was built."""
    return {
        "tower": config.tower.name,
        "tower_sha256": inputs.pretrained.sha256,
        "query_length": config.tower.query_length,
        "run": trained.run,
    }


def shown(dataset) -> list[dict]:
    """What a searcher is shown of a document: title and first line."""
    return [
        {
            "id": document.id,
            "title": document.title,
            "line": document.text.strip().split("\n", 1)[0][:200],
        }
        for document in dataset.documents
    ]
