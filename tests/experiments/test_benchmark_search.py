import argparse
import json
import sys

import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import data, growth, peers
from experiments.benchmarks.data import exact_top, gaussian_mixture, overlap
from experiments.benchmarks.measure import ratios, summary

SMALL = (
    "--n=600", "--dim=16", "--lists=8", "--subspaces=4", "--probes", "2", "4",
    "--num-queries=30", "--repeats=1",
)  # fmt: skip
OURS = {"ehi raw", "ehi pq", "ehi pq + re-rank 100"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) -> what was printed, what was written, and stderr."""

    def run(*arguments):
        path = tmp_path / "results.json"
        command = ["benchmark", "search", *SMALL, f"--json={path}", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        benchmark.main()
        captured = capsys.readouterr()
        return json.loads(captured.out), json.loads(path.read_text()), captured.err

    return run


def without(monkeypatch, *modules):
    """Pretend that modules are not installed."""
    find = peers.importlib.util.find_spec
    monkeypatch.setattr(
        peers.importlib.util,
        "find_spec",
        lambda name: None if name in modules else find(name),
    )


def test_without_peers_ours_is_measured_alone(run, monkeypatch, tmp_path):
    without(monkeypatch, "faiss", "scann", "usearch")
    printed, written, stderr = run()
    assert printed == written
    assert written["ratios"] is None
    assert written["not_run"]["faiss"] == "pip install -e '.[faiss]'"
    assert "usearch is not installed, so it is skipped" in stderr
    rows = written["mixture"]["systems"]
    assert {row["system"] for row in rows} == OURS
    assert [row["probes"] for row in rows] == [2, 4] * 3
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_has_everything_that_is_reported(run):
    _, written, _ = run("--peers=")
    sizes = {"ehi raw": 64, "ehi pq": 4, "ehi pq + re-rank 100": 36}
    for row in written["mixture"]["systems"]:
        assert row["bytes_per_doc"] == sizes[row["system"]]
        assert 0 < row["recall@k"] <= 1
        assert row["qps_single"] > 0
        assert row["qps_batch"].keys() == {"1", "2"}
        assert row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
        assert row["build_seconds"] > 0
    recall = [
        point["recall@k"]
        for point in written["mixture"]["curve"]
        if point["system"] == "ehi raw"
    ]
    assert recall == sorted(recall) and recall[-1] == 1  # 8 of 8 lists


@pytest.mark.faiss
def test_faiss_searches_the_same_lists_and_codes(run):
    pytest.importorskip("faiss")
    _, written, _ = run("--peers=faiss")
    assert set(written["ratios"]) == {
        "raw_batch_2", "raw_batch_4", "raw_single",
        "pq_batch_2", "pq_batch_4", "pq_single",
    }  # fmt: skip
    assert all(ratio > 0 for ratio in written["ratios"].values())
    assert min(written["mixture"]["same_top10"].values()) >= 0.99
    recall = {
        (row["system"], row["probes"]): row["recall@k"]
        for row in written["mixture"]["systems"]
    }
    for kind in ("raw", "pq", "pq + re-rank 100"):
        ours, theirs = recall[f"ehi {kind}", 4], recall[f"faiss {kind}", 4]
        assert ours == pytest.approx(theirs, abs=0.01)


@pytest.mark.parametrize("peer", ["scann", "usearch"])
def test_other_peers_find_the_documents(run, peer):
    pytest.importorskip(peer)
    _, written, _ = run(f"--peers={peer}", "--n=2000")
    rows = [r for r in written["mixture"]["systems"] if r["system"].startswith(peer)]
    assert len(rows) == 2
    assert rows[1]["recall@k"] > 0.5
    assert rows[1]["bytes_per_doc"] >= 64


def test_an_unknown_peer_is_refused_by_name(run):
    with pytest.raises(ValueError, match="unknown peer 'fais'; allowed: faiss, scann"):
        run("--peers=fais")


def test_real_data_is_added_beside_the_mixture(run, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    texts = {"documents": 50, "queries": 40}

    def embed(name, side):
        return data.unit(rng.normal(size=(texts[side], 16)).astype("f4"))

    monkeypatch.setattr(data, "_embed", embed)
    _, written, _ = run("--peers=", "--data=real")
    assert written["real"]["documents"] == 600
    assert (tmp_path / "results-real.png").exists()


def test_real_copies_start_exact_and_stay_close(monkeypatch):
    rng = np.random.default_rng(0)
    rows = data.unit(rng.normal(size=(50, 16)).astype("f4"))
    monkeypatch.setattr(data, "_embed", lambda name, side: rows)
    documents = data.real_embeddings(350, num_queries=10).documents
    assert np.array_equal(documents[:100], np.concatenate([rows, rows]))
    cosine = (documents[100:] * documents[np.arange(100, 350) % 100]).sum(1)
    assert 0.85 < cosine.mean() < 0.97
    assert np.allclose(np.linalg.norm(documents, axis=1), 1, atol=1e-6)


def test_growth_reports_sizes_and_exponents(run, monkeypatch):
    _, written, _ = run("--growth", "--growth-sizes", "400", "900", "--dim=16")
    growth = written["growth"]
    small, large = growth["sizes"]
    assert (small["leaves"], large["leaves"]) == (20, 30)
    for size in growth["sizes"]:
        assert size["recall@k"] >= 0.9
        assert 0 < size["rss_mb_before_first_search"] < 200
        assert size["open_ms"] > 0
    assert growth["exponents"]["bytes_per_doc"] == pytest.approx(0, abs=1e-9)
    slope = np.log(large["single_ms"] / small["single_ms"]) / np.log(900 / 400)
    assert growth["exponents"]["single_ms"] == pytest.approx(slope)


def test_smallest_beam_is_the_first_that_reaches_the_recall():
    class Stub:
        num_leaves = 100

        def search(self, queries, k, *, beam, threads=1):
            found = np.where(np.arange(k) < beam // 3, np.arange(k), -1)
            return argparse.Namespace(ids=np.tile(found, (len(queries), 1)))

    args = argparse.Namespace(k=10, growth_recall=0.9)
    beam, recall = growth.smallest_beam(Stub(), np.zeros((2, 3)), args)
    assert (beam, recall) == (27, 0.9)


def test_exact_top_is_exact_over_blocks(monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 64)  # blocks of 16 documents
    rng = np.random.default_rng(0)
    documents, queries = rng.normal(size=(100, 8)), rng.normal(size=(7, 8))
    best = np.argsort(-(queries @ documents.T), axis=1)[:, :5]
    assert np.array_equal(np.sort(exact_top(documents, queries, 5)), np.sort(best))


def test_overlap_counts_missing_results_as_wrong():
    assert overlap(np.array([[3, -1], [5, 4]]), np.array([[1, 3], [4, 5]])) == 0.75


def test_the_mixture_is_reproducible_and_fills_a_given_array():
    first = gaussian_mixture(300, 8, num_queries=5, num_clusters=4, seed=1)
    out = np.empty((300, 8), np.float32)
    second = gaussian_mixture(300, 8, num_queries=5, num_clusters=4, seed=1, out=out)
    assert second.documents is out
    assert np.array_equal(first.documents, out)
    assert np.array_equal(first.queries, second.queries)
    assert np.allclose(np.linalg.norm(out, axis=1), 1, atol=1e-6)
    other = gaussian_mixture(300, 8, num_queries=5, num_clusters=4, seed=2)
    assert not np.array_equal(first.documents, other.documents)


def test_ratios_are_of_medians_ours_over_faiss():
    def timing(seconds):
        names = ("batch_1", "batch_2", "single")
        return {
            **{(name, "seconds"): seconds for name in names},
            ("single", "latencies"): [0.001, 0.002, 0.003],
        }

    timings = {
        (f"{system} {kind}", 8): timing(seconds)
        for kind in ("raw", "pq")
        for system, seconds in (("ehi", [1, 2, 9]), ("faiss", [4, 4, 100]))
    }
    assert ratios(timings, [8], "seconds") == {
        "raw_batch_8": 2, "raw_single": 2, "pq_batch_8": 2, "pq_single": 2
    }  # fmt: skip
    result = summary(timings["ehi pq", 8], batch=50)
    assert result["qps_batch"] == {"1": 25, "2": 25}
    assert result["latency_ms"]["p50"] == pytest.approx(2)
