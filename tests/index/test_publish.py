"""Pushing and pulling index folders: what arrives is what was pushed, or nothing."""

import contextlib
import doctest
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import hub_server
import numpy as np
import pytest
from index_cases import WIDTH, assert_same_index, make_index

import ehi
from ehi import model_card, publish
from ehi.index import IndexCorruptError, build_index, open_index, save_index
from ehi.index.folder import MANIFEST

STORE = fsspec.filesystem("memory")


def emptied():
    STORE.store.clear()
    STORE.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An index that was added to and deleted from, and files that are none of it."""
    path = tmp_path_factory.mktemp("written") / "index"
    save_index(make_index(), path)
    index = open_index(path)
    index.add(np.ones((2, WIDTH), np.float32), ["new", "newer"])
    index.delete(["d3"])
    (path / "manifest.json.new").write_text("of a writer that was killed")
    (path / "notes.txt").write_text("of somebody else")
    return path


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "index"))


@pytest.fixture
def hub(monkeypatch):
    """The Repositories of a hub on loopback, which stands for the real one."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_TOKEN", "token")
    with hub_server.serving() as (endpoint, repositories):
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE
        files = files.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        yield repositories


@pytest.fixture(params=["memory", "file", "hf"])
def address(request, tmp_path):
    """A place that holds nothing."""
    emptied()
    if request.param == "hf":
        request.getfixturevalue("hub")
    return {
        "memory": "memory://place/index",
        "file": (tmp_path / "place" / "index").as_uri(),
        "hf": "hf://me/index",
    }[request.param]


def names(path):
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


def leftovers(path):
    return [p.name for p in path.iterdir() if p.name.startswith(".")]


def test_a_pulled_index_is_the_one_that_was_pushed(folder, address, tmp_path):
    ehi.push(folder, address, licence="mit")
    pulled = ehi.pull(address, tmp_path / "pulled")
    assert_same_index(open_index(pulled), open_index(folder))
    files = json.loads((pulled / MANIFEST).read_text())["files"].values()
    assert names(pulled) == {MANIFEST} | {entry["file"] for entry in files}
    assert any("/" in name for name in names(pulled))  # the segment's folder too
    assert leftovers(tmp_path) == []


def test_a_second_push_replaces_the_first(folder, address, tmp_path):
    ehi.push(folder, address)
    other = tmp_path / "other"
    save_index(make_index(seed=1), other)
    ehi.push(other, address)
    pulled = ehi.pull(address, tmp_path / "pulled")
    assert_same_index(open_index(pulled), open_index(other))
    assert not any(name.startswith("segments") for name in names(pulled))


def test_a_push_writes_into_no_file_that_a_reader_has_open(folder, tmp_path):
    place = tmp_path / "place"
    ehi.push(folder, place.as_uri())
    files = sorted(names(place))
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context((place / name).open("rb")) for name in files]
        ehi.push(folder, place.as_uri())
        for file, name in zip(opened, files, strict=True):
            assert os.fstat(file.fileno()).st_ino != (place / name).stat().st_ino


def test_nothing_of_the_first_index_stays(folder):
    emptied()
    ehi.push(folder, "memory://a")
    ehi.push(folder, "memory://a")
    once = {name for name in STORE.find("/a")}
    save_index(open_index(folder), folder)  # compacted
    ehi.push(folder, "memory://a")
    assert not {name for name in STORE.find("/a") if "segments" in name}
    assert any("segments" in name for name in once)


def test_a_push_to_the_hub_is_one_commit(folder, hub):
    ehi.push(folder, "hf://me/index")
    save_index(open_index(folder), folder)  # compacted
    ehi.push(folder, "hf://me/index")
    empty, first, second = hub.commits["me/index"]
    assert any("segments" in name for name in first)
    assert not any("segments" in name for name in second)
    assert ".gitattributes" in second and "README.md" in second
    with pytest.raises(ValueError, match="me/index was not written: .*unknown licence"):
        ehi.push(folder, "hf://me/index", licence="no-such")
    assert len(hub.commits["me/index"]) == 3


def test_a_push_that_is_cut_short_leaves_the_old_index(folder, tmp_path, monkeypatch):
    emptied()
    ehi.push(folder, "memory://a")
    save_index(make_index(seed=1), tmp_path / "other")
    put = publish._Store._put

    def killed(store, source, name):
        if name == MANIFEST:
            raise OSError("the line is cut")
        put(store, source, name)

    monkeypatch.setattr(publish._Store, "_put", killed)
    with pytest.raises(OSError, match="cut"):
        ehi.push(tmp_path / "other", "memory://a")
    pulled = ehi.pull("memory://a", tmp_path / "pulled")
    assert_same_index(open_index(pulled), open_index(folder))


def test_a_pull_during_a_push_finds_the_new_index(folder, tmp_path, monkeypatch):
    emptied()
    ehi.push(folder, "memory://a")
    other = tmp_path / "other"
    save_index(make_index(seed=1), other)
    fetch, pushed = publish._Store.fetch, []

    def slow(store, names, target):
        if not pushed:
            pushed.append(ehi.push(other, "memory://a"))
        fetch(store, names, target)

    monkeypatch.setattr(publish._Store, "fetch", slow)
    pulled = ehi.pull("memory://a", tmp_path / "pulled")
    assert_same_index(open_index(pulled), open_index(other))


