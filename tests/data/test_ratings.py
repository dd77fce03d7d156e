import json

import numpy as np
import pytest

from ehi.data import download, ratings
from ehi.data.datasets import open_dataset
from ehi.data.ratings import HISTORY, Ratings, next_items

# User 7 likes items 1, 3, 2, 4 in this order, and not item 5; user 8 likes two; user 9
# one, so that nothing can be asked.
RATED = [
    "7::2::4::30",
    "7::1::5::10",
    "7::3::4::10",
    "7::5::3::35",
    "7::4::5::40",
    "8::1::4::2",
    "8::2::4::1",
    "9::1::5::1",
]
MOVIES = [
    "1::Toy Story (1995)::Animation|Comedy",
    "2::Caf\xe9 (1996)::Drama",
    "3::Heat (1995)::Action",
    "4::Sabrina (1995)::Comedy",
    "5::Tom and Huck (1995)::Adventure",
]


@pytest.fixture
def movielens(tmp_path):
    """Folder ml-1m with five movies and three users."""
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "ratings.dat").write_text("\n".join(RATED) + "\n")
    (folder / "movies.dat").write_text("\n".join(MOVIES) + "\n", encoding="latin-1")
    return folder


@pytest.fixture
def books(tmp_path):
    """Folder amazon-books with three books, one without a title."""
    folder = tmp_path / "amazon-books"
    folder.mkdir()
    lines = ["user,item,rating,timestamp", "u,a,5.0,1", "u,b,4.0,2", "u,none,5.0,3"]
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    records = [
        {"asin": "a", "title": "Emma\n ", "categories": [["Books", "Novels"]]},
        {"asin": "b", "title": "Persuasion", "category": ["Books"]},
        {"asin": "none", "categories": []},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metadata.jsonl").write_text(lines)
    return folder


def test_movielens_folder(movielens, tmp_path):
    dataset = open_dataset(movielens, data_dir=tmp_path)
    assert (dataset.name, dataset.groups) == ("ml-1m", None)
    assert dataset.doc_ids == ["1", "2", "3", "4", "5"]
    assert dataset.documents[0].content == "Toy Story (1995) Animation, Comedy"
    texts = dict(zip(dataset.query_ids, dataset.query_texts, strict=True))

    def asked(split):
        return [
            (texts[query].split("; "), list(judged))
            for query, judged in dataset.qrels[split].items()
        ]

    toys, cafe, heat = "Toy Story (1995)", "Caf\xe9 (1996)", "Heat (1995)"
    assert asked("train") == [([toys], ["3"])]
    assert asked("dev") == [([toys, heat], ["2"])]
    assert asked("test") == [([toys, heat, cafe], ["4"]), ([cafe], ["1"])]
    assert set(dataset.qrels["test"]) == {"7-3", "8-5"}


def test_names_and_zip(movielens, books, tmp_path, monkeypatch):
    monkeypatch.setenv("EHI_DATA", str(tmp_path))
    dataset = open_dataset("amazon-books", data_dir=tmp_path / "cache")
    assert dataset.name == "amazon-books"
    assert [d.content for d in dataset.documents] == [
        "Emma Books, Novels",
        "Persuasion Books",
    ]
    assert dataset.query_texts == ["Emma"]
    assert list(dataset.qrels) == ["test"]
    # The zip as GroupLens has it, where tfds says it is.
    archive = tmp_path / "zip" / "ml-1m.zip"
    archive.parent.mkdir()
    with ratings.zipfile.ZipFile(archive, "w") as file:
        for path in movielens.iterdir():
            file.write(path, f"ml-1m/{path.name}")
    called = []
    monkeypatch.delenv("EHI_DATA")
    monkeypatch.setattr(
        download, "download", lambda *args: called.append(args) or archive
    )
    dataset = open_dataset("movielens-1m", data_dir=tmp_path / "cache")
    assert dataset.name == "movielens-1m" and len(dataset.query_ids) == 4
    url, sha256, _ = called[0]
    assert url == "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
    assert sha256.startswith("a6898adb50b9ca05")
    with pytest.raises(
        ValueError, match="put a folder 'amazon-books' with ratings.csv"
    ):
        open_dataset("amazon-books", data_dir=tmp_path / "cache")


def test_history_is_cut_and_repeats_are_dropped():
    n = HISTORY + 5
    items = np.concatenate([np.arange(n), [0]])  # the first item again, at the end
    found = next_items(
        Ratings(np.zeros(n + 1, int), items, np.full(n + 1, 5.0), np.arange(n + 1))
    )
    assert found.items.tolist() == list(range(n))
    assert found.places.tolist() == list(range(1, n))
    assert found.left.tolist() == list(range(n - 2, -1, -1))
    assert (found.places - found.starts).tolist() == [
        min(place, HISTORY) for place in range(1, n)
    ]


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("ratings.dat", "7::1::5", "expected user, item, rating and timestamp"),
        ("ratings.dat", "7::1::five::10", "expected user, item, rating and timestamp"),
        ("movies.dat", "1::Toy Story (1995)", "expected item::title::genres"),
        ("ratings.csv", "u,a,5.0", "expected user, item, rating and timestamp"),
        ("metadata.jsonl", '{"title": "Emma"}', "expected a JSON object with 'asin'"),
        ("metadata.jsonl", '{"asin": "a", "title": 1}', "expected a JSON object"),
        ("metadata.jsonl", "['asin']", "expected a JSON object with 'asin'"),
        ("metadata.jsonl", "[1]", "expected a JSON object with 'asin'"),
    ],
)
def test_malformed_line_is_named(movielens, books, tmp_path, file, line, message):
    folder = movielens if file.endswith("dat") else books
    path = folder / file
    first = path.read_text(encoding="latin-1").splitlines()[0]
    path.write_text(f"{first}\n{line}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{file}, line 2: {message}"):
        open_dataset(folder, data_dir=tmp_path / "cache")


def test_missing_and_useless_files(movielens, books, tmp_path):
    (movielens / "movies.dat").unlink()
    with pytest.raises(ValueError, match=r"has ratings\.dat, but no movies\.dat"):
        open_dataset(movielens, data_dir=tmp_path / "cache")
    # The columns of the 2018 release: item first.
    (books / "ratings.csv").write_text("a,u,5.0,1\nb,u,4.0,2\n")
    with pytest.raises(ValueError, match=r"no rating of an item .* must be user, item"):
        open_dataset(books, data_dir=tmp_path / "cache")
    (books / "metadata.jsonl").write_text('{"asin": "a"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl holds no item with a title"):
        open_dataset(books, data_dir=tmp_path / "cache")
