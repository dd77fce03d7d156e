"""Index folders, documents, ids and vectors as they come from the wild.

Each test says where its expectation comes from, and whether the case failed before the
test was written (FAILED) or passed already (PASSED).
"""

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ehi.files import cache_folder
from ehi.index import (
    IndexCorruptError,
    Shard,
    build_folder,
    build_index,
    open_index,
    save_index,
)

WIDTH, NUM = 8, 60
RNG = np.random.default_rng(5)
X = RNG.standard_normal((NUM, WIDTH)).astype(np.float32)
X /= np.linalg.norm(X, axis=1, keepdims=True)
QUERIES = X[:7] + np.float32(0.01)
NODES = RNG.standard_normal((1, 4, WIDTH)).astype(np.float32)
TREE = {"kind": "per_node", "nodes": [NODES], "scale": 1.0}
CODES = {"codebooks": 0.3 * RNG.standard_normal((4, 16, 2)).astype(np.float32)}


def saved(path, **options):
    save_index(build_index(X, range(NUM), tree=TREE, **options), path)
    return open_index(path)


def found(index):
    return index.search(QUERIES, 5, beam=4).ids.tolist()


EXPECTED = found(build_index(X, range(NUM), tree=TREE))


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")}


# Where a folder is, and who may write to it.


def test_a_relative_path_stays_the_same_folder(tmp_path, monkeypatch):
    """FAILED: the folder of that name in the new current folder was changed. As a file
    object does, an opened index belongs to what was opened."""
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
def test_the_umask_decides(tmp_path, umask, file, folder):
    """FAILED: folders were 755. POSIX open() and mkdir(): the umask decides, so that a
    group which shares a folder can add documents."""
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


@pytest.mark.parametrize(
    "name",
    ["with space", "dök/日本", "per%20cent#?", "line\nbreak", "-dash", "a" * 200],
)
def test_any_name_of_a_folder(tmp_path, name):
    """PASSED: any bytes but / and NUL make a name in POSIX."""
    index = saved(tmp_path / name)
    index.delete([1])
    assert open_index(tmp_path / name, verify=True).num_documents == NUM - 1


def test_a_link_that_changes_its_target(tmp_path):
    """PASSED: `current -> v2` is how servers are switched. Symbolic links are followed
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


def test_a_folder_that_was_moved_away(tmp_path):
    """PASSED: an open file can be read after it was renamed (POSIX), and writing to a
    path that is not there is FileNotFoundError."""
    index = saved(tmp_path / "index")
    (tmp_path / "index").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        index.add(X[:1] + 1, [100])
    assert found(index) == EXPECTED and index.num_documents == NUM
    assert found(open_index(tmp_path / "moved", verify=True)) == EXPECTED


def test_files_are_links_into_a_store(tmp_path):
    """PASSED: caches of the Hugging Face hub, git-annex and DVC keep read-only files in
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
def test_files_of_others_stay(tmp_path, name):
    """PASSED: file managers and people leave files in folders. What the manifest does
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
def test_a_manifest_that_an_editor_wrote(tmp_path, encode, opens):
    """PASSED: RFC 8259 lets readers ignore a byte-order mark, and white space and the
    order of names mean nothing. All else is refused, never guessed."""
    saved(tmp_path / "index")
    path = tmp_path / "index/manifest.json"
    path.write_bytes(encode(path.read_bytes()))
    if opens:
        assert found(open_index(tmp_path / "index", verify=True)) == EXPECTED
    else:
        with pytest.raises(IndexCorruptError, match=r"manifest\.json"):
            open_index(tmp_path / "index")


def test_lines_with_other_ends_are_refused(tmp_path):
    """PASSED: a checkout with autocrlf alters documents.jsonl; sizes tell at once."""
    index = build_index(X[:3], range(3), tree=None)
    save_index(index, tmp_path / "index", documents=["a", "b", "c"])
    path = tmp_path / "index/documents.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(IndexCorruptError, match="has 15 bytes, .* says 12"):
        open_index(tmp_path / "index")


def test_many_segments_need_few_open_files(tmp_path):
    """FAILED: every mapped array held a descriptor, so 1,024 of them, the usual limit,
    were 200 additions. Faiss reads an index through one file."""
    index = saved(tmp_path / "index")
    for number in range(40):
        index.add(X[:1] + 1 + number, [1000 + number])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 16, limits[1]))
    try:
        opened = open_index(tmp_path / "index")
        assert len(opened.segments) == 41
        opened.search(QUERIES, 50, beam=4)
        opened.compact()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert opened.num_documents == NUM + 40


def test_too_many_open_files_is_said_so(tmp_path, monkeypatch):
    """FAILED: a bare errno 24. The message names both ways out."""
    monkeypatch.setattr("ehi.index.folder._READ_BYTES", 0)
    index = saved(tmp_path / "index")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 2, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"compact\(\) the index, or raise `ulimit -n`"
        ):
            open_index(tmp_path / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found(index) == EXPECTED


def test_a_plain_locale(tmp_path):
    """PASSED: containers have LC_ALL=C. Files are bytes, so ids and documents to show
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


