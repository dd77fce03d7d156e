"""The service under load, on loopback, beside direct search.

    python -m experiments.benchmark serve --index=runs/pydocs/index --json=FILE

Starts `ehi.serve` on a copy of an index and asks it questions of `--dataset`, in words
and by their vectors:

    single      one client, one query after the other
    together    `--clients` clients, one query each, which the service batches
    lists       one client, `--list` queries in each request

Then other clients ask while another process adds, deletes and compacts. Every answer
is compared with a direct search of the same state of the index: `wrong` are those that
differ by more than rounding, `swapped` are right but for documents whose scores are
equal up to rounding, `lost` are requests without an answer. A phase ends after
`--requests` requests or `--seconds` seconds. `direct` are the same searches in this
process, without HTTP. Rates suffer if the processor is shared with other programs; the
CPU time of a query, of all threads of the service, does so less.
"""

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from ehi.eval.provenance import git_commit, hardware, versions
from ehi.index import Index, open_index
from experiments.benchmarks.text import questions_of
from experiments.command import user_path

PACKAGES = ("numpy", "starlette", "uvicorn", "httptools", "msgspec")
K = 10
_CLOSE = 1e-5  # scores that differ by less are equal up to rounding
_QUESTIONS = 256
_ADDED = 50  # documents that the writer adds and deletes


def add_arguments(command) -> None:
    """Add the options of `serve`."""
    command.add_argument("--index", type=user_path, required=True)
    command.add_argument("--dataset", default="pydocs", help="source of the questions")
    command.add_argument("--words", type=int, default=8, help="words per question")
    command.add_argument("--requests", type=int, default=2000)
    command.add_argument("--seconds", type=float, default=10.0)
    command.add_argument("--clients", type=int, default=32)
    command.add_argument("--list", type=int, default=64)
    command.add_argument("--rounds", type=int, default=5, help="of the other writer")


def benchmark_serve(args) -> dict:
    """Ask in every way, then while another process writes."""
    texts = questions_of(args.dataset, args.words, _QUESTIONS)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        shutil.copytree(args.index, path)
        index = open_index(path)
        vectors = index.text_encoder(texts)
        asked = {"text": texts, "vector": vectors.tolist()}
        expected = {1: direct_answers(index, vectors)}
        with service(path) as port:
            phases = {}
            for field in asked:
                for name, clients, size in (
                    ("single", 1, 1),
                    ("together", args.clients, 1),
                    ("lists", 1, args.list),
                ):
                    load_test = Load(port, field, asked[field], size)
                    asyncio.run(load_test.run(clients, args.requests, args.seconds))
                    phases[f"{field} {name}"] = load_test.summary(expected)
            compaction = while_another_writes(port, path, vectors, expected, args)
        direct = direct_rates(index, texts, vectors, args)
        documents = index.num_documents
    names = ("dataset", "words", "clients", "list", "rounds")
    return {
        **{name: getattr(args, name) for name in names},
        "dataset": Path(args.dataset).name,  # results name no path of the machine
        "documents": documents,
        "k": K,
        "setting": index.setting,
        "phases": phases,
        "compaction": compaction,
        "direct": direct,
        # Above the number of cores, others computed meanwhile.
        "load_average": [load, os.getloadavg()[0]],
        "hardware": hardware(),
        "versions": versions(PACKAGES),
        "git_commit": git_commit(Path(__file__).parent),
    }


