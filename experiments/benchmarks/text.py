"""One question in words, searched in NumPy: tokeniser, tower, tree and leaves.

    python -m experiments.benchmark text --json=FILE

Asks real questions of `--words` words one after the other, as a service does, and
measures the milliseconds of `search_text` and of its embedding. If it is installed,
sentence-transformers embeds the same questions in turn; `ratio` is its median over
ours. The documents are random vectors: their values do not change the time.
"""

import importlib.util
import time
from pathlib import Path

import numpy as np

from ehi.data.datasets import open_dataset
from ehi.eval.provenance import git_commit, hardware, versions
from ehi.index import build_index
from ehi.model.pretrained import resolve
from ehi.progress import track

PEER = "sentence-transformers"
PACKAGES = ("numpy", "tokenizers", "safetensors", "torch", PEER)
_WARM_UP = 10


def add_arguments(command) -> None:
    """Add the options of `text`."""
    command.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    command.add_argument("--dataset", default="pydocs", help="source of the questions")
    command.add_argument("--words", type=int, default=12, help="words per question")
    command.add_argument("--queries", type=int, default=200)
    command.add_argument("--documents", type=int, default=100_000)
    command.add_argument("--leaves", type=int, default=512)
    command.add_argument("--beam", type=int, default=8)
    command.add_argument("--threads", type=int, default=1)


def benchmark_text(args) -> dict:
    """Ask every system every question, in turn."""
    questions = questions_of(args.dataset, args.words, args.queries)
    pretrained = resolve(args.model)
    index = make_index(args, pretrained)
    encode = index.text_encoder

    def search(text):
        index.search_text(text, 10, beam=args.beam, threads=args.threads)

    runs = {"search_text": search, "embedding": lambda text: encode(text)}
    if importlib.util.find_spec(PEER.replace("-", "_")):
        runs[PEER] = _peer(pretrained)
    seconds = {name: [] for name in runs}
    for number in track(range(_WARM_UP + len(questions)), "ask", "questions"):
        text = questions[number % len(questions)]
        for name, run in runs.items():
            started = time.perf_counter()
            run(text)
            if number >= _WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    names = ("dataset", "words", "documents", "leaves", "beam", "threads")
    return {
        **{name: getattr(args, name) for name in names},
        "dataset": Path(args.dataset).name,  # results name no path of the machine
        "model": pretrained.name,
        "queries": len(questions),
        "milliseconds": {
            name: {
                f"p{percent}": 1e3 * float(np.percentile(values, percent))
                for percent in (50, 95, 99)
            }
            for name, values in seconds.items()
        },
        "ratio": medians[PEER] / medians["embedding"] if PEER in medians else None,
        "hardware": hardware(),
        "versions": versions(PACKAGES),
        "git_commit": git_commit(Path(__file__).parent),
    }


def questions_of(dataset: str, words: int, num: int) -> list[str]:
    """Return the first `words` words of long enough queries, evenly spread.

    Raises:
      ValueError: no query is long enough.
    """
    texts = [text.split() for text in open_dataset(dataset).query_texts]
    long = [" ".join(text[:words]) for text in texts if len(text) >= words]
    if not long:
        raise ValueError(f"no query of {dataset} has --words={words} words")
    rows = np.linspace(0, len(long) - 1, min(num, len(long))).astype(int)
    return [long[row] for row in rows]


def make_index(args, pretrained):
    """Return an index of random vectors in a random tree, which names the tower."""
    rng = np.random.default_rng(0)
    width = pretrained.width

    def unit(*shape):
        x = rng.standard_normal(shape, np.float32)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    identity = {
        "tower": str(pretrained.folder),
        "tower_sha256": pretrained.sha256,
        "query_length": min(64, pretrained.max_length),
    }
    tree = {
        "kind": "per_node",
        "nodes": [unit(1, args.leaves, width)],
        "scale": 20.0,
    }
    documents = unit(args.documents, width)
    return build_index(documents, range(len(documents)), tree=tree, encoder=identity)


def _peer(pretrained):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(pretrained.folder), device="cpu")
    return lambda text: model.encode(text, show_progress_bar=False)


def table(result: dict) -> str:
    """Return the milliseconds as Markdown."""
    lines = ["| | p50 ms | p95 | p99 |", "|---|--:|--:|--:|"]
    for name, found in result["milliseconds"].items():
        numbers = " | ".join(f"{value:.2f}" for value in found.values())
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)