def test_a_copy_of_a_folder_that_lost_its_empty_parts(tmp_path):
    """PASSED: archives and object stores keep no empty files apart from their names."""
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


# Documents to show.


@pytest.mark.parametrize(
    "values",
    [
        ["text", "with\nbreak", "\u2028"],  # U+2028 ends a line for str.splitlines
        [1, 2.5, None],
        [[1, 2], {}, ""],
        [{"title": "\ud800"}, {"a": {"b": 1}}, True],  # half a surrogate pair
        ({"n": n} for n in range(3)),
    ],
    ids=["strings", "numbers", "nested", "surrogates", "generator"],
)
def test_any_json_value_can_be_shown(tmp_path, values):
    """PASSED here (the search command failed for texts): JSON values are what
    `save_index` says that it takes."""
    index = build_index(X[:3], range(3), tree=None)
    given = list(values)
    save_index(index, tmp_path / "index", documents=iter(given))
    opened = open_index(tmp_path / "index", verify=True)
    assert [opened.document(row) for row in range(3)] == given


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", np.float32(1), float("nan"), X[0]])
def test_what_is_not_json_is_refused(tmp_path, value):
    """FAILED: NaN was written, which RFC 8259 forbids and other readers refuse; the
    others were a TypeError."""
    index = build_index(X[:2], range(2), tree=None)
    with pytest.raises(ValueError, match="documents to show must be JSON"):
        save_index(index, tmp_path / "index", documents=["fine", value])
    assert not (tmp_path / "index").exists()


def test_a_config_reads_the_same_before_and_after_saving(tmp_path):
    """FAILED: numbers as keys and tuples were strings and lists in the file only."""
    config = {"sizes": (1, 2), "by": {3: "x"}}
    index = build_index(X, range(NUM), tree=TREE, config=config, encoder=config)
    save_index(index, tmp_path / "index")
    index.add(X[:1] + 1, [100], encoder=config)  # the same encoder
    read = {"sizes": [1, 2], "by": {"3": "x"}}
    assert index.config == open_index(tmp_path / "index").config == read


# Ids and rows.


def test_ids_of_any_text_come_back(tmp_path):
    """PASSED: an id is any Unicode text; composed and decomposed letters are two
    texts (Unicode, UAX 15), as a dict has it."""
    names = ["", "\0", "a\nb", "a\tb", " ", "\u00e9", "e\u0301", "🙂", "x" * 10_000]
    index = build_index(X[: len(names)], np.array(names, object), tree=None)
    save_index(index, tmp_path / "index")
    opened = open_index(tmp_path / "index", verify=True)
    assert opened.external_ids(np.arange(len(names))).tolist() == names
    assert opened.delete(["e\u0301"]) == 1
    assert opened.search(X[5:6], 1).ids.tolist() == [["\u00e9"]]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (
            ["a", "\ud800"],
            "an id is not valid Unicode: .*surrogates",
        ),  # FAILED: no word
        ([b"a", b"b"], "all strings or all integers .* got b'a'"),  # h5py gives bytes
        ([1, None], "got None among 2"),
        ([1.0, 2.0], "got 1.0 among 2"),  # pandas after a join
        ([True, False], "got True among 2"),
        (["1", 1], "got '1' among 2"),
        ([0, 2**63], "got 9223372036854775808"),
        (np.array([0, 2**64 - 1], np.uint64), "got 18446744073709551615"),
        (np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"), "among 2"),
        ("ab", "several in a row"),
        (np.array([[1], [2]]), "several in a row"),
    ],
)
def test_other_ids_are_refused(ids, words):
    """The first FAILED, without a word on ids. Rows are found by id, so none is
    converted: 1.0 and '1' might be two documents."""
    with pytest.raises(ValueError, match=words):
        build_index(X[:2], ids, tree=None)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("strings", [False, True])
