"""Index folders as they come from the wild: paths, permissions, links, copies.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import contextlib
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from saved_index import (
    EXPECTED,
    NUM,
    QUERIES,
    TREE,
    X,
    files_of,
    found,
    saved,
)
from wild_cases import failed

from ehi.files import cache_folder
from ehi.index import (
    IndexCorruptError,
    Shard,
    build_folder,
    build_index,
    open_index,
    save_index,
)

# Where a folder is, and who may write to it.


def test_a_relative_path_stays_the_same_folder_failed(tmp_path, monkeypatch):
    """An opened index belongs to the folder that was opened, as a file object does."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        saved(tmp_path / name / "index")
    monkeypatch.chdir(tmp_path / "here")
    index = open_index("index")
    monkeypatch.chdir(tmp_path / "there")
    index.delete([3])
    index.compact()
    counts = [
        open_index(tmp_path / n / "index").num_documents for n in ("here", "there")
    ]
    assert counts == [NUM - 1, NUM]


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o002, 0o664, 0o775), (0o077, 0o600, 0o700)]
)
def test_the_umask_decides_failed(tmp_path, umask, file, folder):
    """As for open() and mkdir() of POSIX: a group that shares a folder can then add
    documents."""
    old = os.umask(umask)
    try:
        index = saved(tmp_path / "index")
        index.add(X[:2] + 1, [100, 101])
        index.delete([100])
        index.compact()
        index.add(X[:1] + 2, [102])
        build_folder(tmp_path / "streamed", [Shard(X, range(NUM))], tree=TREE)
    finally:
        os.umask(old)
    for path in tmp_path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (folder if path.is_dir() else file), path


@pytest.mark.parametrize("how", [failed("saved"), failed("streamed")])
def test_an_empty_folder_keeps_its_permissions(tmp_path, how):
    """As when files are made in it: who may not read the folder may not read the index
    either (POSIX)."""
    path = tmp_path / "index"
    for mode in (0o700, 0o2770, 0o755):
        path.mkdir()
        path.chmod(mode)
        if how == "saved":
            saved(path)
        else:
            build_folder(path, [Shard(X, range(NUM))], tree=TREE)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert found(open_index(path)) == EXPECTED
        shutil.rmtree(path)


@pytest.mark.parametrize(
    "name",
    ["with space", "dök/日本", "per%20cent#?", "line\nbreak", "-dash", "a" * 200],
)
def test_any_name_of_a_folder_passed(tmp_path, name):
    """Any bytes but / and NUL make a name in POSIX."""
    index = saved(tmp_path / name)
    index.delete([1])
    assert open_index(tmp_path / name, verify=True).num_documents == NUM - 1


def test_a_link_that_changes_its_target_passed(tmp_path):
    """`current -> v2` is how servers are switched. Symbolic links are followed
    each time a path is used, so refresh() sees the other folder."""
    saved(tmp_path / "v1")
    other = saved(tmp_path / "v2")
    other.delete([0])
    save_index(build_index(X, range(NUM), tree=None), tmp_path / "v3")
    (tmp_path / "current").symlink_to("v1")
    index = open_index(tmp_path / "current")
    for target in ("v2", "v3"):
        (tmp_path / "new").symlink_to(target)
        os.replace(tmp_path / "new", tmp_path / "current")
        if target == "v2":
            assert index.refresh()
            assert index.num_documents == NUM - 1
    with pytest.raises(ValueError, match="another index now, with other parameters"):
        index.refresh()


def test_a_folder_that_was_moved_away_passed(tmp_path):
    """An open file can be read after it was renamed (POSIX), and writing to a
    path that is not there is FileNotFoundError."""
    index = saved(tmp_path / "index")
    (tmp_path / "index").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        index.add(X[:1] + 1, [100])
    assert found(index) == EXPECTED and index.num_documents == NUM
    assert found(open_index(tmp_path / "moved", verify=True)) == EXPECTED


def test_files_are_links_into_a_store_passed(tmp_path):
    """Caches of the Hugging Face hub, git-annex and DVC keep read-only files in
    a store and link to them. The store must not be written to."""
    saved(tmp_path / "index", rerank_vectors=True)
    store = tmp_path / "store"
    store.mkdir()
    for path in list((tmp_path / "index").glob("*.*")):
        path.rename(store / path.name)
        (store / path.name).chmod(0o444)
        path.symlink_to(store / path.name)
    before = files_of(store)
    index = open_index(tmp_path / "index", verify=True)
    assert found(index) == EXPECTED
    index.add(X[:1] + 1, [100])
    index.delete([100])
    index.compact()
    assert found(open_index(tmp_path / "index", verify=True)) == EXPECTED
    assert files_of(store) == before


@pytest.mark.parametrize("name", [".DS_Store", "._manifest.json", "README.md", "x.npy"])
def test_files_of_others_stay_passed(tmp_path, name):
    """File managers and people leave files in folders. What the manifest does
    not name is not ours to remove."""
    index = saved(tmp_path / "index")
    (tmp_path / "index" / name).write_bytes(b"theirs")
    index.delete([1])
    index.compact()
    assert (tmp_path / "index" / name).read_bytes() == b"theirs"
    assert open_index(tmp_path / "index", verify=True).num_documents == NUM - 1


