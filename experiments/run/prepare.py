"""Config -> data set, tokens, tower and its outputs, which all systems share."""

import dataclasses
import functools
import hashlib
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ehi.data.datasets import RetrievalDataset, carve_dev, open_dataset
from ehi.data.pseudo_queries import MovedDocuments, pseudo_queries
from ehi.data.rows import Counted, JoinedRows, Rows
from ehi.data.tokens import TokenArray, tokenise
from ehi.encode.embed import EmbeddedRows, code_table, embed, embed_to
from ehi.encode.encode import cached_encode
from ehi.files import arrays_sha256, cache_folder
from ehi.index.columns import Metadata
from ehi.model.params import has_tower
from ehi.model.pretrained import (
    Pretrained,
    compares_by_dot,
    load_tower,
    missing_prefixes,
    resolve,
)
from ehi.model.tower import Tower
from ehi.progress import track
from ehi.train.batch import TrainingSet
from experiments.run.checks import check_candidates, check_lengths

LOG = logging.getLogger("ehi")


@dataclass(frozen=True)
class Inputs:
    """Everything that does not depend on the system.

    The rows of the query table are, in this order: the queries of the data set; the
    pseudo-queries; every document, as a query for itself; the synthetic queries, which
    exist only as tower outputs. Only the first two kinds are stored: a document is its
    row of the corpus, and a synthetic query is made when it is asked for.

    Attributes:
      dataset: corpus, queries and qrels.
      pretrained: the checkpoint of the tower.
      dtype, remat: arguments of `Tower`.
      query_tokens: tokens of the queries and pseudo-queries.
      document_tokens: tokens of the corpus.
      training: the pairs to train on.
      num_synthetic: synthetic queries per document.
      eval_rows: rows of the query table that belong to the evaluated split.
      identical_ids: queries for which the document of the same id is not ranked.
      stored_dtype: of tower outputs and embeddings on disk.
      metadata: fields of the documents that indexes keep, or None.
    """

    dataset: RetrievalDataset
    pretrained: Pretrained
    dtype: str
    remat: bool
    query_tokens: TokenArray
    document_tokens: TokenArray
    training: TrainingSet
    num_synthetic: int
    eval_rows: np.ndarray
    identical_ids: frozenset[str] = frozenset()
    stored_dtype: str = "float32"
    metadata: Metadata | None = None

    @functools.cached_property
    def tower(self) -> Tower:
        """The pretrained text encoder."""
        dtype = jnp.dtype(self.dtype)
        return load_tower(self.pretrained, dtype=dtype, remat=self.remat)

    @property
    def tower_width(self) -> int:
        """Width T of the tower's outputs."""
        return self.pretrained.width

    @functools.cached_property
    def document_features(self) -> np.ndarray:
        """Outputs of the frozen tower for the corpus (documents, T), cached on disk."""
        return cached_encode(
            self.pretrained, self.tower, self.document_tokens, desc="encode documents",
            dtype=self.stored_dtype,
        )  # fmt: skip

    @functools.cached_property
    def query_features(self) -> Rows:
        """Outputs of the frozen tower for the query table (rows, T)."""
        queries = cached_encode(
            self.pretrained, self.tower, self.query_tokens, desc="encode queries",
            dtype=self.stored_dtype,
        )  # fmt: skip
        return self.query_table(queries, self.document_features)

    def query_table(self, queries: np.ndarray, documents: np.ndarray) -> Rows:
        """Join tower outputs into those of the query table, without a copy.

        Args:
          queries: outputs of the rows that have tokens (n, T).
          documents: outputs of the corpus (documents, T).

        Returns:
          outputs of all rows (rows, T).
        """
        tables = [queries, documents]
        if self.num_synthetic:
            moved = MovedDocuments(
                documents, queries, known_pairs(self.training.pairs),
                per_document=self.num_synthetic,
            )  # fmt: skip
            tables.append(moved)
        return JoinedRows(tables)

    @property
    def code_width(self) -> int:
        """Width of the vectors that a compression is relative to."""
        return self.tower_width

    @property
    def exact(self) -> dict[str, list[str]] | None:
        """Id of an evaluated query -> ids of its nearest documents; None for texts."""
        return None

    @property
    def tower_name(self) -> str:
        """Name of the tower in messages."""
        return f"the tower {self.pretrained.name}"

    @property
    def tower_sha256(self) -> str:
        """Digest of what makes the inputs of the head."""
        return self.pretrained.sha256

    @property
    def tower_settings(self) -> dict:
        """Prefixes, pooling and normalisation that an index must state; often {}."""
        found = self.pretrained
        prefixes = {
            name: getattr(found, name)
            for name in ("query_prefix", "document_prefix")
            if getattr(found, name)
        }
        return prefixes | found.own_settings

    @property
    def source_keys(self) -> tuple[str, ...]:
        """Digests of the texts and of the tower that reads them."""
        return self.query_tokens.key, self.document_tokens.key, self.tower_sha256

    @property
    def eval_ids(self) -> list[str]:
        """Ids of the evaluated queries."""
        return [self.dataset.query_ids[row] for row in self.eval_rows]


