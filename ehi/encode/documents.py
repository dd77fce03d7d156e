"""Texts of documents -> embeddings, leaves and codes, by one trained model."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from ehi.data.tokens import tokenise
from ehi.encode.encode import ACCELERATOR_COMPILE_TOKENS, COMPILE_TOKENS, encode
from ehi.encode.packing import choose_buckets
from ehi.index.build import half, make_leaves
from ehi.index.parameters import make_parameters
from ehi.index.search.routing import assign_leaves
from ehi.model.export import index_arrays
from ehi.model.params import has_tower, merge_model
from ehi.model.tower import Tower

BUCKET = 16  # padded lengths are multiples of it


class DocumentEncoder:
    """Texts -> embeddings, leaves and codes by the parameters of one model.

    Args:
      graphdef, params: of a `JointIndex`, from `split_model`.
      tower: the frozen text encoder, or None if `params` hold one.
      tokenizer_file: of the tower, as `open_tokenizer` takes it.
      prefix: put before every text.
      length: L, the most tokens that are read of a document.
      num_documents: of the corpus; at least the number of leaves.
      spill: s, the number of leaves that a document is stored in.
    """

    def __init__(
        self, graphdef, params, *, tower: Tower | None, tokenizer_file,
        length: int, num_documents: int, spill: int = 1, prefix: str = "",
    ):  # fmt: skip
        if (tower is None) != has_tower(params):
            raise ValueError(
                "give a tower if the parameters hold none, and None if they hold one; "
                f"got {type(tower).__name__} and parameters "
                f"{'with' if has_tower(params) else 'without'} a tower"
            )
        frozen = (None, None) if tower is None else nnx.split(tower)
        self.apply = functools.partial(_embed, graphdef=graphdef, tower=frozen[0])
        self.params = params, frozen[1]
        self.tokenizer_file, self.length = tokenizer_file, length
        self.prefix = prefix
        self.index_parameters = make_parameters(
            params["head/projection"].shape[1], num_documents, spill=spill,
            **index_arrays(graphdef, params),
        )  # fmt: skip

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """'embeddings' (n, D), 'leaves' (n, s) and, with PQ leaves, 'codes' (n, s, M').

        'factors' (n, s) come with a score that needs them.

        Raises:
          ValueError: an embedding is not finite, or too large for float16.
        """
        tokens = tokenise(
            texts, tokenizer_file=self.tokenizer_file, max_length=self.length,
            cache_dir=None, name="documents", prefix=self.prefix,
        )  # fmt: skip
        vectors = encode(
            self.apply, self.params, tokens, buckets=self._buckets(tokens.lengths),
            desc="encode documents",
        )  # fmt: skip
        return self.place(half("embeddings", vectors))

    def place(self, embeddings: np.ndarray) -> dict[str, np.ndarray]:
        """Embeddings (n, D) float16, and the leaves, codes and factors of them."""
        index, x = self.index_parameters, embeddings.astype(np.float32)
        leaves = assign_leaves(x, index.tree, index.spill)  # (n, s)
        placed = {"embeddings": embeddings, "leaves": leaves.astype(np.uint32)}
        if index.codebooks is not None:
            rows = np.repeat(np.arange(len(x)), index.spill)
            stored, _ = make_leaves(index, x, rows, leaves.ravel(), "float32")
            for name, array in stored.items():
                placed[name] = array.reshape(*leaves.shape, *array.shape[1:])
        return placed

    def _buckets(self, lengths) -> tuple[int, ...]:
        """Padded lengths of a block: multiples of 16, which other blocks have too."""
        rounded = np.minimum(-(-lengths // BUCKET) * BUCKET, self.length)
        device = jax.default_backend()
        cost = COMPILE_TOKENS.get(device, ACCELERATOR_COMPILE_TOKENS)
        return choose_buckets(rounded, compile_tokens=cost, step=BUCKET)


@functools.partial(jax.jit, static_argnames=("graphdef", "tower"))
def _embed(params, ids, mask, *, graphdef, tower):
    """Embeddings of tokenised documents; every shape is compiled once."""
    params, frozen = params
    inputs = (ids, mask) if tower is None else nnx.merge(tower, frozen)(ids, mask)
    return merge_model(graphdef, params).embed_documents(inputs)