@pytest.mark.parametrize(
    ("encode", "opens"),
    [
        (lambda text: b"\xef\xbb\xbf" + text, True),  # an editor of Windows
        (lambda text: text.replace(b"\n", b"\r\n"), True),  # git with autocrlf
        (lambda text: text.decode().encode("utf-16"), True),  # PowerShell's `>`
        (lambda text: json.dumps(json.loads(text), sort_keys=True).encode(), True),
        (lambda text: text[:-1], False),  # truncated
        (lambda text: b"", False),
    ],
    ids=["bom", "crlf", "utf-16", "sorted", "cut", "empty"],
)
def test_a_manifest_that_an_editor_wrote_passed(tmp_path, encode, opens):
    """RFC 8259 lets readers ignore a byte-order mark; white space and the order of
    names mean nothing. Anything else is refused, never guessed."""
    saved(tmp_path / "index")
    path = tmp_path / "index/manifest.json"
    path.write_bytes(encode(path.read_bytes()))
    if opens:
        assert found(open_index(tmp_path / "index", verify=True)) == EXPECTED
    else:
        with pytest.raises(IndexCorruptError, match=r"manifest\.json"):
            open_index(tmp_path / "index")


def test_lines_with_other_ends_are_refused_passed(tmp_path):
    """Git with autocrlf alters documents.jsonl; its size shows that."""
    index = build_index(X[:3], range(3), tree=None)
    save_index(index, tmp_path / "index", documents=["a", "b", "c"])
    path = tmp_path / "index/documents.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(IndexCorruptError, match="has 15 bytes, .* says 12"):
        open_index(tmp_path / "index")


@contextlib.contextmanager
def descriptors(free):
    """Only so many more files can be open at once."""
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    limit = next(n for n in range(4096) if len(set(range(n)) - taken) == free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_many_segments_need_few_open_files_failed(tmp_path):
    """A mapped array holds a descriptor, and 1,024 is the usual limit, so small arrays
    are read. Faiss reads an index through one file."""
    index = saved(tmp_path / "index")
    for number in range(40):
        index.add(X[:1] + 1 + number, [1000 + number])
    with descriptors(free=16):
        opened = open_index(tmp_path / "index")
        assert len(opened.segments) == 41
        opened.search(QUERIES, 50, beam=4)
        opened.compact()
    assert opened.num_documents == NUM + 40


def test_too_many_open_files_is_said_so_failed(tmp_path, monkeypatch):
    """The message names both ways out of errno 24."""
    monkeypatch.setattr("ehi.index.folder._READ_BYTES", 0)
    index = saved(tmp_path / "index")
    words = r"compact\(\) the index, or raise `ulimit -n`"
    with descriptors(free=2), pytest.raises(OSError, match=words):
        open_index(tmp_path / "index")
    assert found(index) == EXPECTED


def test_a_plain_locale_passed(tmp_path):
    """Containers have LC_ALL=C. Files are bytes, so ids and documents to show
    do not depend on it."""
    names = ["ä", "日本", "🙂"]
    save_index(
        build_index(X[:3], names, tree=None), tmp_path / "index", documents=names
    )
    code = (
        "import sys; from ehi.index import open_index\n"
        "index = open_index(sys.argv[1], verify=True)\n"
        "print(ascii([index.external_ids([0, 1, 2]).tolist(), index.document(2)]))"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = [sys.executable, "-c", code, str(tmp_path / "index")]
    out = subprocess.run(
        run, env=os.environ | plain, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == ascii([names, "🙂"])


def test_a_copy_of_a_folder_that_lost_its_empty_parts_passed(tmp_path):
    """Archives and object stores keep only the names of empty files."""
    index = build_index(X[:3], ["a", "b", "c"], tree=None)
    save_index(index, tmp_path / "index")
    opened = open_index(tmp_path / "index")
    opened.delete(["a", "b", "c"])
    opened.compact()  # arrays of no rows
    archive = shutil.make_archive(str(tmp_path / "copy"), "zip", tmp_path / "index")
    shutil.unpack_archive(archive, tmp_path / "again")
    empty = open_index(tmp_path / "again", verify=True)
    assert empty.search(QUERIES, 3).ids.tolist() == [[None] * 3] * len(QUERIES)
    empty.add(X[:1], ["a"])
    assert empty.search(X[:1], 1).ids.tolist() == [["a"]]


# The cache folder.


def test_a_user_without_a_home_failed(monkeypatch):
    """`docker run --user 12345` has neither HOME nor an entry in /etc/passwd; the
    message names the variable that helps."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("EHI_CACHE", raising=False)

    def no_entry(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", no_entry)
    with pytest.raises(FileNotFoundError, match="variable EHI_CACHE to a folder"):
        cache_folder()
    monkeypatch.setenv("EHI_CACHE", "~no-such-user/x")
    monkeypatch.setattr("pwd.getpwnam", no_entry)
    with pytest.raises(FileNotFoundError, match="~no-such-user/x names a home folder"):
        cache_folder()
    monkeypatch.setenv("EHI_CACHE", "/data/cache")
    assert cache_folder() == Path("/data/cache")
