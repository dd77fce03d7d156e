"""Speed of encoding a corpus, beside sentence-transformers.

    python -m experiments.benchmark encode --dataset=pydocs --num-texts=300

Ours and, if it is installed, the peer take turns to tokenise and encode the same texts
at the same length and precision. The peer is compared at its best batch size.

  texts/s, tokens/s   texts or tokens / median seconds; padding is not counted
  MFU                 F / (seconds x devices x peak), where F = sum over the texts of
                      a + b n + c n^2: 2 x the multiplications of the tower's matrix
                      products for a text of n tokens. Linear layers grow as n,
                      attention as n^2; both are counted in our jaxpr, without padding
                      and without the other texts of a row. The peer gets the same F
  peak                of a GPU or TPU the bfloat16 rate in `flops.PEAKS`, also for
                      float32; of a CPU the best measured product of the type
  ratio               peer / ours, of the medians; `cpu_ratio` is that of the CPU
                      seconds of all threads, which other programs disturb less
  host seconds        of ours with a tower that returns zeros: tokenising, filling rows
                      and collecting; `host_share` is their share of ours
  memory              MB at the peak of one more run: of the process, over before, and
                      of a GPU or TPU that reports it, with the weights. For jax it is
                      the peak of all runs so far
"""

import functools
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ehi.data.datasets import open_dataset
from ehi.data.tokens import tokenise
from ehi.encode.encode import apply_module, encode
from ehi.encode.packing import packing_pays
from ehi.eval.provenance import git_commit, hardware, versions
from ehi.model.pretrained import load_tower, resolve
from ehi.model.tower import texts_of_row
from ehi.progress import track
from experiments.benchmarks.measure import peak_memory
from experiments.benchmarks.train import PEER, installed
from experiments.run.flops import peak_flops, text_flops

PACKAGES = ("jax", "flax", "torch", PEER)


def add_arguments(command) -> None:
    """Add the options of `encode`."""
    command.add_argument(
        "--dataset", default="pydocs", help="name or path of a data set"
    )
    command.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    command.add_argument("--num-texts", type=int, default=300)
    command.add_argument("--max-length", type=int, default=256, help="tokens")
    command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument(
        "--peer-batch-sizes", type=int, nargs="+", default=[32, 64, 128]
    )
    command.add_argument(
        "--padded-rows",
        action="store_true",
        help="also time ours with one text per row",
    )
    command.add_argument(
        "--peak-flops", type=float, help="FLOP/s of a device that is not in the list"
    )


def benchmark_encode(args) -> dict:
    """Time ours and the peer in turn, after a first run, which compiles ours."""
    peak, source = peak_flops(args.dtype, args.peak_flops)
    texts, pretrained = spread_texts(args.dataset, args.num_texts), resolve(args.model)
    tower = load_tower(pretrained, dtype=jnp.dtype(args.dtype))
    ours, tokens = our_encoder(pretrained, tower, texts, args.max_length)
    runs = {"ours": ours}
    if args.padded_rows:
        runs["ours, a text a row"] = functools.partial(ours, pack=False)
    if installed():
        peer = peer_encoder(pretrained, texts, args.max_length, args.dtype)
        for size in args.peer_batch_sizes:
            runs[f"{PEER}, batch {size}"] = functools.partial(peer, size)
    first = {name: timed(run) for name, run in runs.items()}
    repeats = [
        {name: timed(run) for name, run in runs.items()}
        for _ in track(range(args.repeats), "time", "rounds")
    ]
    wall, cpu = (
        {name: float(np.median([r[name][i] for r in repeats])) for name in runs}
        for i in (0, 1)
    )
    best = min((n for n in wall if n.startswith(PEER)), key=wall.get, default=None)
    host = functools.partial(ours, tower=zeros_of_width(tower.width))
    host_seconds = float(np.median([timed(host)[0] for _ in range(args.repeats)]))
    return {
        "dataset": Path(args.dataset).name,  # results name no path of the machine
        "model": args.model,
        "texts": len(texts),
        "tokens": int(tokens.lengths.sum()),
        "max_length": args.max_length,
        "dtype": args.dtype,
        "cpus": len(os.sched_getaffinity(0)),
        "device": jax.default_backend(),
        "median_seconds": wall,
        # CPU time of all threads: other programs on the machine disturb it less.
        "median_cpu_seconds": cpu,
        "all_seconds": {name: [round(r[name][0], 2) for r in repeats] for name in runs},
        "first_seconds": {name: first[name][0] for name in runs},
        **speeds(wall, tokens.lengths, text_flops(tower, tokens.lengths), peak),
        "peak_source": source,
        "host_seconds": host_seconds,
        "host_share": host_seconds / wall["ours"],
        "memory_mb": {
            n: peak_memory(run, torch=n.startswith(PEER)) for n, run in runs.items()
        },
        "peer": best,
        "ratio": best and wall[best] / wall["ours"],
        "cpu_ratio": best and cpu[best] / cpu["ours"],
        # The first run of ours compiles; a corpus that is encoded once pays for it.
        "ratio_first_run": best and first[best][0] / first["ours"][0],
        "lowest_cosine": best and lowest_cosine(first["ours"][2], first[best][2]),
        "hardware": hardware(),
        "git_commit": git_commit(Path(__file__).parent),
        "versions": versions(PACKAGES),
    }


