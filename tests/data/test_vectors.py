"""Files of vectors open as one data set, and wrong ones are refused in a sentence."""

import errno

import numpy as np
import pytest

from ehi.data.vectors import containers, neighbours
from ehi.data.vectors.dataset import open_vectors
from ehi.data.vectors.metric import METRICS, Metric
from ehi.data.vectors.pairs import query_table, vector_pairs

ROWS, WIDTH = 300, 8


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("EHI_CACHE", str(tmp_path / "cache"))


def vectors(rows=ROWS, width=WIDTH, seed=0, unit=True):
    x = np.random.default_rng(seed).normal(size=(rows, width))
    if unit:
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """DIR with documents.npy and queries.npy."""
    path = tmp_path / "given"
    path.mkdir()
    np.save(path / "documents.npy", vectors())
    np.save(path / "queries.npy", vectors(50, seed=1))
    return path


def as_shards(path, dtype=np.float32):
    (path / "documents.npy").unlink()
    for number, part in enumerate(np.array_split(vectors(), 4)):
        np.save(path / f"documents-{number:05}-of-00004.npy", part.astype(dtype))
    return path


def test_one_corpus_in_five_files_is_one_corpus(folder, tmp_path):
    h5py, parquet = pytest.importorskip("h5py"), pytest.importorskip("pyarrow.parquet")
    import pyarrow

    x, found = vectors(), {"npy": open_vectors(folder)}
    found["shards"] = open_vectors(as_shards(folder))
    for name, options in (("plain", {}), ("packed", {"compression": "gzip"})):
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            file.create_dataset("train", data=x, **options)
            file.create_dataset("test", data=vectors(50, seed=1))
            file.attrs["distance"] = "angular"
        found[name] = open_vectors(tmp_path / f"{name}.hdf5")
    table = pyarrow.table({"embedding": x.tolist()})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=70)
    found["parquet"] = open_vectors(tmp_path / "x.parquet")
    assert len({dataset.corpus_sha256 for dataset in found.values()}) == 1
    for name, dataset in found.items():
        assert dataset.metric == "cosine" and len(dataset.documents) == ROWS
        assert np.array_equal(np.asarray(dataset.vectors), x), name
    mapped = [found[name].vectors for name in ("npy", "plain", "packed", "parquet")]
    assert all(isinstance(array, np.memmap) for array in mapped)


def test_shards_are_read_as_one_array(folder):
    rows, x = open_vectors(as_shards(folder, np.float16)).vectors, vectors()
    assert rows.shape == x.shape
    some = np.array([299, 0, 75, 74])
    for at in (slice(None), slice(70, 160), slice(5, 5), some, 151):
        assert np.array_equal(rows[at], x.astype(np.float16)[at])


def test_queries_are_split_and_labelled_by_their_neighbours(folder):
    dataset = open_vectors(folder)
    sizes = {split: len(judged) for split, judged in dataset.qrels.items()}
    assert sizes == {"test": 5, "dev": 5, "train": 40}
    exact = np.argsort(-(vectors(50, seed=1) @ vectors().T), axis=1)[:, :10]
    for judged in dataset.qrels.values():
        for query, labels in judged.items():
            assert set(labels) == set(map(str, exact[int(query[1:])]))
    assert "exact nearest" in dataset.notes[0] and not dataset.identical_ids("test")


def test_documents_stand_in_for_queries_and_never_train(folder):
    (folder / "queries.npy").unlink()
    dataset = open_vectors(folder)
    assert {s: len(judged) for s, judged in dataset.qrels.items()} == {
        "test": 30,
        "dev": 30,
    }
    for split in ("test", "dev"):
        assert dataset.identical_ids(split) == set(dataset.qrels[split])
        for query, labels in dataset.qrels[split].items():
            assert query not in labels
    held = {int(id) for split in dataset.qrels.values() for id in split}
    assert not held & set(dataset.training_rows.tolist())
    assert len(dataset.training_rows) == ROWS - 60


