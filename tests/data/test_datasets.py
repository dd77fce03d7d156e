import dataclasses
import functools
import http.server
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from ehi.data import download, tfds_builder
from ehi.data.datasets import carve_dev, open_dataset


def zipped(folder, top=""):
    """Zip of `folder`, beside it, its files under `top`."""
    root = folder.parent / "to-zip"
    shutil.copytree(folder, root / top)
    path = shutil.make_archive(folder.parent / "archive" / folder.name, "zip", root)
    return download.Path(path)


def contents(dataset):
    """Everything but where it was found."""
    values = {f.name: getattr(dataset, f.name) for f in dataclasses.fields(dataset)}
    read = {"documents": list(dataset.documents), "fields": list(dataset.fields())}
    return {**values, **read}


def test_folder_is_read_in_order(beir_folder, tmp_path):
    dataset = open_dataset(beir_folder, data_dir=tmp_path)
    assert dataset.name == "tiny"
    assert dataset.doc_ids == ["d1", "d2", "d3", "d4", "d5", "d6"]
    assert [document.id for document in dataset.documents] == dataset.doc_ids
    assert len(dataset.documents) == 6
    assert dataset.documents[3].content.startswith("Rotations")
    assert dataset.documents[-1].content.startswith("Towers A tower")
    assert [d.id for d in dataset.documents[1:3]] == ["d2", "d3"]
    assert dataset.query_texts[1] == "what is a code"
    assert dataset.qrels["train"] == {
        "q1": {"d1": 1, "d2": 2},
        "q2": {"d2": 1},
        "q3": {"d3": 1},
    }
    with pytest.raises(IndexError):
        dataset.documents[6]


def test_positives_leave_out_grade_zero(beir_folder, tmp_path):
    dataset = open_dataset(beir_folder, data_dir=tmp_path)
    queries, docs, grades = dataset.positives("train")
    assert queries.tolist() == [0, 0, 1, 2]
    assert docs.tolist() == [0, 1, 1, 2]
    assert grades.tolist() == [1, 2, 1, 1]
    assert dataset.positives("test")[1].tolist() == [3, 5]
    with pytest.raises(ValueError, match="no split 'dev'; it has test, train"):
        dataset.positives("dev")


@pytest.mark.parametrize("top", ["", "tiny"])
def test_zip_is_the_same_as_its_folder(beir_folder, tmp_path, top):
    from_folder = open_dataset(beir_folder, data_dir=tmp_path / "one")
    from_zip = open_dataset(zipped(beir_folder, top), data_dir=tmp_path / "two")
    assert contents(from_zip) == contents(from_folder)


@pytest.mark.parametrize("missing", [["qrels"], ["qrels", "queries.jsonl"]])
def test_unlabelled_corpus(beir_folder, tmp_path, missing):
    for name in missing:
        path = beir_folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    dataset = open_dataset(beir_folder, data_dir=tmp_path)
    assert len(dataset.documents) == 6
    assert dataset.qrels == {}
    assert len(dataset.query_ids) == (5 if missing == ["qrels"] else 0)
    with pytest.raises(ValueError, match="no judgements at all"):
        dataset.positives("train")


def test_edited_corpus_is_prepared_again(beir_folder, tmp_path):
    old = open_dataset(beir_folder, data_dir=tmp_path)
    path = beir_folder / "corpus.jsonl"
    path.write_text(path.read_text().replace("greedy", "exhaustive"))
    new = open_dataset(beir_folder, data_dir=tmp_path)
    assert "exhaustive" in new.documents[2].text
    assert "greedy" in old.documents[2].text
    assert old.corpus_sha256 != new.corpus_sha256


def test_prepared_copy_is_reused(beir_folder, tmp_path, monkeypatch):
    first = open_dataset(beir_folder, data_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tfds_builder.RetrievalBuilder, "write", None)
        assert contents(open_dataset(beir_folder, data_dir=tmp_path)) == contents(first)


def test_failed_preparation_leaves_nothing(beir_folder, tmp_path):
    (beir_folder / "qrels" / "test.tsv").unlink()
    (beir_folder / "qrels" / "train.tsv").write_text("q1\td9\t1\n")
    with pytest.raises(ValueError, match="unknown document 'd9'"):
        open_dataset(beir_folder, data_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "datasets").iterdir()) == []


def test_ehi_data_is_searched_first(beir_folder, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    folders = download.os.pathsep.join([str(empty), str(beir_folder.parent)])
    monkeypatch.setenv("EHI_DATA", folders)
    monkeypatch.setattr(download, "download", None)
    beir_folder.rename(beir_folder.with_name("scifact"))
    dataset = open_dataset("beir/scifact", data_dir=tmp_path)
    assert dataset.name == "scifact"
    assert len(dataset.documents) == 6


def test_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"'beir/scifcat'.*'pydocs'.*'beir/scifact'"):
        open_dataset("beir/scifcat", data_dir=tmp_path)