@pytest.mark.parametrize("links", [True, False])
def test_a_push_during_a_compaction_is_of_one_moment(
    folder, tmp_path, monkeypatch, links
):
    emptied()
    link, calls = os.link, []

    def racing(source, target):
        if len(calls) == 3:
            open_index(folder).compact()
        calls.append(source)
        if not links:
            raise OSError("no links here")
        link(source, target)

    monkeypatch.setattr(os, "link", racing)
    ehi.push(folder, "memory://a")
    pulled = open_index(ehi.pull("memory://a", tmp_path / "pulled"))
    assert len(pulled.segments) == 1 and pulled.num_documents == 31
    assert leftovers(tmp_path) == []


def change(name, data):
    def do(files):
        files[name] = data

    return do


def rename(name):
    def do(files):
        manifest = json.loads(files[MANIFEST])
        manifest["files"]["codes"]["file"] = name
        files[MANIFEST] = json.dumps(manifest).encode()

    return do


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: files.pop("codes.npy"), r"memory://a/codes.npy is missing"),
        (change("codes.npy", b"short"), r"memory://a/codes.npy has 5 bytes"),
        (change(MANIFEST, b"{"), r"memory://a/manifest.json does not describe"),
        (change(MANIFEST, b"[1]"), r"memory://a/manifest.json does not describe"),
        (rename("../../outside"), r"'../../outside', which is not a plain name"),
        (rename("/etc/passwd"), r"'/etc/passwd', which is not a plain name"),
    ],
)
def test_a_bad_download_is_named_and_removed(tmp_path, damage, message):
    emptied()
    save_index(make_index(), tmp_path / "index")
    ehi.push(tmp_path / "index", "memory://a")
    files = {p.removeprefix("/a/"): STORE.cat_file(p) for p in STORE.find("/a")}
    damage(files)
    emptied()
    for name, data in files.items():
        STORE.pipe_file(f"/a/{name}", data)
    before = set(tmp_path.iterdir())
    with pytest.raises(IndexCorruptError, match=message):
        ehi.pull("memory://a", tmp_path / "pulled")
    assert set(tmp_path.iterdir()) == before


def test_one_altered_byte_is_found(folder, address, tmp_path, monkeypatch):
    ehi.push(folder, address)
    kind = publish._Hub if address.startswith("hf") else publish._Store
    fetch = kind.fetch

    def altered(place, names, target):
        fetch(place, names, target)
        data = bytearray((target / "codes.npy").read_bytes())
        data[-1] ^= 1
        (target / "codes.npy").write_bytes(data)

    monkeypatch.setattr(kind, "fetch", altered)
    with pytest.raises(IndexCorruptError, match=f"{address}/codes.npy was altered"):
        ehi.pull(address, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists() and leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("index", ValueError, "'index' is no address: .* hf://, file://"),
        ("smoke://a/b", ValueError, "'smoke://a/b' is no address"),
        ("memory://", ValueError, "is no address"),
        ("hf://index", ValueError, "hf://owner/name"),
        ("hf://a/b/c/d", ValueError, "hf://owner/name"),
        ("memory://nothing", FileNotFoundError, "memory://nothing holds no index"),
    ],
)
def test_addresses_that_cannot_be_pulled(tmp_path, address, kind, message):
    emptied()
    with pytest.raises(kind, match=message):
        ehi.pull(address, tmp_path / "pulled")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_a_driver_name_the_address(folder, tmp_path, monkeypatch):
    emptied()

    class Odd(Exception):
        pass

    cases = [
        (Odd("no credentials"), ConnectionError, "memory://a failed: Odd"),
        (ConnectionRefusedError(111, "refused"), ConnectionError, "a is not reached"),
        (PermissionError("forbidden"), PermissionError, "a refuses you: forbidden"),
    ]
    for raised, kind, message in cases:

        def failing(*_, raised=raised, **__):
            raise raised

        monkeypatch.setattr(type(STORE), "cat_file", failing)
        with pytest.raises(kind, match=message):
            ehi.pull("memory://a", tmp_path / "pulled")
        with pytest.raises(kind, match=message):
            ehi.push(folder, "memory://a")
    assert not (tmp_path / "pulled").exists()


def test_nothing_is_written_over(folder, tmp_path):
    emptied()
    ehi.push(folder, "memory://a")
    with pytest.raises(FileExistsError, match="there already"):
        ehi.pull("memory://a", folder)
    STORE.pipe_file("/thesis/chapter.txt", b"words")
    with pytest.raises(FileExistsError, match="no index: name another place"):
        ehi.push(folder, "memory://thesis")
    assert STORE.find("/thesis") == ["/thesis/chapter.txt"]
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no index"):
        ehi.push(tmp_path, "memory://b")
    (folder / "codes.npy").write_bytes(b"x" * (folder / "codes.npy").stat().st_size)
    with pytest.raises(IndexCorruptError, match=f"{folder}/codes.npy was altered"):
        ehi.push(folder, "memory://b")
    assert not STORE.exists("/b")


