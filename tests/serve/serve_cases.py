"""Small indexes, the service in this process, and the service as a command."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for _name in ("starlette", "uvicorn", "httptools", "msgspec", "prometheus_client"):
    pytest.importorskip(_name, reason="needs the extra: pip install -e '.[serve]'")
pytest.importorskip("httpx2", reason="starlette's TestClient needs it: pip install")

from starlette.testclient import TestClient  # noqa: E402

from ehi.index import build_index, save_index  # noqa: E402
from ehi.serve.app import make_app  # noqa: E402
from ehi.serve.limits import Limits  # noqa: E402
from ehi.serve.reader import Reader  # noqa: E402

ROOT = Path(__file__).parents[2]
TOWER = ROOT / "tests/fixtures/bert_tiny"  # of width 32
WIDTH, NUM = 32, 60
LEAVES = 9


def unit(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


VECTORS = unit(NUM, WIDTH)
QUERIES = unit(12, WIDTH, seed=1)


def make_folder(path, *, words=True, strings=True, metadata=None, documents=None):
    """An index of 60 documents in 3 x 3 leaves."""
    nodes = [unit(1, 3, WIDTH, seed=2), unit(3, 3, WIDTH, seed=3)]
    index = build_index(
        VECTORS,
        [f"d{i}" for i in range(NUM)] if strings else range(NUM),
        tree={"kind": "per_node", "nodes": nodes, "scale": 5.0},
        encoder={"tower": str(TOWER), "query_length": 12} if words else None,
        rerank_vectors=True,
        metadata=metadata,
    )
    documents = documents or [{"title": f"t{i}", "line": ""} for i in range(NUM)]
    save_index(index, path, documents=documents)
    return path


@contextlib.contextmanager
def client_of(path, *, limits=None, **arguments):
    """A client of the service in this process, whose reader is `client.reader`."""
    limits = limits or Limits(batch_seconds=0.0)
    reader = Reader(path, limits)
    app = make_app(reader, limits, local_only=True, refresh_seconds=0.02, **arguments)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        client.reader = reader
        yield client


def assert_answers(results, hits, *, tolerance=1e-6):
    """The results of an answer are the hits of a direct search."""
    assert len(results) == len(hits.ids)
    for number, result in enumerate(results):
        found = [hit["id"] for hit in result["hits"]]
        wanted = [id for id in hits.ids[number].tolist() if id not in (None, -1)]
        assert found == wanted
        scores = [hit["score"] for hit in result["hits"]]
        expected = hits.scores[number][: len(scores)]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)
        assert result["visited"] == hits.visited[number]


@contextlib.contextmanager
def command(path, *options, **environment):
    """The service as a process; yields it and its port."""
    argv = [sys.executable, "-m", "ehi.serve", f"--index={path}", "--port=0", *options]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | environment,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert "documents at http://" in line, line + process.stderr.read()
        yield process, int(line.rstrip("/\n").rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


def request(port, method, path, body=None, headers=()):
    """Status, headers and JSON of one request over a socket of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.closing(connection):
        if isinstance(body, dict):
            body = json.dumps(body)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, body, kind | dict(headers))
        answer = connection.getresponse()
        text = answer.read()
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, answer.headers, json.loads(text) if is_json else text
