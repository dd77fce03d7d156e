import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_cases import QUERIES, assert_same_index, make_index

from ehi.index import IndexCorruptError, build_index, open_index, save_index


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "index"
    documents = [{"title": str(i)} for i in range(30)]
    save_index(make_index(), path, documents=documents)
    return path


@pytest.fixture(scope="module")
def updated(saved, tmp_path_factory):
    """The same with a segment added later and with deleted documents."""
    path = tmp_path_factory.mktemp("updated") / "index"
    shutil.copytree(saved, path)
    index = open_index(path)
    index.add(QUERIES, [f"n{i}" for i in range(5)], documents=[{}] * 5)
    index.delete(["d3", "n1"])
    return path


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "index")
    return tmp_path / "index"


def edit_manifest(folder, edit):
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_truncated_file_is_named(copy):
    for file in sorted(copy.glob("*.npy")):
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(IndexCorruptError, match=f"{file.name} has .* truncated"):
            open_index(copy)
        file.unlink()
        with pytest.raises(IndexCorruptError, match=f"{file.name} is missing"):
            open_index(copy)
        file.write_bytes(content)
    open_index(copy, verify=True)


def test_no_file_in_use_is_removed_as_obsolete(copy):
    def list_all(manifest):
        manifest["obsolete"] = [e["file"] for e in manifest["files"].values()]

    edit_manifest(copy, list_all)
    index = open_index(copy)
    index.delete(["d3"])  # the writer removes what an earlier one left behind
    assert open_index(copy, verify=True).num_documents == 29


def test_an_altered_file_is_named_by_its_sum(copy):
    for file in [*copy.glob("*.npy"), *copy.glob("*.jsonl")]:
        content = file.read_bytes()
        last = bytes([content[-1] ^ 1])
        file.write_bytes(content[:-1] + last)
        with pytest.raises(IndexCorruptError, match=f"{file.name} was altered: sha256"):
            open_index(copy, verify=True)
        file.write_bytes(content)
    open_index(copy).verify()


