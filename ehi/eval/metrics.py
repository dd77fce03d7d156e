"""TREC run files and effectiveness measures, computed by ir_measures (trec_eval).

A run maps query id -> document id -> score, best first. Scores strictly decrease in
float32, because trec_eval reads scores into C floats and orders equal ones by document
id: it would change the order that the index returned.
"""

import functools
import gzip
import math
import re
import urllib.parse
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import ir_measures
import numpy as np
from ir_measures import RR, R, nDCG

from ehi.files import atomic_write

MEASURES = {
    "ndcg@10": nDCG @ 10,
    "rr@10": RR @ 10,
    "recall@10": R @ 10,
    "recall@100": R @ 100,
    "recall@1000": R @ 1000,
}

Run = dict[str, dict[str, float]]
Qrels = Mapping[str, Mapping[str, int]]


def strictly_decreasing(scores: np.ndarray) -> np.ndarray:
    """Lower each tied float32 score by one unit in the last place.

    Args:
        scores: (k,) scores, best first; after rounding to float32, no score may exceed
            an earlier one.

    Returns:
        (k,) float32 scores, each smaller than the one before.
    """
    scores = np.array(scores, dtype=np.float32)
    for i in np.flatnonzero(np.diff(scores) >= 0) + 1:
        # The lowered score can tie with the next one, which is lowered in turn.
        while i < len(scores) and scores[i] >= scores[i - 1]:
            scores[i] = np.nextafter(scores[i - 1], np.float32(-np.inf))
            i += 1
    return scores


def run_from_hits(query_ids: Sequence[str], ids: np.ndarray, scores: np.ndarray) -> Run:
    """Make a run of search results; trec_eval keeps its order.

    Args:
        query_ids: names of the N queries.
        ids: (N, k) external ids of the documents found, best first.
        scores: (N, k) their scores; -inf marks padding.

    Raises:
        ValueError: the number of query ids differs from the rows of `ids`.
    """
    if len(query_ids) != len(ids):
        raise ValueError(f"{len(query_ids)} query ids for {len(ids)} rows of hits")
    run = {}
    for query_id, row_ids, row_scores in zip(query_ids, ids, scores, strict=True):
        found = row_scores > -np.inf
        values = strictly_decreasing(row_scores[found]).tolist()
        names = map(str, row_ids[found].tolist())
        run[query_id] = dict(zip(names, values, strict=True))
    return run


def without_identical_ids(
    run: Run, qrels: Qrels, ignore: bool | Collection[str] = True
) -> Run:
    """Drop from each ranking the document with the id of its query, as BEIR does.

    A document that is judged for its query is never dropped.

    Args:
        run: ranking of each query.
        qrels: grades of the split.
        ignore: True for all queries, or the ids of the queries that drop theirs. Many
            data sets number queries and documents alike; there it must be False.
    """

    def drops(query_id: str, docs: Mapping[str, float]) -> bool:
        asked = ignore is True or (ignore and query_id in ignore)
        return asked and query_id in docs and query_id not in qrels.get(query_id, ())

    return {
        query_id: {doc: score for doc, score in docs.items() if doc != query_id}
        if drops(query_id, docs)
        else docs
        for query_id, docs in run.items()
    }


def write_run(path: str | Path, run: Run) -> None:
    """Write a run in TREC format: query, Q0, document, rank, score, 'ehi'.

    White space separates the columns, so white space and '%' in ids are
    percent-encoded. A path that ends in .gz is compressed: 1,000 queries x 1,000
    documents are 50 MB of text.
    """
    encode = functools.cache(_encode_id)
    # 9 significant digits represent every float32 exactly.
    lines = [
        f"{encode(query_id)} Q0 {encode(doc_id)} {rank} {score:.9g} ehi\n"
        for query_id, docs in run.items()
        for rank, (doc_id, score) in enumerate(docs.items(), start=1)
    ]
    data = "".join(lines).encode()
    if Path(path).suffix == ".gz":
        # Level 1 is 4 times faster than the default. Without a time stamp equal runs
        # are equal files.
        data = gzip.compress(data, compresslevel=1, mtime=0)
    atomic_write(path, data)