def test_the_hub_explains_itself(folder, hub, tmp_path):
    hub.commits["me/model"] = [{"model.safetensors": b"weights"}]
    hub.commits["me/index"] = [{".gitattributes": b""}]
    cases = [
        (ehi.pull, "hf://me/none", FileNotFoundError, "shows no repository"),
        (ehi.pull, "hf://me/model", FileNotFoundError, "holds no index"),
        (ehi.pull, "hf://me/model@v2", FileNotFoundError, "no such revision"),
        (ehi.pull, "hf://locked/x", PermissionError, "hf auth login"),
    ]
    for do, address, kind, message in cases:
        with pytest.raises(kind, match=message):
            do(address, tmp_path / "pulled")
    with pytest.raises(FileExistsError, match="no index"):
        ehi.push(folder, "hf://me/model")
    with pytest.raises(PermissionError, match="hf auth login"):
        ehi.push(folder, "hf://locked/x")
    assert len(hub.commits["me/model"]) == 1
    assert not (tmp_path / "pulled").exists()


FIXTURES = Path(__file__).parents[1] / "fixtures"
QUESTIONS = ["a b c", "hello"]


@pytest.fixture
def answering(tmp_path):
    """An index that carries its tower, of which no other copy is found."""
    tower = shutil.copytree(FIXTURES / "bert_tiny", tmp_path / "tower")
    encoder = {"tower": str(tower), "query_length": 12}
    path = tmp_path / "index"
    save_index(
        build_index(np.eye(32), range(32), tree=None, encoder=encoder), path, tower=True
    )
    expected = open_index(path).search_text(QUESTIONS, k=5)
    shutil.rmtree(tower)
    return path, expected


def test_the_address_alone_answers_texts(answering, address, tmp_path, monkeypatch):
    path, expected = answering
    ehi.push(path, address)
    ehi.push(path, address)
    shutil.rmtree(path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("EHI_CACHE", str(tmp_path / "elsewhere" / "empty"))
    found = open_index(ehi.pull(address, "pulled")).search_text(QUESTIONS, k=5)
    assert (found.ids == expected.ids).all()
    assert (found.scores == expected.scores).all()


def test_an_altered_tower_is_found(answering, tmp_path):
    emptied()
    ehi.push(answering[0], "memory://a")
    assert "which this folder carries" in STORE.cat_file("/a/README.md").decode()
    (weights,) = [p for p in STORE.find("/a") if p.endswith("model.safetensors")]
    data = bytearray(STORE.cat_file(weights))
    data[-1] ^= 1
    STORE.pipe_file(weights, bytes(data))
    with pytest.raises(IndexCorruptError, match="memory:/" + weights + " was altered"):
        ehi.pull("memory://a", tmp_path / "pulled")
    for folder, name in (("../..", "x.json"), ("tower-0123abcd", "../x.json")):
        manifest = json.loads(STORE.cat_file(f"/a/{MANIFEST}"))
        entry = {"bytes": 1, "sha256": "0"}
        manifest["tower"] = {"folder": folder, "files": {name: entry}}
        STORE.pipe_file(f"/a/{MANIFEST}", json.dumps(manifest).encode())
        with pytest.raises(IndexCorruptError, match="which is not a plain name"):
            ehi.pull("memory://a", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists() and not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("module", [publish, model_card])
def test_the_examples_are_true(module):
    emptied()
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted and not found.failed


def test_the_card_says_what_the_manifest_says(folder):
    emptied()
    ehi.push(folder, "memory://a/name", description="Of four dimensions.")
    card = STORE.cat_file("/a/name/README.md").decode()
    assert card.startswith("---\nlibrary_name: ehi\n")
    for line in (
        "# name",
        "Of four dimensions.",
        "| documents | 31 |",
        "| documents added since the build | 2 |",
        "| 2 codes of 4 bits, 16 times smaller than float32, scored by ip |",
        "| licence | none is stated |",
        "index = open_index(ehi.pull('memory://a/name', 'name'))",
        '"hash": "def"',
    ):
        assert line in card, line
    ehi.push(folder, "memory://a/name", licence="CC0: 'x'")
    card = STORE.cat_file("/a/name/README.md").decode()
    assert "license: \"CC0: 'x'\"" in card and "| licence | CC0: 'x' |" in card


def test_the_command_works_without_jax(folder, tmp_path):
    script = (
        "import sys; from ehi import publish\n"
        f"publish.main(['push', {str(folder)!r}, 'file://{tmp_path}/place'])\n"
        f"publish.main(['pull', 'file://{tmp_path}/place', 'here'])\n"
        "assert 'jax' not in sys.modules\n"
        "publish.main(['pull', 'nowhere', 'there'])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(ehi.__file__).parents[1])}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("'nowhere' is no address")
    assert_same_index(open_index(tmp_path / "here"), open_index(folder))