def test_no_index_a_newer_version_or_a_broken_manifest_is_refused(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no index"):
        open_index(tmp_path / "nowhere")
    edit_manifest(copy, lambda manifest: manifest.update(version=99))
    with pytest.raises(IndexCorruptError, match="version 99, .* a newer ehi wrote it"):
        open_index(copy)
    (copy / "manifest.json").write_text('{"format": ')
    with pytest.raises(IndexCorruptError, match="not JSON"):
        open_index(copy)


@pytest.mark.parametrize(
    "name", ["../codes.npy", "/etc/passwd", "..", "a/b.npy", ".hidden", "", "c\x00"]
)
def test_file_names_that_leave_the_folder_are_refused(copy, name):
    shutil.copy(copy / "codes.npy", copy.parent / "codes.npy")
    edit_manifest(copy, lambda manifest: manifest["files"]["codes"].update(file=name))
    with pytest.raises(IndexCorruptError, match="not a plain name"):
        open_index(copy)


def test_pickles_are_never_read(copy):
    np.save(copy / "codes.npy", np.array([{"a": 1}] * 60, object), allow_pickle=True)
    size = (copy / "codes.npy").stat().st_size
    edit_manifest(copy, lambda manifest: manifest["files"]["codes"].update(bytes=size))
    with pytest.raises(IndexCorruptError, match="codes.npy is not the array"):
        open_index(copy)


def rewrite(folder, name, change):
    """Changes an array and the manifest with it, sums included."""
    path = folder / f"{name}.npy"
    array = change(np.load(path))
    np.save(path, array)
    entry = {
        "bytes": path.stat().st_size,
        "shape": list(array.shape),
        "dtype": array.dtype.name,
    }
    edit_manifest(folder, lambda manifest: manifest["files"][name].update(entry))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("leaf_offsets", lambda a: a + 1),
        ("leaf_offsets", lambda a: -a),
        ("leaf_offsets", lambda a: a[:-1]),
        ("leaf_offsets", lambda a: a.astype(np.float32)),
        ("leaf_rows", lambda a: a[:-1]),
        ("leaf_rows", lambda a: a.astype(np.int64)),
        ("codes", lambda a: a[:, :0]),
        ("codes", lambda a: np.asfortranarray(np.tile(a, 2))),
        ("codebooks", lambda a: a[:, :8]),
        ("rotation", lambda a: a[:2]),
        ("leaf_centroids", lambda a: a[0]),
        ("rerank_vectors", lambda a: a[:5]),
        ("id_offsets", lambda a: a * 2),
        ("tree.nodes.1", lambda a: a[:1]),
        ("query_tree.nodes.0", lambda a: a[:, :1]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(copy, name, change):
    rewrite(copy, name, change)
    with pytest.raises(IndexCorruptError):
        open_index(copy)


@pytest.mark.parametrize("score", ["ip", "l2", "cosine", "corrected"])
def test_scores_and_factors_that_do_not_fit_are_refused(tmp_path, score):
    folder, index = tmp_path / "index", make_index(score=score)
    save_index(index, folder)
    assert_same_index(index, open_index(folder, verify=True))
    has_factors = score in ("cosine", "corrected")
    text = (folder / "manifest.json").read_text()
    assert json.loads(text)["score"] == score
    other = "ip" if has_factors else "cosine"
    edits = [
        (lambda m: m.update(score="dot"), "score must be one of .*, got 'dot'"),
        (lambda m: m.update(score=None), "score must be one of .*, got None"),
        (lambda m: m.pop("score"), "KeyError.*score"),
        (lambda m: m.update(score=other), f"score '{other}' with "),
    ]
    if has_factors:
        edits.append((lambda m: m["files"].pop("factors"), f"'{score}' with no fact"))
        edits.append((lambda m: m.update(version=2), "'ip' with factors"))
    for edit, words in edits:
        edit_manifest(folder, edit)
        with pytest.raises(IndexCorruptError, match=words):
            open_index(folder)
        (folder / "manifest.json").write_text(text)
    changes = [lambda a: a[:-1], lambda a: a[:, None], lambda a: a.astype(np.float32)]
    for change in changes if has_factors else ():
        content = (folder / "factors.npy").read_bytes()
        rewrite(folder, "factors", change)
        with pytest.raises(IndexCorruptError, match="factors is .*expected uint8"):
            open_index(folder)
        (folder / "factors.npy").write_bytes(content)
        (folder / "manifest.json").write_text(text)


def test_rows_outside_the_corpus_are_refused(copy):
    rewrite(copy, "leaf_rows", lambda a: a + np.uint32(2**31))
    with pytest.raises(IndexCorruptError, match="of 30 documents"):
        open_index(copy).search(QUERIES, 3, beam=4)


def test_rows_outside_are_refused_by_all_that_read_them(copy):
    rewrite(copy, "leaf_rows", lambda a: a + np.uint32(2**31))
    index = open_index(copy)
    index.delete(["d3"])
    with pytest.raises(IndexCorruptError, match="leaf_rows points outside"):
        _ = index.leaf_sizes
    for use in (index.compact, lambda: save_index(index, copy.parent / "other")):
        with pytest.raises(IndexCorruptError, match="leaf_rows points at row"):
            use()
    assert not (copy.parent / "other").exists()


def test_negative_and_repeated_ids_are_refused(tmp_path):
    index = build_index(QUERIES, np.arange(len(QUERIES)) * 3, tree=None)
    save_index(index, tmp_path / "index")
    rewrite(tmp_path / "index", "ids", lambda ids: ids - 3)
    index = open_index(tmp_path / "index")
    with pytest.raises(IndexCorruptError, match="ids hold -3"):
        index.search(QUERIES, len(QUERIES))
    with pytest.raises(IndexCorruptError, match="ids hold -3"):
        index.check_addresses()
    rewrite(tmp_path / "index", "ids", np.zeros_like)
    with pytest.raises(IndexCorruptError, match="ids repeat"):
        open_index(tmp_path / "index").check_addresses()


def test_no_writer_leaves_the_folder_by_a_link(copy, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis").write_text("years of work")
    (copy / "segments").symlink_to(tmp_path / "victim")
    edit_manifest(copy, lambda m: m.update(obsolete=["segments/thesis"]))
    with pytest.raises(IndexCorruptError, match="segments is a link"):
        open_index(copy)
    assert (tmp_path / "victim" / "thesis").exists()
    (copy / "segments").unlink()
    (copy / "folder").mkdir()
    edit_manifest(copy, lambda m: m.update(obsolete=["folder"]))
    with pytest.raises(IndexCorruptError, match="lists the folder 'folder'"):
        open_index(copy)


def test_a_wrong_generation_overwrites_no_file_in_use(copy):
    open_index(copy).delete(["d3"])
    edit_manifest(copy, lambda manifest: manifest.update(generation=0))
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(IndexCorruptError, match="in use already, so generation 0"):
        open_index(copy).compact()
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert open_index(copy, verify=True).num_documents == 29


def open_and_use(folder, num_rows):
    """Everything a reader may do: IndexCorruptError, or results that are in range."""
    try:
        index = open_index(folder)
        with np.errstate(all="ignore"):
            for queries in (QUERIES, QUERIES[:1]):
                hits = index.search(queries, 3, beam=2, rerank=5)
                assert ((hits.rows >= -1) & (hits.rows < num_rows)).all()
            index.search(QUERIES, 3, beam=4, allow=["d1", "n2"])
        index.contents.rows_in_leaf(0)
        # A line to show is read when it is asked for.
        with contextlib.suppress(UnicodeDecodeError, json.JSONDecodeError, IndexError):
            index.document(0)
        with np.errstate(all="ignore"):
            index.delete(["d1"], missing="ignore")
            assert index.leaf_sizes.sum() <= num_rows * index.spill
            index.compact()
    except IndexCorruptError as error:
        named = (str(folder), "row", "id", "codes", "leaf_offsets", "the tree")
        assert any(name in str(error) for name in named)


def mutate_bytes(folder, data):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    new = data.draw(st.binary(min_size=1, max_size=9))
    content[start : start + len(new)] = new
    file.write_bytes(content)


HOSTILE = [
    None, True, -1, 0, 1, 31, 2**31, 2**63, 2**80, -0.5, 1e308, "", "../../etc/passwd",
    "codes", "codes.npy", "manifest.json", "segments/../x.npy", "float64", "object",
    [], [[]], [2**40, 2**40], [-1], [0], {}, {"file": "codes.npy"},
]  # fmt: skip


def mutate_manifest(folder, data):
    """One value anywhere in the manifest becomes another, or its key does."""
    manifest = json.loads((folder / "manifest.json").read_text())
    node = manifest
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        inner = isinstance(node[key], dict | list) and node[key]
        if not inner or data.draw(st.booleans()):
            break
        node = node[key]
    change = data.draw(st.sampled_from(["replace", "remove", "swap"]))
    if change == "replace":
        node[key] = data.draw(st.sampled_from(HOSTILE))
    elif change == "remove":
        del node[key]
    else:
        other = data.draw(st.sampled_from(keys))
        node[key], node[other] = node[other], node[key]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def check_mutated(path, mutate, data):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "index"
        shutil.copytree(path, folder)
        mutate(folder, data)
        open_and_use(folder, 35)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_bytes_are_refused_or_searched_without_harm(updated, data):
    check_mutated(updated, mutate_bytes, data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_manifests_are_refused_or_searched_without_harm(updated, data):
    check_mutated(updated, mutate_manifest, data)


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [mutate_bytes, mutate_manifest])
@settings(max_examples=5000, deadline=None)
@given(data=st.data())
def test_thousands_of_mutated_folders(updated, mutate, data):
    check_mutated(updated, mutate, data)


def test_sparse_files_of_huge_shapes_are_not_read_whole(copy):
    """A hostile shape must be backed by bytes; then it is mapped, not read."""
    size = 2**36  # a sparse file: its bytes are on no disk
    path = copy / "codes.npy"
    with path.open("r+b") as file:
        file.truncate(size)
    entry = {"bytes": size, "shape": [size - 128, 1]}
    edit_manifest(copy, lambda manifest: manifest["files"]["codes"].update(entry))
    with pytest.raises(IndexCorruptError):
        open_index(copy)
