"""Ask an index in words.

python -m experiments.search --index=runs/pydocs/index "how do I parse an ISO date"
python -m experiments.search --index=runs/own/index --where="year >= 2020" "a query"
python -m experiments.search --index=runs/pydocs/index --recall=0.95 --save
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ehi.eval.answers import describe_hits, format_hits
from ehi.index import Index, Tuned, open_index
from ehi.index.search.codes import decode
from ehi.index.text.encoder import (
    TextEncoder,
    TowerNotFoundError,
    apply_head,
    load_text_encoder,
)
from experiments.command import (
    INTERRUPTED,
    accept_any_text,
    clean,
    close_pipe,
    exit_code,
    is_utf8,
    user_path,
)

MOST_QUERIES = 1000  # a search is tuned on no more


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_arguments(argv)
    accept_any_text()
    code = exit_code(functools.partial(_run, args), interrupted="")
    return 0 if args.repl and code == INTERRUPTED else code  # Ctrl-C ends a dialogue


def _run(args: argparse.Namespace) -> int:
    """Answer the questions; return the exit code."""
    try:
        index = open_index(args.index)
        encoder = functools.cache(
            lambda: load_query_encoder(index, tower=args.tower)
        )  # an index of vectors has none, and is tuned without
        if args.recall is not None:
            tuned, source = tune_search(index, encoder, args)
            asked = args.repl or args.words
            said = f"tuned on {tuned.num_queries:,} {source}\n{tuned}"
            print(said, file=sys.stderr if asked else sys.stdout, flush=True)
            if not asked:
                return 0
            settings = {"k": args.k, **tuned.setting}
        else:
            settings = {"k": args.k, **chosen_search(index, args)}
        settings["where"] = args.where
        check_search(index, **settings)
        encode = encoder()
        ask = functools.partial(answer, index, encode, as_json=args.json, **settings)
        if args.repl:
            converse(ask, index.num_documents)
        else:
            print(ask(args.words), flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        close_pipe()
        return 1
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake ends the program with a usage message."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.search", description="Ask an index in words."
    )
    parser.add_argument(
        "--index", required=True, type=user_path, help="folder of the index"
    )
    parser.add_argument("words", nargs="*", help="the query")
    parser.add_argument(
        "--repl", action="store_true", help="read one query per line of the input"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per query"
    )
    parser.add_argument("--k", type=_positive, default=5, help="number of results (5)")
    parser.add_argument(
        "--beam",
        type=_positive,
        help="most leaves to visit (default: stored in the index, else 1/8 of them)",
    )
    parser.add_argument(
        "--min-prob",
        type=float,
        help="visit only leaves at least this probable (default: stored in the index)",
    )
    parser.add_argument(
        "--rerank",
        type=int,
        help="candidates to score again with stored vectors (default: stored, else 0)",
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="only documents whose metadata meet a condition, such as "
        "\"lang == 'en' and year >= 2020\"",
    )
    parser.add_argument(
        "--recall",
        type=float,
        help="find the beam, probability and re-ranking for this recall@k of exact "
        "search first, on queries of the run's data set",
    )
    parser.add_argument(
        "--save", action="store_true", help="store what --recall finds in the index"
    )
    parser.add_argument(
        "--tower",
        help="hub id or folder of the text encoder (default: named by the index)",
    )
    args = parser.parse_args(argv)
    _check_together(parser, args)
    return args


def _check_together(parser, args):
    """Refuse options that do not go together, and join the words of the query."""
    tunes = args.recall is not None
    if (args.repl and args.words) or not (args.repl or args.words or tunes):
        parser.error("give either a query or --repl")
    given = [args.beam, args.min_prob, args.rerank]
    if tunes and any(value is not None for value in given):
        parser.error("--recall finds --beam, --min-prob and --rerank: leave them out")
    if args.save and not tunes:
        parser.error("--save stores what --recall finds: give --recall")
    asks = bool(args.words)
    args.words = " ".join(args.words)
    if asks and not args.words.strip():
        parser.error("the query is empty")


def default_search(index: Index) -> dict[str, float]:
    """Return the settings stored in the index, or else an eighth of its leaves."""
    eighth = {"beam": max(1, index.num_leaves // 8), "min_prob": 0.0, "rerank": 0}
    return index.setting or eighth


def chosen_search(index: Index, args: argparse.Namespace) -> dict[str, float]:
    """Return the search settings of the command line, or else those of the index."""
    if args.beam is None and args.min_prob is None:
        chosen = default_search(index)
        if chosen["rerank"]:
            chosen["rerank"] = max(chosen["rerank"], args.k)
    else:
        beam, min_prob = args.beam or index.num_leaves, args.min_prob or 0.0
        chosen = {"beam": beam, "min_prob": min_prob, "rerank": 0}
    return chosen if args.rerank is None else chosen | {"rerank": args.rerank}


def tune_search(
    index: Index, encoder: Callable[[], TextEncoder], args: argparse.Namespace
) -> tuple[Tuned, str]:
    """Find the settings for the recall of the command line; store them if asked to.

    The queries are those of the data set of the run that the index belongs to: dev, or
    else train, or else those without judgements, but never test. Without any, documents
    of the index stand in for them.

    Returns:
        What was found, and what it was found on.

    Raises:
        ValueError: as of `Index.tune`.
    """
    source, queries = run_queries(index, args.index)
    if isinstance(queries, list) and queries:
        queries = encoder()(queries)
    if not len(queries):
        source = "documents in place of queries, which may need more leaves"
        queries = document_vectors(index)
    tuned = index.tune(queries, args.recall, min(args.k, index.num_documents),
                       save=args.save)  # fmt: skip
    return tuned, source


def run_queries(index: Index, folder: Path) -> tuple[str, list[str] | np.ndarray]:
    """Return what the queries of an index's run are, and at most 1,000 of them.

    They are texts; or embeddings, if the run was given vectors.
    """
    # An index lies in the workdir of its run, or one folder deeper.
    for workdir in Path(folder).resolve().parents[:2]:
        file = workdir / "config.json"
        if file.is_file():
            break
    else:
        return "", []
    # What they import takes a second.
    from ehi.data.datasets import open_dataset
    from ehi.data.download import search_folders
    from ehi.data.vectors.dataset import open_vectors

    vectors = "vectors" in (index.encoder or {})
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        name = config["dataset"]
        if vectors:
            metric = config["vectors"]["metric"]
            dataset = open_vectors(search_folders(name) or name, metric=metric)
        else:
            dataset = open_dataset(name)
    except (ValueError, KeyError, TypeError, OSError) as error:
        print(f"the queries of {workdir} cannot be read: {error}", file=sys.stderr)
        return "", []
    row_of = {id: row for row, id in enumerate(dataset.query_ids)}
    splits = [split for split in ("dev", "train") if dataset.qrels.get(split)]
    if splits:
        source = f"{splits[0]} queries of {dataset.name}"
        rows = [row_of[id] for id in dataset.qrels[splits[0]] if id in row_of]
    else:
        judged = {id for judged in dataset.qrels.values() for id in judged}
        source = f"queries of {dataset.name} without judgements"
        rows = [row for id, row in row_of.items() if id not in judged]
    rows = rows[:: 1 + len(rows) // MOST_QUERIES]
    if vectors:
        return source, given_queries(index, dataset, rows)
    return source, [dataset.query_texts[row] for row in rows]


def given_queries(index: Index, dataset, rows: list[int]) -> np.ndarray:
    """Embed query vectors of a `VectorDataset` as the run of an index did."""
    from ehi.data.vectors.metric import Metric

    width = dataset.vectors.shape[1]
    # As in `experiments.run.vectors`, which imports jax.
    maps = Metric.fit(dataset.metric, dataset.vectors, max(width // 8, 1))
    queries = maps.queries(np.asarray(dataset.query_vectors[rows], np.float32))
    return (
        queries if index.query_head is None else apply_head(index.query_head, queries)
    )


def document_vectors(index: Index) -> np.ndarray:
    """Return about 1,000 documents of an index, evenly spaced: (n, D) float32.

    They are decoded where the index stores codes only. If the index names a text
    encoder, whose queries have unit norm, so have they.
    """
    parameters, found = index.parameters, []
    step = 1 + sum(part.num_copies for part in index.segments) // MOST_QUERIES
    for segment in index.segments:
        copies = np.arange(0, segment.num_copies, step)
        if segment.rerank_vectors is not None:
            vectors = segment.rerank_vectors[segment.leaf_rows[copies]]
        elif segment.vectors is not None:
            vectors = segment.vectors[copies]
        else:
            vectors = decode(segment.codes[copies], parameters.byte_codebooks)
            if parameters.leaf_centroids is not None:
                leaves = np.searchsorted(segment.leaf_offsets, copies, side="right") - 1
                vectors += parameters.rotated_centroids[leaves]
            if parameters.rotation is not None:
                vectors = vectors @ parameters.rotation.T
        found.append(vectors.astype(np.float32))
    vectors = np.concatenate(found)
    if index.encoder:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def check_search(index: Index, *, k: int, **settings: float) -> None:
    """Let the index check the settings before the text encoder is loaded.

    Raises:
        ValueError: the index does not allow a setting.
    """
    index.search(np.zeros((1, index.width), np.float32), k, **settings)


def load_query_encoder(index: Index, *, tower: str | None = None) -> TextEncoder:
    """Load the text encoder of an index; download its tower if it is not in the cache.

    Args:
        index: an index that names its encoder.
        tower: hub id or folder to use instead of the named one.

    Raises:
        ValueError, FileNotFoundError: see `load_text_encoder`; also of a tower that is
            not in the cache, without jax.
        ConnectionError: the tower cannot be downloaded.
    """
    try:
        return load_text_encoder(index, tower=tower)
    except TowerNotFoundError as missing:
        try:  # this imports jax, which takes seconds
            from ehi.model.pretrained import resolve
        except ImportError:  # a search alone has no jax, and downloads nothing
            raise missing from None
        return load_text_encoder(index, tower=resolve(missing.name).folder)


def answer(
    index: Index,
    encode: TextEncoder,
    query: str,
    *,
    k: int,
    as_json: bool = False,
    **settings: float,
) -> str:
    """Search for one query; return the result as text, or as one line of JSON.

    Args:
        k, settings: arguments of `Index.search`.

    Raises:
        ValueError: the query is empty.
    """
    query = clean(query).strip()
    if not query:
        raise ValueError("the query is empty")
    hits = index.search(encode([query]), k, **settings)
    described = describe_hits(index, hits)
    if as_json:
        ascii_only = not is_utf8(sys.stdout)
        return json.dumps({"query": query} | described, ensure_ascii=ascii_only)
    return format_hits(query, described)


def converse(ask: Callable[[str], str], num_documents: int) -> None:
    """Answer every line of the input until its end; skip blank lines."""
    interactive = sys.stdin.isatty()
    # Prompts go to stderr, so that programs can read the answers from stdout.
    if interactive:
        print(f"{num_documents:,} documents; Ctrl-D ends", file=sys.stderr)
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            if interactive:
                print(file=sys.stderr)
            return
        if not line.strip():
            continue
        try:
            print(ask(line), flush=True)
        except ValueError as error:
            # A bad question does not end the conversation.
            print(f"error: {error}", file=sys.stderr)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
