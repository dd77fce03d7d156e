"""Growth of time per query and memory with the number of documents n.

The index has sqrt(n) PQ leaves. It is searched with the smallest beam that finds a
given share of what a search of all leaves finds.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ehi.index import build_index, save_index
from ehi.progress import track
from experiments.benchmarks.data import gaussian_mixture, overlap
from experiments.benchmarks.measure import measured_build
from experiments.benchmarks.peers import one_level_tree, train

_FLAT_QUERIES = 200  # queries that also search all leaves
_CLUSTERS, _CLUSTERS_AT = 500, 200_000

# Run in a new Python process, which imports only the index of this project.
_OPEN = """
import json, sys, time
import numpy as np
from ehi.index import open_index

def resident():
    with open("/proc/self/status") as file:
        lines = [line for line in file if line.startswith("VmRSS")]
    return int(lines[0].split()[1]) / 1024

path, beam, k = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
imported = resident()
start = time.perf_counter()
index = open_index(path, mmap=True)
opened = time.perf_counter() - start
before = resident()
query = np.random.default_rng(0).standard_normal((1, index.width), np.float32)
start = time.perf_counter()
index.search(query, k, beam=beam)
first = time.perf_counter() - start
print(json.dumps({
    "open_ms": 1000 * opened, "rss_mb_imported": imported,
    "rss_mb_before_first_search": before, "first_search_ms": 1000 * first,
    "rss_mb_after_first_search": resident(),
}))
"""


def benchmark_growth(args) -> dict:
    """Build, open and search an index of every size; fit: time per query = a n^b."""
    sizes = []
    for num in track(args.growth_sizes, "growth", "sizes"):
        sizes.append(measure_size(num, args))
        print(json.dumps(sizes[-1]), file=sys.stderr, flush=True)
    nums = [size["documents"] for size in sizes]
    exponents = {
        name: fit_exponent(nums, [size[name] for size in sizes])
        for name in ("single_ms", "batch_ms", "visited", "bytes_per_doc")
    }
    return {
        "recall": args.growth_recall,
        "clusters": args.growth_clusters,
        "sizes": sizes,
        "exponents": exponents,
    }


def measure_size(num: int, args) -> dict:
    """Measure one size: beam, milliseconds per query, bytes, and opening the index."""
    leaves = max(2, round(num**0.5))
    clusters = _CLUSTERS
    if args.growth_clusters == "grow":
        clusters = max(2, round(_CLUSTERS * (num / _CLUSTERS_AT) ** 0.5))
    with tempfile.TemporaryDirectory(prefix="ehi-growth-") as folder:
        # The documents are in a file, so that they take no memory.
        documents = np.lib.format.open_memmap(
            Path(folder) / "documents.npy", "w+", np.float32, (num, args.dim)
        )
        collection = gaussian_mixture(
            num, args.dim, num_queries=args.num_queries, num_clusters=clusters,
            seed=args.seed, out=documents,
        )  # fmt: skip
        centroids, codebooks = train(documents, leaves, args.subspaces, args.seed)
        index, build_seconds, peak = measured_build(
            lambda: build_index(
                documents, range(num), tree=one_level_tree(centroids),
                codebooks=codebooks,
            )
        )  # fmt: skip
        save_index(index, Path(folder) / "index")
        beam, recall = smallest_beam(index, collection.queries, args)
        times = time_queries(index, collection.queries, beam, args)
        opened = open_in_child(Path(folder) / "index", beam, args.k)
    return {
        "documents": num,
        "leaves": leaves,
        "clusters": clusters,
        "beam": beam,
        "recall@k": recall,
        **times,
        "bytes_per_doc": index.bytes_per_doc,
        "index_mb": index.index_bytes / 2**20,
        "build_seconds": build_seconds,
        "peak_build_mb": peak,
        **opened,
    }


def smallest_beam(index, queries, args) -> tuple[int, float]:
    """Return the fewest leaves that reach the wanted recall, and their recall.

    Recall does not fall as the beam grows, so the beam is doubled, then bisected.
    """
    queries = queries[:_FLAT_QUERIES]
    most = index.num_leaves
    wanted = index.search(queries, args.k, beam=most, threads=2).ids

    def recall(beam):
        return overlap(index.search(queries, args.k, beam=beam).ids, wanted)

    high = 1
    while high < most and recall(high) < args.growth_recall:
        high *= 2
    low, high = high // 2, min(high, most)  # low is too small
    while high - low > 1:
        middle = (low + high) // 2
        if recall(middle) < args.growth_recall:
            low = middle
        else:
            high = middle
    return high, recall(high)


def time_queries(index, queries, beam, args) -> dict:
    """Return the median milliseconds per query on one thread, and documents visited."""
    singles, batches = [], []
    visited = index.search(queries, args.k, beam=beam).visited.mean()
    for _ in range(args.repeats):
        start = time.perf_counter()
        index.search(queries, args.k, beam=beam)
        batches.append((time.perf_counter() - start) / len(queries))
        for row in range(min(100, len(queries))):
            start = time.perf_counter()
            index.search(queries[row : row + 1], args.k, beam=beam)
            singles.append(time.perf_counter() - start)
    return {
        "single_ms": 1000 * float(np.median(singles)),
        "batch_ms": 1000 * float(np.median(batches)),
        "visited": float(visited),
    }


def open_in_child(path: Path, beam: int, k: int) -> dict:
    """Measure in a new process the milliseconds to open an index, and its memory."""
    command = [sys.executable, "-c", _OPEN, str(path), str(beam), str(k)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return json.loads(done.stdout)


def fit_exponent(nums, values) -> float | None:
    """Return the least-squares slope of log values over log n; None for one size."""
    if len(set(nums)) < 2:
        return None
    return float(np.polyfit(np.log(nums), np.log(values), 1)[0])
