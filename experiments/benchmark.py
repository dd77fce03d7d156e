"""Speed of the parts, against what others use for them, in one process.

python -m experiments.benchmark encode --dataset=pydocs --num-texts=300

times encoding a corpus with ours and, where it is installed, sentence-transformers:
tokenising included, the same texts and length, repeats in turn, the peer at its best
batch size. Prints JSON; `ratio` is the peer's seconds over ours.

Other commands, each described in a module of its own, `experiments.benchmark_<name>`:

python -m experiments.benchmark train --batch=32
python -m experiments.benchmark step-search --documents=1000000 --bytes=96
python -m experiments.benchmark search --peers=faiss,scann,usearch --json=FILE
python -m experiments.benchmark text --words=12
python -m experiments.benchmark build --n=10000000
python -m experiments.benchmark plan --constants=FILE.json

They print JSON, which --json=FILE keeps; those that have a table of it too, on the
error stream.
"""

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from ehi.data.datasets import open_dataset
from ehi.data.tokens import tokenise
from ehi.eval.provenance import git_commit, hardware
from ehi.eval.records import atomic_write
from ehi.model.pretrained import load_tower, resolve
from ehi.train.encode import apply_module, encode
from ehi.train.rows import shares_rows

PEER = "sentence-transformers"
PACKAGES = ("jax", "flax", "torch", PEER)


OWN_FILES = ("search", "plan")  # which say themselves what they write
COMMANDS = {
    "encode": "encoding a corpus",
    "train": "the train step whose tower trains",
    "search": "searching an index",
    "text": "searching by words, one question at a time",
    "step-search": "the search of the code table inside a step",
    "build": "building an index from shards",
    "plan": "what 1M to 1B documents take, from the JSON files of the others",
}


def main():
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, words in COMMANDS.items():
        command = commands.add_parser(name, help=words)
        if name in sys.argv[1:2]:  # the others may need what is not installed
            _add_arguments(name, command)
            if name not in OWN_FILES:
                command.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    result = args.run(args)
    if isinstance(result, str):  # Markdown
        print(result)
        return
    text = json.dumps(result, indent=2)
    print(text)
    if sys.argv[1] not in OWN_FILES and args.json is not None:
        atomic_write(args.json, f"{text}\n".encode())
    if hasattr(args, "table"):
        print(args.table(result), file=sys.stderr)


def _add_arguments(name: str, command) -> None:
    """The command line of one benchmark, by its own module."""
    if name == "encode":
        _add_encode_arguments(command)
        command.set_defaults(run=benchmark_encode)
        return
    part = name.replace("-", "_")
    module = importlib.import_module(f"experiments.benchmark_{part}")
    module.add_arguments(command)
    if name != "search":  # which sets its own
        command.set_defaults(run=getattr(module, f"benchmark_{part}"))
    if hasattr(module, "table"):
        command.set_defaults(table=module.table)


def _add_encode_arguments(command) -> None:
    command.add_argument(
        "--dataset", default="pydocs", help="name or path of a data set"
    )
    command.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    command.add_argument("--num-texts", type=int, default=300)
    command.add_argument("--max-length", type=int, default=256, help="in tokens")
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument(
        "--peer-batch-sizes", type=int, nargs="+", default=[32, 64, 128]
    )
    command.add_argument(
        "--padded-rows", action="store_true", help="also ours with one text a row"
    )


def benchmark_encode(args) -> dict:
    """Time ours and the peer in turn; the first run of ours, which compiles, apart."""
    texts = spread_texts(args.dataset, args.num_texts)
    pretrained = resolve(args.model)
    ours, tokens = our_encoder(pretrained, texts, args.max_length)
    runs = {"ours": ours}
    if args.padded_rows:
        runs["ours, a text a row"] = functools.partial(ours, share_rows=False)
    if importlib.util.find_spec(PEER.replace("-", "_")):
        peer = peer_encoder(pretrained, texts, args.max_length)
        for size in args.peer_batch_sizes:
            runs[f"{PEER}, batch {size}"] = functools.partial(peer, size)
    first = {name: timed(run) for name, run in runs.items()}
    repeats = [
        {name: timed(run) for name, run in runs.items()} for _ in range(args.repeats)
    ]
    wall, cpu = (
        {name: float(np.median([r[name][i] for r in repeats])) for name in runs}
        for i in (0, 1)
    )
    best = min((n for n in wall if n.startswith(PEER)), key=wall.get, default=None)
    return {
        "dataset": Path(args.dataset).name,  # never a path of the machine
        "model": args.model,
        "texts": len(texts),
        "tokens": int(tokens.lengths.sum()),
        "max_length": args.max_length,
        "cpus": len(os.sched_getaffinity(0)),
        "device": jax.default_backend(),
        "texts_per_second": {name: len(texts) / wall[name] for name in runs},
        "median_seconds": wall,
        # Of all threads: what the work costs on a machine that others use as well.
        "median_cpu_seconds": cpu,
        "all_seconds": {name: [round(r[name][0], 2) for r in repeats] for name in runs},
        "first_seconds": {name: first[name][0] for name in runs},
        "peer": best,
        "ratio": best and wall[best] / wall["ours"],
        "cpu_ratio": best and cpu[best] / cpu["ours"],
        # Ours compiles in its first run, so a corpus encoded once pays that too.
        "ratio_first_run": best and first[best][0] / first["ours"][0],
        "lowest_cosine": best and lowest_cosine(first["ours"][2], first[best][2]),
        "hardware": hardware(),
        "git_commit": git_commit(Path(__file__).parent),
        "versions": {name: version(name) for name in PACKAGES},
    }


def spread_texts(dataset: str, num_texts: int) -> list[str]:
    """Texts of `num_texts` documents, evenly spread over the corpus."""
    documents = open_dataset(dataset).documents
    rows = np.linspace(0, len(documents) - 1, min(num_texts, len(documents)))
    return [documents[int(row)].content for row in rows]


def our_encoder(pretrained, texts, max_length):
    """A function that tokenises and encodes, and the tokens."""
    graphdef, params = nnx.split(load_tower(pretrained))
    apply = functools.partial(apply_module, graphdef=graphdef)
    make_tokens = functools.partial(
        tokenise,
        texts,
        tokenizer_file=pretrained.tokenizer_file,
        max_length=max_length,
        cache_dir=None,
        name="texts",
    )

    def run(share_rows=None):
        if share_rows is None:
            share_rows = shares_rows()
        return encode(apply, params, make_tokens(), share_rows=share_rows)

    return run, make_tokens()


def peer_encoder(pretrained, texts, max_length):
    """A function of the batch size that does the same by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = SentenceTransformer(str(pretrained.folder), device=device)
    model.max_seq_length = max_length

    def run(batch_size):
        return model.encode(texts, batch_size=batch_size, show_progress_bar=False)

    return run


def timed(run):
    """Wall seconds of one call, CPU seconds of all its threads, and its result."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - start, time.process_time() - cpu_start, result


def lowest_cosine(a, b) -> float:
    """Lowest cosine of a row of a with the same row of b, all of length one."""
    return float(np.min(np.sum(a * b, axis=1)))


def version(package: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