def read_run(path: str | Path) -> Run:
    """Read a run file that `write_run` or another TREC tool wrote; it may be gzipped.

    Ids are percent-decoded only if every '%' in the file is one that `write_run` could
    have written, so that ids such as addresses stay as they are.

    Raises:
        ValueError: a line does not have six columns, its score is not a number, or it
            repeats a document; or the file is damaged.
    """
    run: Run = {}
    for number, line in enumerate(_raw_lines(Path(path)), start=1):
        where = f"{path}, line {number}"
        # Bytes are split at ASCII white space only, as trec_eval does: a no-break space
        # is a part of an id.
        fields = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").split()
        try:
            query_id, _, doc_id, _, score, _ = (field.decode() for field in fields)
            value = float(score)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error})") from None
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise ValueError(
                f'{where}: expected "query Q0 document rank score tag", found '
                f"{line.decode(errors='replace').strip()!r:.200}"
            )
        docs = run.setdefault(query_id, {})
        if doc_id in docs:
            raise ValueError(f"{where}: query {query_id!r} has {doc_id!r} twice")
        docs[doc_id] = value
    names = [*run, *(doc_id for docs in run.values() for doc_id in docs)]
    if any("%" in name for name in names) and all(map(_is_encoded, names)):
        decode = functools.cache(urllib.parse.unquote)
        run = {
            decode(query_id): {decode(doc_id): score for doc_id, score in docs.items()}
            for query_id, docs in run.items()
        }
    return run


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file or of a gzipped one, told by its first bytes and not its name."""
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            for line in gzip.GzipFile(fileobj=file) if gzipped else file:
                if line.strip():
                    yield line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def evaluate(run: Run, qrels: Qrels) -> np.ndarray:
    """Score every query of a split that has a relevant document.

    A query without hits scores 0. A query without a relevant document is left out.

    Args:
        run: ranking of each query.
        qrels: grades of the split, query id -> document id -> grade (> 0 is relevant).

    Returns:
        (N,) structured array, sorted by query id, with the fields `query_id` and the
        keys of `MEASURES`. `np.save` can write it.

    Raises:
        ValueError: no query has a relevant document.
    """
    qrels = {q: dict(d) for q, d in qrels.items() if any(g > 0 for g in d.values())}
    if not qrels:
        raise ValueError("cannot evaluate: no query has a relevant document")
    row_of = {query_id: row for row, query_id in enumerate(sorted(qrels))}
    names = np.array(list(row_of), dtype=str)
    fields = [("query_id", names.dtype), *((name, np.float64) for name in MEASURES)]
    values = np.zeros(len(row_of), dtype=fields)
    values["query_id"] = names
    name_of = {measure: name for name, measure in MEASURES.items()}
    run = {query_id: docs for query_id, docs in run.items() if query_id in row_of}
    evaluator = ir_measures.evaluator(list(MEASURES.values()), qrels)
    for metric in evaluator.iter_calc(run):
        values[name_of[metric.measure]][row_of[metric.query_id]] = metric.value
    return values


def exact_recall(
    run: Run, exact: Mapping[str, Sequence[str]], ks: Sequence[int] = (1, 10, 100)
) -> dict[int, float]:
    """Share of the k exact nearest documents among the first k, mean over queries.

    Args:
        run: ranking of each query.
        exact: query id -> ids of its nearest documents, best first.
        ks: depths; those that `exact` does not reach are left out.

    Example:
        >>> run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
        >>> exact_recall(run, {"q": ["a", "c"]}, ks=(1, 2))
        {1: 1.0, 2: 0.5}
    """
    ks = [k for k in ks if k <= min(map(len, exact.values()), default=0)]
    found = {}
    for k in ks:
        shares = [
            len(set(nearest[:k]).intersection(islice(run.get(query, ()), k))) / k
            for query, nearest in exact.items()
        ]
        found[k] = sum(shares) / len(shares)
    return found


def unlabelled_queries(qrels: Qrels, train: Qrels) -> set[str]:
    """Queries without a relevant document that is relevant to a training query too.

    Documents that are answers in train too are easier to find: training has drawn them
    to their queries.

    Args:
        qrels: grades of the evaluated split.
        train: grades that were trained on.

    Example:
        >>> qrels = {"q1": {"d1": 1, "d2": 0}, "q2": {"d3": 1, "d4": 1}}
        >>> sorted(unlabelled_queries(qrels, {"t1": {"d2": 1, "d3": 1}}))
        ['q1']
    """
    labelled = {
        doc for docs in train.values() for doc, grade in docs.items() if grade > 0
    }
    return {
        query_id
        for query_id, docs in qrels.items()
        if not any(grade > 0 and doc in labelled for doc, grade in docs.items())
    }


def means(per_query: np.ndarray) -> dict[str, float]:
    """Mean of each measure over the queries of `evaluate`."""
    return {name: float(per_query[name].mean()) for name in MEASURES}


def _encode_id(name: str) -> str:
    return re.sub(r"[\s%]", lambda match: urllib.parse.quote(match[0]), name)


def _is_encoded(name: str) -> bool:
    """Whether `_encode_id` could have written this."""
    return "%" not in name or _encode_id(urllib.parse.unquote(name)) == name