def speeds(seconds, lengths, flops: float, peak: float) -> dict:
    """Compute the speeds of each run from its seconds; the peer uses one device.

    Args:
      seconds: name of the run -> seconds.
      lengths: tokens of each text (N,).
      flops: FLOPs of all texts.
      peak: FLOP/s of a device.
    """
    ours = jax.local_device_count()
    devices = {n: 1 if n.startswith(PEER) else ours for n in seconds}
    return {
        "texts_per_second": {n: len(lengths) / s for n, s in seconds.items()},
        "tokens_per_second": {n: int(lengths.sum()) / s for n, s in seconds.items()},
        "flops": flops,
        "flops_per_second": {n: flops / s for n, s in seconds.items()},
        "mfu": {n: flops / s / (devices[n] * peak) for n, s in seconds.items()},
        "devices": ours,
        "peak_flops": peak,
    }


def spread_texts(dataset: str, num_texts: int) -> list[str]:
    """Return the texts of `num_texts` documents, evenly spread over the corpus."""
    documents = open_dataset(dataset).documents
    rows = np.linspace(0, len(documents) - 1, min(num_texts, len(documents)))
    return [documents[int(row)].content for row in rows]


def our_encoder(pretrained, tower, texts, max_length):
    """Return a function that tokenises and encodes, and the tokens."""
    graphdef, params = nnx.split(tower)
    apply = functools.partial(apply_module, graphdef=graphdef)
    make_tokens = functools.partial(
        tokenise,
        texts,
        tokenizer_file=pretrained.tokenizer_file,
        max_length=max_length,
        cache_dir=None,
        name="texts",
    )

    def run(pack=None, tower=apply):
        if pack is None:
            pack = packing_pays()
        return encode(tower, params, make_tokens(), pack=pack)

    return run, make_tokens()


def zeros_of_width(width: int):
    """Return a tower for `encode` that computes nothing."""

    def apply(params, ids, mask):
        texts = () if mask.dtype == bool else (texts_of_row(mask.shape[1]),)
        return np.zeros((len(ids), *texts, width), np.float32)

    return apply


def peer_encoder(pretrained, texts, max_length, dtype: str):
    """Return a function of the batch size that encodes with sentence-transformers.

    In bfloat16 its weights are bfloat16 too, as is usual with it.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda":  # TF32, the default of jax
        torch.set_float32_matmul_precision("high")
    model = SentenceTransformer(str(pretrained.folder), device=device)
    model.to(getattr(torch, dtype))
    model.max_seq_length = max_length

    def run(batch_size):
        return model.encode(texts, batch_size=batch_size, show_progress_bar=False)

    return run


def timed(run):
    """Return the wall seconds of a call, the CPU seconds of all threads, the result."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - start, time.process_time() - cpu_start, result


def lowest_cosine(a, b) -> float:
    """Return the lowest cosine between a row of `a` and the same row of `b`."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.min(np.sum(a * b, axis=1) / norms))


def table(result: dict) -> str:
    """Return the result as Markdown."""
    lines = [
        "| encoder | seconds | texts/s | tokens/s | GFLOP/s | MFU | MB host | device |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, seconds in result["median_seconds"].items():
        memory = result["memory_mb"][name].values()
        host, device = ("" if mb is None else f"{mb:.0f}" for mb in memory)
        lines.append(
            f"| {name} | {seconds:.2f} | {result['texts_per_second'][name]:.1f} | "
            f"{result['tokens_per_second'][name]:.0f} | "
            f"{result['flops_per_second'][name] / 1e9:.0f} | "
            f"{result['mfu'][name]:.1%} | {host} | {device} |"
        )
    lines.append(
        f"\n{result['dtype']}; on the host {result['host_seconds']:.2f} s, "
        f"{result['host_share']:.1%} of ours"
    )
    if result["peer"]:
        lines.append(
            f"{result['peer']} over ours: {result['ratio']:.2f} in time, "
            f"{result['cpu_ratio']:.2f} in CPU time"
        )
    return "\n".join(lines)