@contextlib.contextmanager
def service(path: Path):
    """Start `ehi.serve` on a free port; yield the port; end it by SIGTERM.

    Raises:
      ChildProcessError: it did not start, or did not end with 0.
    """
    command = [sys.executable, "-m", "ehi.serve", f"--index={path}", "--port=0"]
    command += ["--refresh=0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if not line:
            raise ChildProcessError(f"ehi.serve ended with {process.wait()}")
        yield int(line.rstrip("/\n").rpartition(":")[2])
        process.terminate()
        if process.wait(60):
            raise ChildProcessError(f"ehi.serve ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


class Load:
    """Clients that ask one question, or several, in each request.

    Args:
      port: of the service on loopback.
      field: 'text' or 'vector'.
      queries: JSON values of that field.
      size: queries of a request.
    """

    def __init__(self, port: int, field: str, queries: list, size: int):
        self.port, self.size = port, size
        plain = {"k": K, "documents": False}
        starts = range(0, len(queries) - size + 1, size)
        self.numbers = [list(range(start, start + size)) for start in starts]
        self.bodies = [
            json.dumps(
                plain | {f"{field}s": [queries[i] for i in numbers]}
                if size > 1
                else plain | {field: queries[numbers[0]]}
            ).encode()
            for numbers in self.numbers
        ]
        self.seconds: list[float] = []
        self.answers: list[tuple[list[int], dict]] = []
        self.lost: list[str] = []

    async def run(self, clients: int, requests: int, seconds: float, stop=None):
        """Ask until there were so many requests, or the time is over, or `stop()`."""
        todo, cpu = iter(range(requests)), cpu_seconds(self.port)
        self.started = time.perf_counter()
        end = self.started + seconds

        async def client():
            streams = None
            for number in todo:
                if time.perf_counter() > end or (stop and stop()):
                    return
                streams = streams or await asyncio.open_connection(
                    "127.0.0.1", self.port
                )
                started = time.perf_counter()
                try:
                    await self._ask(number % len(self.bodies), *streams)
                except (OSError, ValueError, EOFError) as error:
                    self.lost.append(f"{type(error).__name__}: {error}")
                    streams[1].close()
                    streams = None
                self.seconds.append(time.perf_counter() - started)
            if streams:
                streams[1].close()

        await asyncio.gather(*(client() for _ in range(clients)))
        self.elapsed = time.perf_counter() - self.started
        self.cpu = cpu_seconds(self.port) - cpu

    async def _ask(self, number, reader, writer):
        body = self.bodies[number]
        head = (
            "POST /search HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        size = next(int(x[15:]) for x in lines if x.startswith(b"content-length:"))
        answer = json.loads(await reader.readexactly(size))
        if b" 200 " not in lines[0]:
            raise ValueError(answer["error"])
        self.answers.append((self.numbers[number], answer))

    def summary(self, expected: dict) -> dict:
        """Rates, percentiles and mistakes.

        Args:
          expected: generation -> ids and scores, each a list for every query.
        """
        verdicts = [
            verdict(result, expected[answer["generation"]], number)
            for numbers, answer in self.answers
            for number, result in zip(numbers, answer["results"], strict=True)
        ]
        p50, p99 = 1e3 * np.percentile(self.seconds, [50, 99])
        rate = len(self.answers) / self.elapsed
        return {
            "requests": len(self.seconds),
            "requests_per_second": rate,
            "queries_per_second": rate * self.size,
            "milliseconds": {"p50": float(p50), "p99": float(p99)},
            "cpu_milliseconds_per_query": 1e3 * self.cpu / max(len(verdicts), 1),
            "swapped": verdicts.count("swapped"),
            "wrong": verdicts.count("wrong"),
            "lost": len(self.lost),
            **({"why_lost": self.lost[:3]} if self.lost else {}),
        }


def cpu_seconds(port: int) -> float:
    """Return the CPU seconds of the service, as it tells Prometheus."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    named = "process_cpu_seconds_total "
    return next(float(x.removeprefix(named)) for x in lines if x.startswith(named))


def verdict(result: dict, expected: tuple[list, list], number: int) -> str:
    """Return 'right', 'swapped' or 'wrong': see the module."""
    ids, scores = expected[0][number], expected[1][number]
    found = [hit["score"] for hit in result["hits"]]
    if len(found) != len(scores) or np.abs(np.subtract(found, scores)).max() > _CLOSE:
        return "wrong"
    return "right" if [hit["id"] for hit in result["hits"]] == ids else "swapped"


def direct_answers(index: Index, vectors: np.ndarray) -> tuple[list, list]:
    """Return ids and scores of a direct search for each query on its own."""
    hits = [index.search(vectors[i : i + 1], K) for i in range(len(vectors))]
    return [h.ids[0].tolist() for h in hits], [h.scores[0].tolist() for h in hits]


def direct_rates(index: Index, texts: list, vectors: np.ndarray, args) -> dict:
    """Return rates and CPU time without HTTP, one query at a time and in lists."""
    ways = {"text": (index.search_text, texts), "vector": (index.search, vectors)}
    found = {}
    for field, (search, queries) in ways.items():
        for name, size in (("single", 1), ("lists", args.list)):
            started, cpu, count = time.perf_counter(), time.process_time(), 0
            for start in itertools.cycle(range(0, len(queries) - size + 1, size)):
                if time.perf_counter() > started + min(args.seconds, 3):
                    break
                search(queries[start : start + size], K)
                count += size
            cpu = time.process_time() - cpu
            found[f"{field} {name}"] = {
                "queries_per_second": count / (time.perf_counter() - started),
                "cpu_milliseconds_per_query": 1e3 * cpu / count,
            }
    return found


def while_another_writes(port, path, vectors, expected, args) -> dict:
    """Ask by vector while another process adds, deletes and compacts."""
    context = multiprocessing.get_context("spawn")
    states = context.Queue()
    arguments = (path, vectors, args.rounds, states)
    writer = context.Process(target=write_in_rounds, args=arguments)
    load_test = Load(port, "vector", vectors.tolist(), 1)
    writer.start()

    async def ask():
        collecting = asyncio.create_task(asyncio.to_thread(collect))
        await load_test.run(args.clients, 10**6, 12 * args.seconds, collecting.done)
        await collecting

    def collect():
        for _ in range(3 * args.rounds):
            generation, answers = states.get(timeout=120)
            expected[generation] = answers

    try:
        asyncio.run(ask())
        writer.join(60)
    finally:
        writer.terminate()
    seen = {answer["generation"] for _, answer in load_test.answers}
    return {
        **load_test.summary(expected),
        "generations_written": 3 * args.rounds,
        "generations_seen": len(seen),
    }


def write_in_rounds(path, vectors, rounds, states) -> None:
    """Add, delete and compact in rounds; tell what each state answers."""
    index = open_index(path)
    first = index.external_ids(np.arange(1)).tolist()[0]
    added, fresh = vectors[:_ADDED], itertools.count()
    for _ in range(rounds):
        if isinstance(first, str):
            ids = [f"new-{next(fresh)}" for _ in added]
        else:
            ids = [2**40 + next(fresh) for _ in added]
        shown = [{"title": str(id)} for id in ids] if index.has_documents else None
        for write, arguments in (
            (index.add, {"embeddings": added, "ids": ids, "documents": shown}),
            (index.delete, {"ids": ids[::2]}),
            (index.compact, {}),
        ):
            write(**arguments)
            generation = index.folder.manifest["generation"]
            states.put((generation, direct_answers(index, vectors)))


def table(result: dict) -> str:
    """Return rates and percentiles as Markdown."""
    lines = [
        "| | requests/s | queries/s | p50 ms | p99 ms | CPU ms | wrong | lost |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    phases = result["phases"] | {"while another process writes": result["compaction"]}
    for name, row in phases.items():
        p50, p99 = row["milliseconds"].values()
        lines.append(
            f"| {name} | {row['requests_per_second']:.3g} "
            f"| {row['queries_per_second']:.3g} | {p50:.1f} | {p99:.1f} "
            f"| {row['cpu_milliseconds_per_query']:.2f} | {row['wrong']} "
            f"| {row['lost']} |"
        )
    return "\n".join(lines)
