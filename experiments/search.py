"""Ask an index in words.

python -m experiments.search --index=runs/pydocs/index "how do I parse an ISO date"
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ehi.eval.answers import describe_hits, format_hits
from ehi.index import Index, open_index

# Texts -> embeddings (N, D).
QueryEncoder = Callable[[Sequence[str]], np.ndarray]

_erf = np.vectorize(math.erf, otypes=[np.float32])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = parse_arguments(argv)
    try:
        index = open_index(args.index)
        settings = {
            "k": args.k,
            "beam": args.beam or default_beam(index),
            "rerank": args.rerank,
        }
        check_search(index, **settings)
        encode = load_query_encoder(index, tower=args.tower)
        ask = functools.partial(answer, index, encode, as_json=args.json, **settings)
        if args.repl:
            converse(ask, index.num_documents)
        else:
            print(ask(args.words))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the program with a usage message."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.search", description="Ask an index in words."
    )
    parser.add_argument("--index", required=True, type=Path, help="folder of the index")
    parser.add_argument("words", nargs="*", help="the query")
    parser.add_argument("--repl", action="store_true", help="ask for many queries")
    parser.add_argument("--json", action="store_true", help="one JSON object a query")
    parser.add_argument("--k", type=_positive, default=5, help="results (5)")
    parser.add_argument(
        "--beam",
        type=_positive,
        help="leaves to visit (default: as the index was evaluated, else 1/8)",
    )
    parser.add_argument(
        "--rerank",
        type=int,
        default=0,
        help="candidates scored again with stored vectors (0)",
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


def default_beam(index: Index) -> int:
    """The beam the index was saved with, else an eighth of its leaves."""
    stored = (index.encoder or {}).get("default_beam")
    return min(stored or max(1, index.num_leaves // 8), index.num_leaves)


def check_search(index: Index, *, beam: int, k: int, rerank: int) -> None:
    """Let the index refuse settings before the text encoder is loaded.

    Raises:
        ValueError: a setting that this index does not allow.
    """
    index.search(np.zeros((1, index.width), np.float32), k, beam=beam, rerank=rerank)


def load_query_encoder(index: Index, *, tower: str | None = None) -> QueryEncoder:
    """Tokeniser, tower and head that the embeddings of the index came from.

    Args:
        index: its `encoder` names the tower (a hub id, or a folder, which may lie
            inside that of the index) and the query length; `query_head` holds the head.
        tower: hub id or folder to use instead of the named one.

    Raises:
        ValueError: the index does not name its encoder, or the tower found has other
            weights than the one it was built with.
    """
    identity = index.encoder or {}
    if "tower" not in identity or "query_length" not in identity:
        raise ValueError(
            "this index does not name its text encoder (it was built from embeddings): "
            "it can be searched by embeddings only"
        )
    # jax takes seconds to import: wrong arguments are refused without it.
    import jax
    from flax import nnx
    from tokenizers import Tokenizer

    from ehi.model.pretrained import load_tower, resolve

    pretrained = resolve(tower or tower_location(index))
    expected = identity.get("tower_sha256", pretrained.sha256)
    if pretrained.sha256 != expected:
        raise ValueError(
            f"the tower {pretrained.name} has weights {pretrained.sha256[:12]}, the "
            f"index was built with {expected[:12]}"
        )
    tokenizer = Tokenizer.from_file(str(pretrained.tokenizer_file))
    length = identity["query_length"]
    graphdef, params = nnx.split(load_tower(pretrained))

    @jax.jit
    def forward(params, ids, mask):
        return nnx.merge(graphdef, params)(ids, mask)

    def encode(texts: Sequence[str]) -> np.ndarray:
        ids, mask = pad_tokens(tokenizer, texts, length)
        features = np.asarray(forward(params, ids, mask))  # (N, T)
        return apply_head(index.query_head or {}, features)

    return encode


def tower_location(index: Index) -> str | Path:
    """The tower's folder inside that of the index if it is there, else its name."""
    name = index.encoder["tower"]
    if index.folder is not None and (index.folder.path / name).is_dir():
        return index.folder.path / name
    return name


def pad_tokens(tokenizer, texts: Sequence[str], length: int):
    """Token ids and mask (N, L) of texts, cut and padded to one length.

    One length for all queries, so that the tower is compiled once.
    """
    tokenizer.enable_truncation(length)
    tokenizer.no_padding()
    ids = np.zeros((len(texts), length), np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, encoding in enumerate(tokenizer.encode_batch(list(texts))):
        ids[row, : len(encoding.ids)] = encoding.ids
        mask[row, : len(encoding.ids)] = True
    return ids, mask


def apply_head(head: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """NumPy forward of `ehi.model.encoder.Head`.

    y = unit(x P + gelu(x W_in + b_in) W_out), gelu(z) = z (1 + erf(z / sqrt 2)) / 2

    Args:
        head: 'projection' (T, D) and, where there is a residual part, 'w_in' (T, F),
            'b_in' (F,), 'w_out' (F, D); empty for no head.
        x: (N, T) tower outputs.

    Returns:
        (N, D) float32 unit rows.
    """
    y = x @ head["projection"] if "projection" in head else x
    if "w_in" in head:
        z = x @ head["w_in"] + head["b_in"]  # (N, F)
        y = y + (z * (1 + _erf(z / math.sqrt(2))) / 2) @ head["w_out"]
    norms = np.linalg.norm(y, axis=1, keepdims=True)
    return (y / np.maximum(norms, 1e-12)).astype(np.float32)


def answer(
    index: Index,
    encode: QueryEncoder,
    query: str,
    *,
    k: int,
    beam: int,
    rerank: int = 0,
    as_json: bool = False,
) -> str:
    """Search for one query and put the result into words, or into one line of JSON.

    Raises:
        ValueError: the query is empty.
    """
    query = query.strip()
    if not query:
        raise ValueError("the query is empty")
    hits = index.search(encode([query]), k, beam=beam, rerank=rerank)
    described = describe_hits(index, hits)
    if as_json:
        return json.dumps({"query": query} | described, ensure_ascii=False)
    return format_hits(query, described)


def converse(ask: Callable[[str], str], num_documents: int) -> None:
    """Answer line after line until the end of the input; blank ones are skipped."""
    interactive = sys.stdin.isatty()
    # Prompts go to stderr: stdout has answers only, which --json makes for programs.
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
            # One bad question does not end a conversation.
            print(f"error: {error}", file=sys.stderr)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
