"""Cost of 1M to 1B documents, computed from the results of the other benchmarks.

    python -m experiments.benchmark plan --train-devices=8 --encode-devices=8 \\
        --constants train.json encode.json build.json search.json step-search.json

Reads their JSON files, which it recognises by their keys, and prints a Markdown table.
With C documents, and C0 documents in the measurement:

  training   C x --examples-per-document / (examples/s of `train` x devices)
  encoding   C x --tokens-per-document / (tokens/s of `encode` x devices)
  building   C / (documents/s of `build`), one machine
  memory     index bytes x C / C0, and tree parameters x sqrt(C / C0), since the number
             of leaves grows as the root of C; from `build`
  latency    median ms of a single query for PQ leaves at the fewest probes, from
             `search`, x C / C0: the same share of documents is visited. With the file
             of `search --growth`: ms at its largest size x (C / C0)^b, where b is the
             exponent measured at equal recall.
  step       seconds of one `step-search` x C / C0 x d0 / training devices: the time
             that JPQ adds to every training step

A cell with C = C0 is `measured`, except for training and encoding, whose rates come
from a sample. All other cells are `extrapolated`: they are only the formula, and assume
that devices share the work without loss. A row without a file is `not measured`.
"""

import json
import math
from pathlib import Path

DOCUMENTS = (10**6, 10**7, 10**8, 10**9)
LABELS = ("1M", "10M", "100M", "1B")
MISSING = "not measured"
# Keys that only the file of a benchmark has.
KEYS = {
    "train": "examples_per_second",
    "encode": "median_seconds",
    "build": "index_mb",
    "search": "mixture",
    "growth": "growth",
    "step-search": "predicted_seconds",
}


def add_arguments(command) -> None:
    """Add the options of `plan`."""
    command.add_argument(
        "--constants", type=Path, nargs="+", required=True,
        help="JSON files of other benchmarks",
    )  # fmt: skip
    command.add_argument("--tokens-per-document", type=float, default=128)
    command.add_argument(
        "--examples-per-document", type=float, default=1.0, help="training examples"
    )
    command.add_argument("--train-devices", type=int, default=1)
    command.add_argument("--encode-devices", type=int, default=1)


def benchmark_plan(args) -> str:
    """Return the table in Markdown, followed by the sources of its numbers."""
    found = read(args.constants)
    rows = {
        "training": training(found, args),
        "encoding": encoding(found, args),
        "building": building(found),
        "memory of the index": memory(found),
        "search latency": latency(found),
        "search in a training step": step(found, args),
    }
    lines = [
        "| documents | " + " | ".join(LABELS) + " |",
        "|---" * (len(LABELS) + 1) + "|",
    ]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(cells or [MISSING] * 4) + " |")
    lines += ["", "Computed from:", ""]
    lines += [f"- {kind}: {describe(value)}" for kind, value in found.items()]
    lines.append(
        f"- assumed: {args.tokens_per_document:g} tokens a document, "
        f"{args.examples_per_document:g} training examples a document, "
        f"{args.train_devices} devices train, {args.encode_devices} encode"
    )
    absent = [kind for kind in KEYS if kind not in found and kind != "growth"]
    if absent:
        lines.append(f"- {MISSING}: {', '.join(absent)}")
    return "\n".join(lines)


def read(paths) -> dict[str, dict]:
    """Return benchmark -> its result.

    Raises:
      ValueError: a file is not of a benchmark, or two files are of the same one.
    """
    found = {}
    for path in paths:
        try:
            result = json.loads(Path(path).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from None
        kind = kind_of(result)
        if kind is None:
            raise ValueError(
                f"{path} is not of a known benchmark; allowed: {', '.join(KEYS)}"
            )
        if kind in found:
            raise ValueError(f"{path} is the second file of {kind!r}; give one")
        found[kind] = result
    return found


def kind_of(result) -> str | None:
    """Return the benchmark that made a result, or None."""
    if not isinstance(result, dict):
        return None
    steps = result.get("steps")
    if isinstance(steps, dict) and "whole" in steps:
        return "train"
    if "tokens" not in result and "median_seconds" in result:
        return None  # a file of a former benchmark of the train step
    kinds = [kind for kind, key in KEYS.items() if kind != "train" and key in result]
    return kinds[0] if kinds else None


def training(found, args):
    """Return the cells of training."""
    if "train" not in found:
        return None
    result = found["train"]
    rate = result["steps"]["whole"]["examples_per_second"] / result["devices"]
    return [
        cell(duration(c * args.examples_per_document / (rate * args.train_devices)))
        for c in DOCUMENTS
    ]


def encoding(found, args):
    """Return the cells of encoding."""
    if "encode" not in found:
        return None
    rate = found["encode"]["tokens"] / found["encode"]["median_seconds"]["ours"]
    return [
        cell(duration(c * args.tokens_per_document / (rate * args.encode_devices)))
        for c in DOCUMENTS
    ]


def building(found):
    """Return the cells of building."""
    if "build" not in found:
        return None
    rate, start = found["build"]["documents_per_second"], found["build"]["documents"]
    return [cell(duration(c / rate), c == start) for c in DOCUMENTS]


def memory(found):
    """Return the cells of the memory of the index."""
    if "build" not in found:
        return None
    start = found["build"]["documents"]
    parameters = found["build"]["parameters_mb"]
    rest = found["build"]["index_mb"] - parameters
    return [
        cell(size(rest * c / start + parameters * math.sqrt(c / start)), c == start)
        for c in DOCUMENTS
    ]


def latency(found):
    """Return the cells of the latency of a query."""
    if "growth" in found:
        growth = found["growth"]["growth"]
        largest = max(growth["sizes"], key=lambda size: size["documents"])
        exponent = growth["exponents"]["single_ms"] or 1.0  # None: one size only
        milliseconds, start = largest["single_ms"], largest["documents"]
    elif "search" in found:
        mixture, exponent = found["search"]["mixture"], 1.0
        ours = [row for row in mixture["systems"] if row["system"] == "ehi pq"]
        fewest = min(ours, key=lambda row: row["probes"])
        milliseconds, start = fewest["latency_ms"]["p50"], mixture["documents"]
    else:
        return None
    return [
        cell(duration(milliseconds / 1e3 * (c / start) ** exponent), c == start)
        for c in DOCUMENTS
    ]


def step(found, args):
    """Cells of the search of the code table in a training step."""
    if "step-search" not in found:
        return None
    result = found["step-search"]
    work = result["seconds"] * result["devices"] / args.train_devices
    same = result["devices"] == args.train_devices
    start = result["documents"]
    return [cell(duration(work * c / start), same and c == start) for c in DOCUMENTS]


def cell(text: str, measured: bool = False) -> str:
    """Return a value and its origin."""
    return f"{text} ({'measured' if measured else 'extrapolated'})"


def duration(seconds: float) -> str:
    """Format seconds in the unit that reads best."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"


def size(mebibytes: float) -> str:
    """Format MiB, as GiB from one GiB on."""
    if mebibytes >= 1024:
        return f"{mebibytes / 1024:.3g} GiB"
    return f"{mebibytes:.3g} MiB"


def describe(result: dict) -> str:
    """Return on one line where a constant was measured."""
    documents = result.get("documents", result.get("mixture", {}).get("documents"))
    parts = [f"{documents:,} documents"] if documents else []
    parts += [f"{result['texts']:,} texts"] if "texts" in result else []
    machine = result.get("hardware") or f"{result.get('cpus', '?')} CPU cores"
    return ", ".join([*parts, machine])
