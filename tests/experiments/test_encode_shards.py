"""A finished run encodes a corpus in shards, which give the index of the run."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from topics import tiny

from ehi.encode.documents import DocumentEncoder
from ehi.index import open_index
from experiments import encode, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A config, and the workdir of its run."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny(
        corpus, systems=("kmeans-tree", "ehi-pq"), budgets=("visit-50", "visit-50-8x")
    )
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.getbasetemp() / "main-cache"
        patch.setenv("EHI_CACHE", str(cache))
        main.run(config, workdir)
    return config, workdir


def bytes_of(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def by_document(index):
    """Leaf and code, or vector, of every document in order of their rows."""
    segment = index.segments[0]
    leaf_of_copy = np.repeat(np.arange(index.num_leaves), np.diff(segment.leaf_offsets))
    order = np.argsort(segment.leaf_rows)
    stored = segment.codes if segment.vectors is None else segment.vectors
    return leaf_of_copy[order], stored[order]


def code_gaps(index, x, leaves, codes, others):
    """|z - codeword|^2 with the other codes minus with these codes (N, M)."""
    z = (x - index.leaf_centroids[leaves]) @ index.rotation
    z = z.reshape(len(x), len(index.codebooks), -1)  # (N, M, S)
    distances = []
    for stored in (others, codes):
        numbers = np.stack([stored % 16, stored // 16], axis=2).reshape(len(x), -1)
        words = index.codebooks[np.arange(numbers.shape[1]), numbers]
        distances.append(((z - words) ** 2).sum(axis=2))
    return distances[0] - distances[1]


@pytest.mark.parametrize("system", ["kmeans-tree", "ehi-pq"])
def test_the_index_of_shards_is_that_of_the_run(finished, tmp_path, system):
    config, workdir = finished
    arguments = {"shards": 5, "system": system, "index": tmp_path / "index"}
    assert encode.run(config, workdir, tmp_path / "shards", **arguments) == {}
    index = open_index(tmp_path / "index", verify=True)
    own = workdir / ("index" if system == "ehi-pq" else f"indexes/{system}")
    own = open_index(own)
    # Parameters, identity, ids and shown documents are equal to the last bit.
    # Only an index that does not carry its tower says where that is.
    tower = {"tower": index.encoder["tower"]}
    assert index.encoder == own.encoder | tower
    ours, theirs = index.parameter_arrays(), own.parameter_arrays()
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    rows = np.arange(own.num_documents)
    assert (index.external_ids(rows) == own.external_ids(rows)).all()
    assert index.document(7) == own.document(7)
    # Shards keep float16 embeddings, so leaves and codes may differ at near ties.
    (leaves, stored), (own_leaves, own_stored) = by_document(index), by_document(own)
    same = leaves == own_leaves
    assert same.mean() > 0.98
    if system == "kmeans-tree":
        np.testing.assert_allclose(stored[same], own_stored[same], atol=5e-4)
    else:
        assert (stored[same] == own_stored[same]).mean() > 0.98
        files = sorted((tmp_path / "shards").glob("*/embeddings.npy"))
        x = np.concatenate([np.load(file) for file in files]).astype(np.float32)
        gaps = code_gaps(index, x[same], leaves[same], stored[same], own_stored[same])
        assert (gaps > -1e-6).all() and gaps.max() < 1e-3
    # Again: nothing is encoded, the same index is built.
    before = bytes_of(tmp_path)
    assert encode.run(config, workdir, tmp_path / "shards", **arguments) == {}
    assert {k: v for k, v in bytes_of(tmp_path).items() if "shards/" in k} == {
        k: v for k, v in before.items() if "shards/" in k
    }


def test_shards_of_other_parameters_are_refused(finished, tmp_path):
    config, workdir = finished
    encode.run(config, workdir, tmp_path, shards=2)
    with pytest.raises(ValueError, match=r"\(other parameters, run\)"):
        encode.run(config, workdir, tmp_path, shards=2, system="kmeans-tree")
    with pytest.raises(ValueError, match="other num_shards"):
        encode.run(config, workdir, tmp_path, shards=3)


def test_another_length_is_said(finished, tmp_path, monkeypatch, caplog):
    config, workdir = finished
    config = config.copy_and_resolve_references()
    config.tower.document_length = 12
    monkeypatch.setattr(encode.LOG, "propagate", True)
    with caplog.at_level("WARNING", logger="ehi"):
        encode.run(config, workdir, tmp_path, shards=2)
    assert "tower.document_length is 12, but the run in" in caplog.text
    with pytest.raises(ValueError, match=r"\(other document_length\)"):
        encode.run(finished[0], workdir, tmp_path, shards=2)


def test_bad_arguments_are_refused(finished, tmp_path, monkeypatch):
    config, workdir = finished
    refused = [
        ({"engine": "beam"}, ValueError, "engine is 'beam'; allowed: local, ray"),
        ({"shards": 321}, ValueError, "shards=321: allowed are 1 to 320"),
        ({"retries": -1}, ValueError, "retries is -1"),
        ({"system": "faiss-ivf"}, ValueError, "faiss-ivf cannot be encoded in shards"),
        ({"system": "opq"}, ValueError, "no budget of .* applies to 'opq'"),
        ({"system": "ehi"}, FileNotFoundError, "no trained ehi"),
        ({"checkpoint": tmp_path}, FileNotFoundError, "holds no finished run"),
    ]
    for changes, error, message in refused:
        arguments = {"checkpoint": workdir, "shards": 2} | changes
        with pytest.raises(error, match=message):
            encode.run(config, out=tmp_path / "out", **arguments)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'ehi\[ray\]'"):
        encode.run(config, workdir, tmp_path / "out", shards=2, engine="ray")
    assert not (tmp_path / "out").exists()


def test_a_failed_shard_is_named_and_not_indexed(
    finished, tmp_path, monkeypatch, caplog
):
    config, workdir = finished

    place = DocumentEncoder.place

    def fails_of_many(self, embeddings):
        if len(embeddings) == 107:  # the last of three shards
            raise RuntimeError("out of memory")
        return place(self, embeddings)

    monkeypatch.setattr(DocumentEncoder, "place", fails_of_many)
    arguments = {"shards": 3, "index": tmp_path / "index", "retries": 1}
    with caplog.at_level("ERROR", logger="ehi"):
        monkeypatch.setattr(encode.LOG, "propagate", True)
        failed = encode.run(config, workdir, tmp_path / "shards", **arguments)
    assert set(failed.values()) == {"RuntimeError: out of memory"}
    assert "documents d" in caplog.text and not (tmp_path / "index").exists()


def test_the_command(tmp_path, finished, corpus):
    """A mistake is one sentence."""
    command = [
        sys.executable, "-m", "experiments.encode",
        f"--config={ROOT / 'experiments' / 'configs' / 'own.py'}",
        f"--config.dataset={corpus}", f"--checkpoint={tmp_path}", "--shards=2",
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 1
    assert said.stderr.strip().endswith(
        "error: --out is missing: folder for the shards"
    )
    said = subprocess.run(command[:3], capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 1 and "error: --config is missing" in said.stderr


def test_ray_makes_the_same_shards(finished, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the workers
    config, workdir = finished
    assert encode.run(config, workdir, tmp_path / "local", shards=4) == {}
    arguments = {"shards": 4, "engine": "ray", "workers": 1}
    assert encode.run(config, workdir, tmp_path / "ray", **arguments) == {}
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "local")