def load_inputs(config) -> Inputs:
    """Open the data set of a config, tokenise it, and make the training pairs."""
    dataset = open_split(config)
    metadata = read_metadata(config, dataset)
    return dataclasses.replace(inputs_of(config, dataset), metadata=metadata)


def read_metadata(config, dataset: RetrievalDataset) -> Metadata | None:
    """Read the fields of the documents that a config names; None if it names none.

    Raises:
      ValueError: a field is in no document, or is no text, number or bool.
    """
    names = tuple(config.index.metadata)
    return Metadata.of(dataset.metadata(names)) if names else None


def open_split(config) -> RetrievalDataset:
    """Open the data set of a config; the split dev is carved out if it has none."""
    dataset = open_dataset(config.dataset)
    if config.split == "dev" and "dev" not in dataset.qrels:
        dataset = carve_dev(dataset, fraction=config.dev_fraction, seed=0)
        LOG.info("dev carved out of train by document")
    return dataset


def resolve_tower(config) -> Pretrained:
    """Find the checkpoint of a config; warn of what its user may not expect of it.

    Raises:
      ValueError, OSError: see `resolve`.
    """
    c = config.tower
    names = "query_prefix", "document_prefix", "pooling", "normalise"
    pretrained = resolve(c.name, **{name: c.get(name) for name in names})
    if c.get("query_prefix") is None and c.get("document_prefix") is None:
        wanted = missing_prefixes(pretrained)
        if wanted is not None:
            LOG.warning(
                "%s was trained with prefixes, and none is configured: set "
                "--config.tower.query_prefix=%s --config.tower.document_prefix=%s, or "
                "one of them to '' to have none",
                pretrained.name, *map(shlex.quote, wanted),
            )  # fmt: skip
    if compares_by_dot(pretrained):
        LOG.warning(
            "the outputs of %s have no unit length, so it may be meant for dot "
            "products; here embeddings have length one: the cosine is trained and "
            "searched (to keep dot products, encode the texts yourself and use "
            "experiments/configs/vectors.py with --config.vectors.metric=ip)",
            pretrained.name,
        )  # fmt: skip
    return pretrained


def inputs_of(config, dataset: RetrievalDataset) -> Inputs:
    """Tokenise a data set, and make the training pairs."""
    eval_rows, ignored = _evaluated(config, dataset)
    check_candidates(config, dataset)
    pretrained = resolve_tower(config)
    check_lengths(config, pretrained)
    texts, pseudo_rows = [], np.zeros(0, np.int64)
    if config.pseudo.per_document:
        texts, pseudo_rows, _ = pseudo_queries(
            dataset.documents, kinds=tuple(config.pseudo.kinds),
            per_document=config.pseudo.per_document, seed=0,
        )  # fmt: skip
    if not dataset.query_ids and not len(texts):
        raise ValueError(
            f"{dataset.name} has no queries, so there is nothing to train on: set "
            "pseudo.per_document above 0 (it is 0)"
        )
    tokens = functools.partial(
        tokenise, tokenizer_file=pretrained.tokenizer_file,
        cache_dir=cache_folder() / "tokens",
    )  # fmt: skip
    query_tokens = tokens(
        dataset.query_texts + list(texts),
        max_length=config.tower.query_length,
        name=f"{dataset.name} queries",
        prefix=pretrained.query_prefix,
    )
    document_tokens = tokens(
        _Contents(dataset.documents),
        max_length=config.tower.document_length,
        name=f"{dataset.name} documents",
        prefix=pretrained.document_prefix,
    )
    num_documents, num_queries = len(dataset.documents), len(dataset.query_ids)
    query_rows, document_rows = _labelled(dataset)
    first_pseudo, first_document = num_queries, num_queries + len(texts)
    per_document = config.pseudo.synthetic
    num_synthetic = per_document * num_documents
    first_synthetic = first_document + num_documents
    training = TrainingSet(
        num_queries=first_synthetic + num_synthetic,
        num_documents=num_documents,
        pairs={
            "labelled": (query_rows, document_rows),
            "pseudo": (first_pseudo + np.arange(len(texts)), pseudo_rows),
            "documents": (
                Counted(first_document, num_documents),
                Counted(0, num_documents),
            ),
            "synthetic": (
                Counted(first_synthetic, num_synthetic),
                Counted(0, num_synthetic, period=num_documents),
            ),
        },
        query_tokens=query_tokens,
        document_tokens=document_tokens,
    )
    return Inputs(
        dataset, pretrained, config.tower.dtype, config.tower.remat, query_tokens,
        document_tokens, training, per_document, eval_rows, ignored,
        "float16" if config.half_on_disk else "float32",
    )  # fmt: skip