def test_public_sets_come_from_tfds():
    url, sha256 = download.public_sets()["scifact"]
    assert url.endswith("/scifact.zip")
    assert len(sha256) == 64
    assert {"fiqa", "nfcorpus", "nq", "msmarco"} <= set(download.public_sets())


@pytest.fixture
def server(tmp_path):
    """Address of a web server on the loopback, serving `tmp_path`."""
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_public_set_is_downloaded_once(beir_folder, tmp_path, server, monkeypatch):
    archive = zipped(beir_folder, "scifact")
    sha256 = download.hashlib.sha256(archive.read_bytes()).hexdigest()
    address = f"{server}/archive/tiny.zip"
    monkeypatch.setattr(download, "public_sets", lambda: {"scifact": (address, sha256)})
    monkeypatch.delenv("EHI_DATA", raising=False)
    dataset = open_dataset("beir/scifact", data_dir=tmp_path / "cache")
    assert dataset.name == "scifact"
    assert len(dataset.documents) == 6
    archive.unlink()
    again = open_dataset("beir/scifact", data_dir=tmp_path / "cache")
    assert contents(again) == contents(dataset)


def test_altered_download_is_refused(tmp_path, server):
    (tmp_path / "bad.zip").write_bytes(b"altered")
    target = tmp_path / "cache" / "bad.zip"
    with pytest.raises(ValueError, match="has sha256 .*, expected 00"):
        download.download(f"{server}/bad.zip", "00", target)
    with pytest.raises(ConnectionError, match="cannot download .*404"):
        download.download(f"{server}/missing.zip", "00", target)
    assert list(target.parent.iterdir()) == []


def test_collection_needs_a_part(beir_folder, tmp_path, monkeypatch):
    for part in ("android", "gis"):
        shutil.copytree(beir_folder, tmp_path / "data" / "cqadupstack" / part)
    monkeypatch.setenv("EHI_DATA", str(tmp_path / "data"))
    dataset = open_dataset("beir/cqadupstack/gis", data_dir=tmp_path)
    assert dataset.name == "cqadupstack-gis"
    with pytest.raises(ValueError, match="found 2: android, gis"):
        open_dataset("beir/cqadupstack", data_dir=tmp_path)


def test_carved_dev_shares_no_answer_with_train(beir_folder, tmp_path):
    dataset = open_dataset(beir_folder, data_dir=tmp_path)
    for seed in range(5):
        carved = carve_dev(dataset, fraction=0.7, seed=seed)
        train, dev = carved.qrels["train"], carved.qrels["dev"]
        assert {**train, **dev} == dataset.qrels["train"]
        assert carved.qrels["test"] == dataset.qrels["test"]
        # q1 and q2 share d2; 0.7 of 3 queries is room for both, or for q3.
        assert sorted(dev) in (["q1", "q2"], ["q3"])
        shared = np.intersect1d(
            carved.positives("train")[1], carved.positives("dev")[1]
        )
        assert len(shared) == 0
        assert carve_dev(dataset, fraction=0.7, seed=seed).qrels == carved.qrels


def test_carve_dev_keeps_groups_together(beir_folder, tmp_path):
    dataset = open_dataset(beir_folder, data_dir=tmp_path)
    grouped = dataclasses.replace(dataset, groups=np.array([0, 1, 0, 3, 4, 5]))
    with pytest.raises(ValueError, match="smallest group of documents answers 3"):
        carve_dev(grouped, fraction=0.7)


def test_carve_dev_refuses(beir_folder, tmp_path):
    dataset = open_dataset(beir_folder, data_dir=tmp_path)
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        carve_dev(dataset, fraction=1.5)
    with pytest.raises(ValueError, match="has a split 'dev' already"):
        carve_dev(carve_dev(dataset, fraction=0.7))


def test_scifact_carves_by_document(real_data, tmp_path):
    dataset = open_dataset(real_data("scifact"), data_dir=tmp_path)
    assert (len(dataset.documents), len(dataset.query_ids)) == (5183, 1109)
    carved = carve_dev(dataset)
    assert 0.15 * 809 < len(carved.qrels["dev"]) <= 0.2 * 809
    train, dev = carved.positives("train")[1], carved.positives("dev")[1]
    assert len(np.intersect1d(train, dev)) == 0


def test_no_tensorflow_and_no_jax(beir_folder, tmp_path):
    script = (
        "import sys\n"
        "from ehi.data import pseudo_queries, ratings, tokens\n"
        "from ehi.data.datasets import open_dataset\n"
        f"len(list(open_dataset({str(beir_folder)!r}, data_dir={str(tmp_path)!r})"
        ".documents))\n"
        "print(sorted({'jax', 'tensorflow'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
