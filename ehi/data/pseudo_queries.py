"""Self-supervised pairs: pseudo-queries made from the documents."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from ehi.data.rows import Rows
from ehi.data.tfds_builder import Document
from ehi.progress import track

KINDS = ("title", "sentence", "span")
SPAN_WORDS = (8, 16)
# Shorter ones say nothing. Longer ones are code or tables.
SENTENCE_WORDS = range(4, 65)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# Boundaries of words in 'parse_iso', 'os.path', 'HTTPServer', 'fromISODate'.
_NAME_BREAK = re.compile(r"[\W_]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def pseudo_queries(
    documents: Iterable[Document],
    *,
    kinds: Sequence[str] = KINDS,
    per_document: int = 2,
    seed: int = 0,
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Make texts that each ask for the document they are taken from.

    Kinds: 'title' is the title, where a name such as 'os.path.isfile' is split into its
    words; 'sentence' is a random sentence of the text; 'span' is 8 to 16 consecutive
    words. The draws of a document depend on `seed` and its row only. A document without
    any of these kinds (no title, no sentence) gives its whole content; an empty
    document gives nothing.

    Args:
        documents: the corpus.
        kinds: some of `KINDS`.
        per_document: number of pseudo-queries of a document, of different kinds if
            possible; equal texts count once.
        seed: for the draws.

    Returns:
        texts (R), their document rows (R,) and their kinds (R,).

    Raises:
        ValueError: a kind is unknown, or `per_document` is below 1.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"kinds must be some of {KINDS}, got {tuple(kinds)}")
    if per_document < 1:
        raise ValueError(f"per_document must be at least 1, got {per_document}")
    texts, rows, chosen = [], [], []
    documents = track(documents, "pseudo-queries", "documents", bar=False)
    for row, document in enumerate(documents):
        rng = np.random.default_rng((seed, row))
        drawn = {}
        for turn in range(per_document):
            if turn % len(kinds) == 0:
                order = rng.permutation(kinds).tolist()
            kind = order[turn % len(kinds)]
            drawn.setdefault(_draw(document, kind, rng), kind)
        drawn.pop("", None)
        if not drawn and document.content:
            drawn = {document.content: kinds[0]}
        for text, kind in drawn.items():
            texts.append(text)
            rows.append(row)
            chosen.append(kind)
    return texts, np.array(rows, np.int64), np.array(chosen, np.str_)


def split_name(title: str) -> str:
    """'datetime.fromISODate' -> 'datetime from iso date'; other titles are kept."""
    if " " in title.strip() or not re.search(r"[._]|[a-z][A-Z]", title):
        return title.strip()
    return " ".join(filter(None, _NAME_BREAK.split(title))).lower()


def _draw(document: Document, kind: str, rng: np.random.Generator) -> str:
    """One pseudo-query, or '' if the document has none of this kind."""
    if kind == "title":
        return split_name(document.title)
    if kind == "sentence":
        sentences = [" ".join(s.split()) for s in _SENTENCE_END.split(document.text)]
        sentences = [s for s in sentences if len(s.split()) in SENTENCE_WORDS]
        return sentences[rng.integers(len(sentences))] if sentences else ""
    words = document.text.split()
    length = int(rng.integers(SPAN_WORDS[0], SPAN_WORDS[1], endpoint=True))
    start = int(rng.integers(max(len(words) - length, 0), endpoint=True))
    return " ".join(words[start : start + length])


class MovedDocuments(Rows):
    """Synthetic queries: a document plus the offset of a known pair.

    ``x = unit(d + q_j - d_j)`` for a random pair j. No text is invented: each document
    is asked for in the way that known queries ask for theirs. The pairs are drawn at
    once, 4 bytes for each query; a query is made when it is asked for. Row i belongs to
    document ``i mod documents``.

    Args:
        documents: (rows, T) tower outputs.
        queries: (rows, T) tower outputs.
        pairs: query rows (R,) and document rows (R,) of known pairs.
        per_document: number of synthetic queries of each document.
        seed: for the draws.
    """

    def __init__(
        self,
        documents: np.ndarray,
        queries: np.ndarray,
        pairs: tuple[np.ndarray, np.ndarray],
        *,
        per_document: int,
        seed: int = 0,
    ):
        if per_document and not len(pairs[0]):
            raise ValueError(
                "synthetic queries need known pairs, but there are neither train "
                "labels nor pseudo-queries: set pseudo.synthetic=0, or "
                "pseudo.per_document above 0"
            )
        size = len(documents) * per_document
        self._documents, self._queries, self._pairs = documents, queries, pairs
        self.shape = (size, documents.shape[1])
        rng = np.random.default_rng(seed)
        drawn = rng.integers(len(pairs[0]), size=size) if size else np.zeros(0)
        self._drawn = drawn.astype(np.uint32)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Unit vectors (n, T) float32 of synthetic queries, by their numbers (n,)."""
        drawn = self._drawn[rows]
        queries = np.asarray(self._queries[self._pairs[0][drawn]], np.float32)
        known = np.asarray(self._documents[self._pairs[1][drawn]], np.float32)
        moved = self._documents[rows % len(self._documents)] + (queries - known)
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        return (moved / np.maximum(norms, 1e-12)).astype(np.float32)
