"""Ask an index in words.

python -m experiments.search --index=runs/pydocs/index "how do I parse an ISO date"
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence

import numpy as np

from ehi.eval.answers import describe_hits, format_hits
from ehi.index import Index, open_index
from ehi.index.text.encoder import TextEncoder, TowerNotFoundError, load_text_encoder
from experiments.command import (
    INTERRUPTED,
    accept_any_text,
    clean,
    close_pipe,
    exit_code,
    is_utf8,
    user_path,
)


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
        settings = {"k": args.k, "rerank": args.rerank} | chosen_search(index, args)
        check_search(index, **settings)
        encode = load_query_encoder(index, tower=args.tower)
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
        default=0,
        help="number of candidates to score again with stored vectors (0)",
    )
    parser.add_argument(
        "--tower",
        help="hub id or folder of the text encoder (default: named by the index)",
    )
    args = parser.parse_args(argv)
    if args.repl == bool(args.words):
        parser.error("give either a query or --repl")
    args.words = " ".join(args.words)
    if not args.repl and not args.words.strip():
        parser.error("the query is empty")
    return args


def default_search(index: Index) -> dict[str, float]:
    """Return the settings stored in the index, or else an eighth of its leaves."""
    stored = index.encoder or {}
    beam = stored.get("default_beam") or max(1, index.num_leaves // 8)
    return {
        "beam": min(beam, index.num_leaves),
        "min_prob": stored.get("default_min_prob", 0.0),
    }


def chosen_search(index: Index, args: argparse.Namespace) -> dict[str, float]:
    """Return the search settings of the command line, or else those of the index."""
    if args.beam is None and args.min_prob is None:
        return default_search(index)
    return {"beam": args.beam or index.num_leaves, "min_prob": args.min_prob or 0.0}


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
        ValueError, FileNotFoundError: see `load_text_encoder`.
        ConnectionError: the tower cannot be downloaded.
    """
    try:
        return load_text_encoder(index, tower=tower)
    except TowerNotFoundError as missing:
        # This imports jax, which takes seconds.
        from ehi.model.pretrained import resolve

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