class _Contents:
    """The texts of documents, which are read again for each pass."""

    def __init__(self, documents):
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __iter__(self):
        for document in track(self._documents, "read", "documents", bar=False):
            yield document.content


def _evaluated(config, dataset) -> tuple[np.ndarray, frozenset[str]]:
    """Return the evaluated queries' rows, and the ids that `identical_ids` names."""
    if not dataset.qrels:  # such a corpus is indexed but not scored
        return np.zeros(0, np.int64), frozenset()
    dataset.check_relevant(config.split)
    asked = dataset.judgements(config.split)
    ignored = dataset.identical_ids(config.split, config.ignore_identical_ids)
    if ignored:
        LOG.info(
            "%s: %s of %s queries have the id of a document, which is not ranked for "
            "them", dataset.name, f"{len(ignored):,}", f"{len(asked):,}",
        )  # fmt: skip
    row_of = {name: row for row, name in enumerate(dataset.query_ids)}
    return np.array([row_of[name] for name in asked], np.int64), ignored


def _labelled(dataset) -> tuple[np.ndarray, np.ndarray]:
    if "train" not in dataset.qrels:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    queries, documents, _ = dataset.positives("train")
    if not len(queries):
        LOG.warning(
            "%s: no judgement of split 'train' has a grade above 0 and a document of "
            "the corpus, so no labelled pair is trained on", dataset.name,
        )  # fmt: skip
    return queries, documents


def known_pairs(pairs) -> tuple[np.ndarray, np.ndarray]:
    """Return the labelled pairs, or the pseudo pairs if there are none."""
    return pairs["labelled"] if len(pairs["labelled"][0]) else pairs["pseudo"]


def tower_outputs(
    graphdef, params, inputs: Inputs, folder: Path | None = None
) -> tuple[np.ndarray, Rows]:
    """Return tower outputs of the corpus (documents, T) and query table (rows, T).

    A model that trains its tower uses that one, others the pretrained one.

    Args:
      graphdef, params: a `JointIndex` as `split_model` returns it.
      inputs: from `load_inputs`.
      folder: for the outputs of a trained tower. A file is named by the weights and the
        texts, so each pair of them is encoded once. None keeps the outputs in memory.
    """
    if not has_tower(params):
        return inputs.document_features, inputs.query_features
    outputs = []
    for side, tokens in (
        ("documents", inputs.document_tokens),
        ("queries", inputs.query_tokens),
    ):
        arguments = graphdef, params, side, tokens
        if folder is None:
            outputs.append(embed(*arguments, head=False))
            continue
        name = _key(_of_side(params, side, ("tower",)), tokens.key, inputs)
        path = folder / f"tower-{name}.npy"
        outputs.append(
            embed_to(path, *arguments, head=False, dtype=inputs.stored_dtype)
        )
    documents, queries = outputs
    return documents, inputs.query_table(queries, documents)


def embeddings(
    graphdef, params, inputs: Inputs, folder: Path | None = None
) -> tuple[np.ndarray, EmbeddedRows]:
    """Return embeddings of the corpus (documents, D) and of the query table (rows, D).

    Those of the query table are made when they are asked for. The arguments are those
    of `tower_outputs`; with a folder, the embeddings of the corpus are a file too.
    """
    documents, queries = tower_outputs(graphdef, params, inputs, folder)
    arguments = graphdef, params, "documents", documents
    if folder is None:
        made = embed(*arguments)
    else:
        own = _of_side(params, "documents", ("tower", "head"))
        name = _key(own, " ".join(inputs.source_keys), inputs)
        made = embed_to(
            folder / f"documents-{name}.npy", *arguments, dtype=inputs.stored_dtype
        )
    return made, EmbeddedRows(graphdef, params, "queries", queries)


def codes_of(graphdef, params, inputs: Inputs, folder: Path) -> np.ndarray:
    """Return the codes of the corpus (documents, M) by parameters without a tree."""
    documents, _ = embeddings(graphdef, params, inputs, folder)
    groups = ("tower", "head", "rotation", "quantiser")
    own = _of_side(params, "documents", groups)
    name = _key(own, " ".join(inputs.source_keys), inputs)
    return code_table(graphdef, params, documents, folder / f"codes-{name}.npy")


def _of_side(params: dict, side: str, groups: tuple[str, ...]) -> dict:
    """Return the parameters of some groups that one side of the model uses."""
    there = {name.split("/")[0] for name in params}
    own = {f"query_{group}" if f"query_{group}" in there else group for group in groups}
    own = own if side == "queries" else set(groups)
    # The names of both sides are alike, so a frozen copy has the key of its origin.
    return {
        name.removeprefix("query_"): value
        for name, value in params.items()
        if name.split("/")[0] in own
    }


def _key(params: dict, texts: str, inputs: Inputs) -> str:
    """Return the name of a file that depends on parameters, texts and the corpus."""
    parts = (
        arrays_sha256(jax.device_get(params)), texts, inputs.dataset.corpus_sha256,
        inputs.dtype, inputs.stored_dtype,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