def test_rows_that_do_not_exist(segments, strings):
    """FAILED: of several segments -1 came back, of one NumPy's error, which for -5 took
    a row from the end. NumPy's `take` of rows that do not exist is IndexError."""
    names = [f"d{i}" for i in range(9)] if strings else range(9)
    index = build_index(X[: 12 // segments - 3], names[: 12 // segments - 3], tree=None)
    while index.num_documents < 9:
        start = index.num_documents
        index.add(X[start : start + 4], names[start : start + 4])
    assert index.contents.num_rows == 9
    none = None if strings else -1
    assert index.external_ids([8, -1]).tolist() == [names[8], none]
    for rows in ([9], [0, -2], np.array([[10**12]]), [-(10**12)]):
        with pytest.raises(IndexError, match="is outside the 9 rows of this index"):
            index.external_ids(rows)
    with pytest.raises(ValueError, match="rows must be integers, got float64"):
        index.external_ids([0.5])
    assert index.external_ids([]).tolist() == []
    # Results that do not exist are padding, however the documents came.
    hits = index.search(QUERIES, 11)
    assert (hits.rows[:, 9:] == -1).all()
    assert (hits.rows[:, :9] >= 0).all()
    for k in (0, -1, 2**20 + 1, 1.5):
        with pytest.raises(ValueError, match="k must be"):
            index.search(QUERIES, k)


# Vectors.


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.astype(">f4"),  # a file of another machine
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.longdouble),
        np.asfortranarray,
        lambda x: x[::-1][::-1],
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: memoryview(np.ascontiguousarray(x)),
    ],
)
def test_floats_of_any_layout(convert):
    """PASSED: NumPy's own products do not depend on byte order and strides."""
    codebooks = convert(NODES[0])
    assert codebooks is not None
    tree = {"kind": "per_node", "nodes": [np.asarray(convert(NODES[0]))[None]]}
    index = build_index(convert(X), range(NUM), tree=tree | {"scale": 1.0})
    assert found(index) == EXPECTED
    assert index.search(convert(QUERIES), 5, beam=4).ids.tolist() == EXPECTED


def test_bfloat16_is_the_float32_it_stands_for():
    """FAILED: refused. JAX computes with it, and every bfloat16 is a float32."""
    half = X.astype(ml_dtypes.bfloat16)
    index = build_index(half, range(NUM), tree=TREE)
    same = build_index(half.astype(np.float32), range(NUM), tree=TREE)
    one, other = (i.search(half[:5], 5, beam=4) for i in (index, same))
    assert (one.ids == other.ids).all()
    assert (one.scores == other.scores).all()


LONG = X.copy()
LONG[5] *= np.float32(2e19)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, CODES], ids=["raw", "codes"])
def test_vectors_whose_products_overflow_are_refused(tmp_path, options):
    """FAILED: scores were inf - inf, a result was lost, and a batch differed from
    single queries. Products of two such rows exceed float32, 3.4e38."""
    words = "a vector of norm 2e.19, beyond 1.1e.12, where float32 products overflow"
    with pytest.raises(ValueError, match=f"embeddings hold {words}, in 1 rows, .* 5"):
        build_index(LONG, range(NUM), tree=TREE, **options)
    index = saved(tmp_path / "index", **options)
    for write in (index.add, index.update):
        with pytest.raises(ValueError, match=words):
            write(LONG, range(NUM))
    with pytest.raises(ValueError, match=f"shard 0 holds {words}, in row 5"):
        shards = [Shard(LONG, range(NUM))]
        build_folder(tmp_path / "streamed", shards, tree=TREE, **options)
    with pytest.raises(ValueError, match="NaN or infinity"):
        build_index(X.astype(np.float64) * 1e300, range(NUM), tree=TREE, **options)
    with pytest.raises(ValueError, match="beyond 7.74e.25"):
        index.search(QUERIES * np.float32(1e30), 5)
    assert found(index) == found(build_index(X, range(NUM), tree=TREE, **options))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, CODES], ids=["raw", "codes"])
