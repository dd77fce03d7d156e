"""The inputs of a config of vectors: no tower, no tokens, no text.

The given vectors, mapped to unit vectors by their metric, stand where tower outputs
stand in a config of texts. So every system, phase and index is the same.
"""

import functools
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ehi.data.download import search_folders
from ehi.data.rows import Rows
from ehi.data.vectors.containers import open_container
from ehi.data.vectors.dataset import VectorDataset, open_vectors
from ehi.data.vectors.metric import Metric, reduced_width
from ehi.data.vectors.pairs import MappedRows, query_table, vector_pairs
from ehi.train.batch import TrainingSet
from experiments.run.prepare import Inputs

LOG = logging.getLogger("ehi")


@dataclass(frozen=True)
class VectorInputs(Inputs):
    """`Inputs` whose tower outputs were given.

    Attributes:
      maps: of the metric, to unit vectors.
      pseudo: document rows that are labelled by their neighbours.
    """

    maps: Metric = field(kw_only=True)
    pseudo: np.ndarray = field(kw_only=True, repr=False)

    @property
    def tower(self):
        raise ValueError("a config of vectors has no tower to train or to run")

    @property
    def tower_width(self) -> int:
        return self.maps.width

    @property
    def code_width(self) -> int:
        return self.dataset.vectors.shape[1]

    @property
    def tower_name(self) -> str:
        return f"metric={self.maps.name!r} of width {self.code_width}"

    @property
    def tower_sha256(self) -> str:
        return f"vectors, {self.maps.name}, {self.code_width}"

    @property
    def tower_settings(self) -> dict:
        return {}

    @property
    def source_keys(self) -> tuple[str, ...]:
        return self.tower_sha256, self.dataset.source.get("queries", "")

    @functools.cached_property
    def document_features(self) -> np.ndarray | Rows:
        """Documents as unit vectors (documents, T), memory-mapped or made when read."""
        given, maps = self.dataset.vectors, self.maps
        untouched = maps.name == "cosine" and self.dataset.unit
        if untouched and isinstance(given, np.ndarray):
            return given
        return MappedRows(given, maps.documents, maps.width)

    @functools.cached_property
    def query_features(self) -> Rows:
        """The query table as unit vectors (rows, T)."""
        return query_table(
            self.dataset.vectors, self.dataset.query_vectors, self.training.pairs,
            self.pseudo, self.maps,
        )  # fmt: skip

    @functools.cached_property
    def exact(self) -> dict[str, list[str]]:
        """Id of an evaluated query -> ids of its nearest documents, best first."""
        rows, _ = self.dataset.exact(self.eval_rows)
        ids = self.dataset.doc_ids
        return {
            name: [ids[row] for row in found if row >= 0]
            for name, found in zip(self.eval_ids, rows.tolist(), strict=True)
        }


def multiple_of(width: int) -> int:
    """What the width of a mapped vector is a multiple of, so that codes divide it."""
    return max(width // 8, 1)


def vector_sizes(config) -> tuple[int, int, int, int]:
    """Documents, training queries, given and mapped width, without reading vectors.

    They are those of `config.sizes`, if it states them.

    Raises:
      ValueError: `sizes.documents` is stated, but not `sizes.width`.
    """
    stated, metric = config.sizes, config.vectors.metric
    if stated.documents:
        if not stated.get("width", 0):
            raise ValueError(
                f"sizes.documents is {stated.documents}, so sizes.width must be stated "
                "too"
            )
        sizes = stated.documents, stated.train_queries, stated.width
    else:
        path = search_folders(config.dataset) or Path(config.dataset).expanduser()
        found = open_container(path)
        queries = 0 if found.queries is None else len(found.queries)
        sizes = *found.documents.shape[:1], queries, found.documents.shape[1]
        metric = metric or found.metric
    width = reduced_width(metric or "cosine", sizes[2], multiple_of(sizes[2]))
    return *sizes, width


def load_vector_inputs(config) -> VectorInputs:
    """Open and check the vectors of a config, and make the training pairs."""
    path = search_folders(config.dataset) or config.dataset
    dataset = open_vectors(path, metric=config.vectors.metric)
    return vector_inputs_of(config, dataset)


def vector_inputs_of(config, dataset: VectorDataset) -> VectorInputs:
    """Make the training pairs of vectors."""
    width = dataset.vectors.shape[1]
    maps = Metric.fit(dataset.metric, dataset.vectors, multiple_of(width))
    labelled = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if "train" in dataset.qrels:
        labelled = dataset.positives("train")[:2]
    pairs, pseudo = vector_pairs(
        dataset.vectors, len(dataset.query_ids), labelled, metric=dataset.metric,
        rows=dataset.training_rows, per_document=config.pseudo.synthetic,
        key=dataset.corpus_sha256,
    )  # fmt: skip
    rows = len(dataset.query_ids) + len(pseudo) + len(dataset.vectors)
    rows += len(pairs["synthetic"][0])
    dataset.check_relevant(config.split)
    row_of = {name: row for row, name in enumerate(dataset.query_ids)}
    asked = dataset.judgements(config.split)
    return VectorInputs(
        dataset, pretrained=None, dtype="float32", remat=False, query_tokens=None,
        document_tokens=None, training=TrainingSet(rows, len(dataset.vectors), pairs),
        num_synthetic=config.pseudo.synthetic,
        eval_rows=np.array([row_of[name] for name in asked], np.int64),
        identical_ids=dataset.identical_ids(config.split, config.ignore_identical_ids),
        stored_dtype="float16" if config.half_on_disk else "float32", maps=maps,
        pseudo=pseudo,
    )  # fmt: skip