def test_judgements_are_kept_and_other_queries_train(folder):
    (folder / "qrels").mkdir()
    (folder / "ids.txt").write_text("".join(f"d{row}\n" for row in range(ROWS)))
    (folder / "query_ids.txt").write_text("".join(f"s{row}\n" for row in range(50)))
    (folder / "qrels" / "test.tsv").write_text("s3\td7\t1\ns4\td9\t2\n")
    dataset = open_vectors(folder)
    assert dataset.qrels["test"] == {"s3": {"d7": 1}, "s4": {"d9": 2}}
    assert len(dataset.qrels["train"]) == 48 and "s3" not in dataset.qrels["train"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("library", [True, False])
def test_maps_to_unit_vectors_keep_the_order_of_a_metric(metric, library, monkeypatch):
    if not library:
        monkeypatch.setattr(neighbours, "_library", lambda: None)
    monkeypatch.setattr(containers, "CHUNK_BYTES", 4 * WIDTH * 70)
    x, q = vectors(unit=False) * 3 + 1, vectors(20, seed=1, unit=False)
    rows, scores = neighbours.exact_neighbours(x, q, 15, metric=metric)
    expected = {
        "cosine": q @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T,
        "ip": q @ x.T,
        "l2": -np.square(q[:, None] - x).sum(2),
    }[metric]
    assert np.array_equal(rows, np.argsort(-expected, axis=1)[:, :15])
    assert (np.diff(scores, axis=1) <= 0).all()
    maps = Metric.fit(metric, x, multiple=4)
    documents, queries = maps.documents(x), maps.queries(q)
    assert documents.shape[1] == maps.width and maps.width % 4 == 0
    for made in (documents, queries):
        assert np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    assert np.array_equal(np.argsort(-(queries @ documents.T), axis=1)[:, :15], rows)


def test_a_query_that_is_a_document_does_not_find_itself():
    x = vectors()
    own = np.array([4, -1, 9])
    rows, _ = neighbours.exact_neighbours(x, x[[4, 5, 9]], 5, metric="l2", exclude=own)
    assert rows.shape == (3, 5) and rows[1, 0] == 5
    assert 4 not in rows[0] and 9 not in rows[2]


def test_the_query_table_has_queries_documents_and_moved_documents(folder):
    dataset = open_vectors(folder)
    pairs, chosen = vector_pairs(
        dataset.vectors, 50, dataset.positives("train")[:2], metric="cosine",
        rows=dataset.training_rows, per_document=2,
    )  # fmt: skip
    maps = Metric.fit("cosine", dataset.vectors)
    queries = dataset.query_vectors
    table = np.asarray(query_table(dataset.vectors, queries, pairs, chosen, maps))
    assert table.shape == (50 + 4 * ROWS, WIDTH)
    assert np.allclose(table[:50], vectors(50, seed=1), atol=1e-6)
    for source in ("documents", "pseudo"):
        asking = np.unique(np.asarray(pairs[source][0]))
        assert np.allclose(table[asking], vectors(), atol=1e-6)
    # A moved document lies near its document, as a query near its neighbours.
    synthetic, of = (np.asarray(rows) for rows in pairs["synthetic"])
    near = np.vecdot(table[synthetic], vectors()[of])
    assert 0.3 < near.mean() < 1 and np.allclose(np.linalg.norm(table, axis=1), 1)
    nearest = pairs["pseudo"][1].reshape(-1, 10)
    assert (nearest != chosen[:, None]).all()


def changed(x, row, value):
    x[row] = value
    return x


def shard(folder, old, new):
    as_shards(folder)
    path = folder / f"documents-{old:05}-of-00004.npy"
    path.rename(folder / f"documents-{new:05}-of-00004.npy")


def save_shard(folder, number, total, x):
    np.save(as_shards(folder) / f"documents-{number:05}-of-{total:05}.npy", x)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: np.save(f / "documents.npy", vectors().astype(float)),
         "documents.npy holds float64 of shape"),
        (lambda f: np.save(f / "documents.npy", vectors()[0]), "float32 or float16 of"),
        (lambda f: (f / "documents.npy").write_bytes(b"x"), "is no whole .npy file"),
        (lambda f: np.save(f / "documents.npy", vectors()[:0]), "holds no vectors"),
        (lambda f: np.save(f / "documents.npy", changed(vectors(), 7, np.nan)),
         "given/documents.npy: row 7 has a value that is not finite"),
        (lambda f: np.save(f / "documents.npy", changed(vectors(), 8, 0)),
         "row 8 is a zero vector"),
        (lambda f: np.save(f / "queries.npy", changed(vectors(9), 3, np.inf)),
         "given/queries.npy: row 3 has a value that is not finite"),
        (lambda f: np.save(f / "queries.npy", vectors(9, 4)), "documents have width 8"),
        (lambda f: np.save(f / "documents.npy", vectors() * 2),
         "row 0 has not unit length .*'ip' .* or 'l2'"),
        (lambda f: (f / "ids.txt").write_text("a\nb\n"), "has 2 ids for 300 vectors"),
        (lambda f: (f / "query_ids.txt").write_text("a\n" * 50), "rows 0 and 1 have"),
        (lambda f: shard(f, 2, 9), "00009-of-00004.npy is out of order"),
        (lambda f: (as_shards(f) / "documents-00002-of-00004.npy").unlink(),
         "shard 2 of 4 of documents is missing"),
        (lambda f: save_shard(f, 1, 4, vectors(5, 3)),
         "holds float32 of width 3, the first shard"),
        (lambda f: save_shard(f, 0, 2, vectors()),
         r"are of \[2, 4\] shards"),
        (lambda f: (f / "documents.npy").unlink(), "has no documents.npy"),
    ],
)  # fmt: skip
def test_wrong_vectors_are_refused_before_any_work(folder, spoil, message):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        open_vectors(folder)
    assert "\n" not in str(error.value)


def test_wrong_hdf5_and_parquet_files_are_refused(tmp_path):
    h5py, parquet = pytest.importorskip("h5py"), pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        file["train"] = vectors()
    with pytest.raises(ValueError, match="has no data set 'test', .* it has train"):
        open_vectors(path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="is no HDF5 file"):
        open_vectors(path)
    path = tmp_path / "x.parquet"
    for table, message in (
        ({"text": ["a"]}, "has no column of vectors: expected one of .* it has text"),
        ({"vector": [[1.0, 2.0], [1.0]]}, "row 1 of column 'vector' has not 2 numbers"),
        ({"vector": [[1.0], None]}, "row 1 of column 'vector' has not 1 numbers"),
        ({"vector": [1.0]}, "row 0 of column 'vector' is 1.0, not a list"),
    ):
        parquet.write_table(pyarrow.table(table), path)
        with pytest.raises(ValueError, match=message):
            open_vectors(path)


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path):
    def parts():
        yield vectors(10)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="the disk of .* is full: x.npy needs .* GiB"):
        containers.streamed("x.npy", parts(), (20, WIDTH))
    assert list((tmp_path / "cache").rglob("*.npy")) == []


def test_an_exact_file_of_another_metric_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        file["train"], file["test"] = vectors(unit=False), vectors(9)
        file.attrs["distance"] = "euclidean"
    assert open_vectors(path).metric == "l2"
    with pytest.raises(ValueError, match="was made for 'l2'"):
        open_vectors(path, metric="ip")