def test_the_largest_vectors_are_ranked_alike_alone_and_in_a_batch(options):
    """FAILED beyond these norms: the order of results does not depend on a factor."""
    scale = {name: value * np.float32(2.0**38) for name, value in options.items()}
    index = build_index(X * np.float32(2.0**38), range(NUM), tree=TREE, **scale)
    queries = QUERIES * np.float32(2.0**84)
    batch = index.search(queries, 5, beam=4)
    assert np.isfinite(batch.scores).all()
    alone = [index.search(queries[i : i + 1], 5, beam=4).ids[0] for i in range(7)]
    assert (np.array(alone) == batch.ids).all()
    assert (batch.ids == found(build_index(X, range(NUM), tree=TREE, **options))).all()


SMALL = X.copy()
SMALL[7] *= np.float32(1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"rerank_vectors": True},
        {"leaf_dtype": "float16"},
        CODES | {"rerank_vectors": True},
    ],
    ids=["rerank", "leaves", "codes"],
)
def test_vectors_too_small_for_float16_are_refused(tmp_path, options):
    """FAILED: all scores were 0. The smallest float16 that keeps its digits is 2^-14
    (IEEE 754); vectors of zeros are right as they are."""
    words = "only values too small for float16, the largest .*e-09, where 6.1e-05"
    with pytest.raises(
        ValueError, match=f"{words} is needed, in 1 rows, first in row 7"
    ):
        build_index(SMALL, range(NUM), tree=TREE, **options)
    index = saved(tmp_path / "index", **options)
    with pytest.raises(ValueError, match=words):
        index.add(SMALL[7:8], [100])
    with pytest.raises(ValueError, match=words):
        shards = [Shard(SMALL, range(NUM))]
        build_folder(tmp_path / "streamed", shards, tree=TREE, **options)
    assert index.num_documents == NUM
    index.add(np.zeros((1, WIDTH)), [100])
    build_index(SMALL, range(NUM), tree=TREE)  # float32 holds them


@pytest.mark.parametrize("leaves", [{}, {"leaf_dtype": "float16"}, CODES])
@pytest.mark.parametrize("how", ["built", "streamed", "added", "compacted", "saved"])
def test_equal_documents_are_stored_alike_and_by_row(tmp_path, leaves, how):
    """PASSED: with equal bytes, only rows can order equal documents, so each leaf has
    them by row, whichever way they came. Faiss keeps the order of `add` as well."""
    x = X[np.arange(48) // 4 % 12]  # 12 documents, four times each
    x = np.concatenate([x, X[np.arange(48) % 12]])
    path = tmp_path / "index"
    if how == "streamed":
        shards = [Shard(x[:50], range(50)), Shard(x[50:], range(50, 96))]
        build_folder(path, shards, tree=TREE, **leaves)
        index = open_index(path)
    else:
        index = build_index(x[:50], range(50), tree=TREE, **leaves)
        if how == "built":
            index = build_index(x, range(96), tree=TREE, **leaves)
        else:
            index.add(x[50:70], range(50, 70))
            index.add(x[70:], range(70, 96))
        if how == "compacted":
            index.compact()
        if how == "saved":
            save_index(index, path)
            index = open_index(path)
    stored = {}
    for segment in index.segments:
        values = segment.vectors if segment.codes is None else segment.codes
        for leaf in range(4):
            start, stop = segment.leaf_offsets[leaf : leaf + 2]
            rows = segment.rows(start, stop)
            assert (np.diff(rows) > 0).all()
            for row, value in zip(rows.tolist(), values[start:stop], strict=True):
                stored[row] = leaf, value.tobytes()
    for row in range(96):
        twins = [other for other in range(96) if (x[other] == x[row]).all()]
        assert {stored[twin] for twin in twins} == {stored[row]}


# The cache folder.


def test_a_user_without_a_home(monkeypatch):
    """FAILED: a traceback. `docker run --user 12345` has neither HOME nor an entry in
    /etc/passwd; the message names the variable that helps."""
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
