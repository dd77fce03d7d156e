"""What tests of several folders start from: a tiny BEIR folder, real data, a record."""

import json
import logging
import os
import tempfile

import pytest

from ehi.data import download
from ehi.eval.records import Record

# Tiny shapes: compiling takes longer than running, so compile quickly, and each program
# once for all processes: those of pytest-xdist and all that tests start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="ehi-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

DOCUMENTS = [
    ("d1", "Leaves", "The tree keeps its documents in leaves. A leaf is a list."),
    ("d2", "Codes", "A code names one codeword of every subspace. It takes a byte."),
    ("d3", "Beams", "A beam search keeps the best nodes of a level. It is greedy."),
    ("d4", "", "Rotations keep every distance between two points the same."),
    ("d5", "Heads", "A head maps what the tower says to the width of the index."),
    ("d6", "Towers", "A tower reads the tokens of a text and says what it means."),
]
QUERIES = [
    ("q1", "where are documents kept"),
    ("q2", "what is a code"),
    ("q3", "search that keeps the best nodes"),
    ("q4", "what keeps distances"),
    ("q5", "what reads a text"),
]
# q1 and q2 share the answer d2: they belong on the same side of any split.
QRELS = {
    "train": [("q1", "d1", 1), ("q1", "d2", 2), ("q2", "d2", 1), ("q3", "d3", 1)],
    "test": [("q4", "d4", 1), ("q5", "d6", 1), ("q5", "d5", 0)],
}


SLOWEST = ("tests/parallel/", "tests/encode/", "tests/train/")


def pytest_collection_modifyitems(items):
    """The longest files first: no process is left alone with one of them at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLOWEST))


@pytest.fixture(autouse=True)
def same_logger():
    """Undo what a command that a test calls does to the logger of `ehi`."""
    logger = logging.getLogger("ehi")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def beir_folder(tmp_path):
    """Folder of the BEIR layout: 6 documents, 5 queries, qrels train and test."""
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": id, "title": title, "text": text} for id, title, text in DOCUMENTS
    ]
    queries = [{"_id": id, "text": text} for id, text in QUERIES]
    for name, records in (("corpus", corpus), ("queries", queries)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    for split, judged in QRELS.items():
        rows = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, j)) for j in judged)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def real_data():
    """Function: name -> folder of a real data set, or a skip that says what to set."""

    def find(name):
        path = download.search_folders(name)
        if path is None:
            pytest.skip(f"EHI_DATA lists no folder that holds {name!r}")
        return path

    return find


@pytest.fixture
def make_record():
    """Function: changed fields -> a result record."""

    def make(**changes):
        fields = {
            "system": "ehi",
            "dataset": "pydocs",
            "split": "test",
            "seed": 0,
            "budget": "visit-10",
            "ndcg_at_10": 0.5,
            "rr_at_10": 0.4,
            "recall_at_10": 0.6,
            "recall_at_100": 0.8,
            "recall_at_1000": 0.9,
            "docs_visited": 0.0991,
            "nodes_scored": 0.01,
            "bytes_per_doc": 1536.0,
            "compression": 1.0,
            "index_bytes": 8_000_000,
            "beam": 6,
            "rerank": 0,
            "leaf_load_max": 120,
            "leaf_load_cv": 0.2,
            "latency_ms_p50": 0.25,
            "latency_ms_p95": 0.3,
            "latency_ms_p99": 0.4,
            "qps_batch": 12345.6,
            "threads": 1,
            "train_seconds": 33.4,
            "build_seconds": 1.0,
            "config_hash": "015abd7f5cc5",
            "recipe": 1,
            "git_commit": "f" * 40,
            "versions": {"python": "3.11.7"},
            "hardware": "a processor, 2 cores, 8 GiB",
            "corpus_sha256": "ab" * 32,
        }
        return Record(**fields | changes)

    return make
