import errno
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import index_reference as reference
import numpy as np
import pytest

from ehi.index import IndexLockedError, build_index, open_index, save_index
from ehi.index.lock import writer_lock
from ehi.index.stream import Shard, build_folder

WIDTH, NUM = 4, 500
RNG = np.random.default_rng(3)
X = RNG.standard_normal((NUM, WIDTH)).astype(np.float32)
IDS = [f"dök/{i}" for i in range(NUM)]
TREE = reference.make_tree("per_node", 2, 3, WIDTH, RNG, hidden=3)
CUTS = [0, 120, 120, 121, 400, NUM]  # one shard is empty, one holds one document
PQ = {
    "codebooks": RNG.standard_normal((2, 16, 2)).astype(np.float32),
    "assign_codebooks": RNG.standard_normal((2, 16, 2)).astype(np.float32),
    "rotation": reference.make_rotation(WIDTH, RNG),
    "leaf_centroids": RNG.standard_normal((9, WIDTH)).astype(np.float32),
}
KINDS = {
    "raw": {"tree": TREE},
    "half": {"tree": TREE, "leaf_dtype": "float16", "spill": 2},
    "flat": {"tree": None, "rerank_vectors": True},
    "level": {"tree": reference.make_tree("per_level", 2, 3, WIDTH, RNG), "spill": 3},
    "pq": {
        "tree": TREE,
        "query_tree": reference.make_tree("per_node", 2, 3, WIDTH, RNG),
        "spill": 2,
        "rerank_vectors": True,
        "encoder": {"tower": "abc"},
        "config": {"hash": "def"},
        "query_head": {"projection": RNG.standard_normal((3, WIDTH))},
        **PQ,
    },
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Every limit so low that it is met."""
    limits = {
        "shards._BLOCK_ROWS": 37,
        "scratch._BAND_BYTES": 256,
        "ids._SOME_IDS": 50,
        "ids._REGION_IDS": 64,
    }
    for name, value in limits.items():
        monkeypatch.setattr(f"ehi.index.stream.{name}", value)


def make_shards(x=X, all_ids=IDS, **changes):
    """Shards of all rows; `changes` are of shard 3, rows 121 to 399."""
    shards = [
        {"embeddings": x[start:stop], "ids": all_ids[start:stop]}
        for start, stop in itertools.pairwise(CUTS)
    ]
    shards[3] |= changes
    return [Shard(**shard) for shard in shards]


def bytes_of(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def saved(path, documents=None, x=X, ids=IDS, **parameters):
    save_index(build_index(x, ids, **parameters), path, documents)
    return bytes_of(path)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_the_one_of_a_build_in_memory(tmp_path, kind, threads):
    build_folder(tmp_path / "new", make_shards(), threads=threads, **KINDS[kind])
    assert bytes_of(tmp_path / "new") == saved(tmp_path / "old", **KINDS[kind])
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]
    open_index(tmp_path / "new", verify=True)


def test_embeddings_come_from_files_functions_and_other_types(tmp_path):
    np.save(tmp_path / "x.npy", X[121:400])
    np.save(tmp_path / "ids.npy", np.arange(121, 400))
    np.save(tmp_path / "words.npy", np.array(IDS[121:400]))

    def blocks():
        yield X[121:122]
        yield X[122:380]
        yield X[380:400]

    numbers = np.arange(NUM)
    expected = saved(tmp_path / "old", ids=numbers, **KINDS["pq"])
    for name, changes in {
        "file": {
            "embeddings": tmp_path / "x.npy",
            "ids": str(tmp_path / "ids.npy"),
        },
        "function": {"embeddings": blocks, "ids": range(121, 400)},
    }.items():
        shards = make_shards(all_ids=numbers, **changes)
        build_folder(tmp_path / name, shards, **KINDS["pq"])
        assert bytes_of(tmp_path / name) == expected

    half = X.astype(np.float16)
    shards = make_shards(half, ids=tmp_path / "words.npy")
    build_folder(tmp_path / "half", shards, **KINDS["raw"])
    expected = saved(tmp_path / "old half", x=half, **KINDS["raw"])
    assert bytes_of(tmp_path / "half") == expected


def test_named_shards_make_the_same_bytes_in_any_order(tmp_path):
    for names in (["b", "a", "e", "c", "d"], [1, 0, 4, 2, 3]):
        shards = [
            replace(shard, name=name)
            for shard, name in zip(make_shards(), names, strict=True)
        ]
        folders = []
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3]):
            folders.append(tmp_path / f"{names[0]} {order[0]}")
            build_folder(folders[-1], [shards[i] for i in order], **KINDS["pq"])
        assert bytes_of(folders[0]) == bytes_of(folders[1])
    index = open_index(folders[0])
    assert index.external_ids(np.arange(2)).tolist() == IDS[:2]


def test_documents_to_show_are_stored(tmp_path):
    shown = [{"title": f"T{i}"} for i in range(NUM)]
    shards = [
        replace(shard, documents=shown[start:stop])
        for shard, (start, stop) in zip(
            make_shards(), itertools.pairwise(CUTS), strict=True
        )
    ]
    shards[4] = replace(shards[4], documents=lambda: iter(shown[400:]))
    build_folder(tmp_path / "new", shards, **KINDS["raw"])
    assert bytes_of(tmp_path / "new") == saved(tmp_path / "old", shown, **KINDS["raw"])
    short = [*shards[:4], replace(shards[4], documents=lambda: iter(shown[401:]))]
    no_json = [*shards[:4], replace(shards[4], documents=[{1}] * 100)]
    for bad, words in (
        (short, "shard 4 has 99 documents to show for 100 ids"),
        (no_json, "documents to show of shard 4 must be JSON"),
        ([*shards[:4], make_shards()[4]], "first shard has some documents .* shard 4"),
    ):
        with pytest.raises(ValueError, match=words):
            build_folder(tmp_path / "bad", bad, **KINDS["raw"])
        assert sorted(os.listdir(tmp_path)) == ["new", "old"]


def test_an_index_is_replaced_and_other_folders_are_not(tmp_path):
    saved(tmp_path / "index", x=X[:100], ids=IDS[:100], **KINDS["raw"])
    old = open_index(tmp_path / "index")
    build_folder(tmp_path / "index", make_shards(), **KINDS["pq"])
    assert open_index(tmp_path / "index", verify=True).num_documents == NUM
    assert old.search(X[:1], 1).ids[0, 0] is not None  # what was mapped stays
    before = bytes_of(tmp_path)
    with writer_lock(tmp_path / "index"), pytest.raises(IndexLockedError):
        build_folder(tmp_path / "index", make_shards(), **KINDS["pq"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="is not an index that can be replaced"):
        build_folder(tmp_path / "mine", make_shards(), **KINDS["pq"])
    assert bytes_of(tmp_path) == before | {"mine/thesis.txt": b""}


def test_a_beam_over_everything_is_exact_and_a_narrow_one_is_near(tmp_path):
    expected = saved(tmp_path / "old", **KINDS["pq"])
    build_folder(tmp_path / "wide", make_shards(), beam=3, **KINDS["pq"])
    assert bytes_of(tmp_path / "wide") == expected
    build_folder(tmp_path / "narrow", make_shards(), beam=2, **KINDS["pq"])
    assert open_index(tmp_path / "narrow", verify=True).leaf_sizes.sum() == 2 * NUM


NAN = X[121:400].copy()
NAN[200, 1] = np.nan
LARGE = X[121:400].copy()
LARGE[200, 1] = 65520
BAD = {
    "shard 3 holds NaN or infinity in row 200": {"embeddings": NAN},
    "shard 3 holds a value too large for float16 in row 200": {"embeddings": LARGE},
    "shard 3 holds float32 of width 3, the first shard float32 of width 4": {
        "embeddings": X[121:400, :3]
    },
    "shard 3 holds float64 of width 4": {"embeddings": X[121:400].astype(float)},
    "shard 3 has 278 embeddings for 279 ids": {"embeddings": X[122:400]},
    "shard 3 has 200 embeddings for 279 ids": {"embeddings": lambda: [X[:200]]},
    "shard 3 has too many embeddings for 279 ids": {"embeddings": lambda: [X]},
    r"shard 3 must hold blocks .* got the shape \(4,\)": {
        "embeddings": lambda: iter(X)
    },
    r"doc_ids repeat: 'dök/7' stands in row 7 of shard 0 and in row 5 of shard 3": {
        "ids": [*IDS[121:126], IDS[7], *IDS[127:400]]
    },
    "the ids of shard 3 are integers, those before it strings": {
        "ids": range(121, 400)
    },
    "shard 3: doc_ids must be all strings or all integers": {"ids": [0.5] * 279},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_shards_are_refused_and_leave_nothing(tmp_path, words):
    shards = make_shards(**BAD[words])
    with pytest.raises(ValueError, match=words):
        build_folder(tmp_path / "new", shards, threads=2, **KINDS["half"])
    assert not os.listdir(tmp_path)


def test_missing_and_unreadable_files_are_named(tmp_path):
    path = tmp_path / "x.npy"
    with pytest.raises(FileNotFoundError, match="shard 3 is missing: .*x.npy does not"):
        build_folder(tmp_path / "new", make_shards(embeddings=path), **KINDS["raw"])
    np.save(path, X[121:400])
    whole = path.read_bytes()
    for content in (whole[:-8], b"", b"embeddings"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="shard 3 cannot be read: .*x.npy"):
            build_folder(tmp_path / "new", make_shards(embeddings=path), tree=TREE)
    assert os.listdir(tmp_path) == ["x.npy"]


BAD_NAMES = {
    "two shards have the name 'a'": ["a", "b", "c", "a", "d"],
    "numbers of shards count from 0 on, and shard 3 is missing": [0, 1, 2, 5, 4],
    "shard 0 is missing: got 5 shards from -1 to 3": [0, 1, 2, 3, -1],
    "must be all strings or all numbers, or all None": ["a", 1, "c", "d", None],
}


@pytest.mark.parametrize("words", BAD_NAMES)
def test_missing_and_repeated_names_are_refused(tmp_path, words):
    shards = [
        replace(shard, name=name)
        for shard, name in zip(make_shards(), BAD_NAMES[words], strict=True)
    ]
    with pytest.raises(ValueError, match=words):
        build_folder(tmp_path / "new", shards, tree=TREE)


BAD_ARGUMENTS = {
    "an empty corpus: no documents in 0 shards": {"shards": []},
    "an empty corpus: no documents in 1 shards": {"shards": [Shard(X[:0], [])]},
    "shard 0 must hold floats of shape": {
        "shards": [Shard(np.ones((9, 2), int), IDS[:9])]
    },
    "too large for 8 documents": {"shards": [Shard(X[:8], IDS[:8])]},
    "beam 1 is narrower than the 2 leaves a document": {"beam": 1, "spill": 2},
    "threads must be at least 1": {"threads": 0},
    "leaf_dtype must be one of": {"leaf_dtype": "int8"},
    "rotation needs codebooks": {"rotation": np.eye(WIDTH)},
}


@pytest.mark.parametrize("words", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(tmp_path, words):
    arguments = {"shards": make_shards(), "tree": TREE} | BAD_ARGUMENTS[words]
    with pytest.raises(ValueError, match=words):
        build_folder(tmp_path / "new", **arguments)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("again", ["other values", "other order", "fewer", "more"])
def test_a_shard_that_changes_between_the_readings_is_named(tmp_path, again):
    part = X[121:400]
    second = {
        "other values": part + 1,
        "other order": part[::-1],
        "fewer": part[:-1],
        "more": np.concatenate([part, part]),
    }[again]
    # Only the first shard is read once more, to find its width.
    readings = iter([part, second])
    shards = make_shards(embeddings=lambda: [next(readings)])
    with pytest.raises(ValueError, match="shard 3 changed while the index was built"):
        build_folder(tmp_path / "new", shards, threads=2, **KINDS["pq"])
    assert not os.listdir(tmp_path)


def test_ids_that_change_between_the_readings_are_refused(tmp_path):
    class Changing(list):
        readings = 0

        def __getitem__(self, part):
            self.readings += part.start == 0
            return [
                f"{self.readings}/{value}" for value in list.__getitem__(self, part)
            ]

    with pytest.raises(ValueError, match="the ids of a shard changed while the index"):
        build_folder(
            tmp_path / "new", make_shards(ids=Changing(IDS[121:400])), tree=TREE
        )
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("strings", [True, False])
def test_repeated_ids_are_found_wherever_they_stand(tmp_path, strings):
    rng = np.random.default_rng(0)
    for _ in range(10):
        ids = rng.permutation(10 * NUM)[:NUM] * 10**9
        first, second = np.sort(rng.permutation(NUM)[:2])
        ids[second] = ids[first]
        if strings:
            ids = [str(value) for value in ids]
        places = []
        for row in (first, second):
            shard = np.searchsorted(CUTS, row, side="right") - 1
            places.append(f"row {row - CUTS[shard]} of shard {shard}")
        with pytest.raises(ValueError, match=" and in ".join(places)):
            build_folder(tmp_path / "new", make_shards(all_ids=ids), tree=TREE)


def test_equal_hashes_of_different_strings_are_no_repetition(tmp_path, monkeypatch):
    hashes = "ehi.index.stream.ids._hash"
    monkeypatch.setattr(hashes, lambda ids: np.full(len(ids), 7, np.uint64))
    build_folder(tmp_path / "new", make_shards(), tree=TREE)
    with pytest.raises(ValueError, match="repeat: 'dök/3' stands in row 3 of shard 0"):
        build_folder(tmp_path / "new", make_shards(ids=IDS[3:282]), tree=TREE)


_CHILD = """
import resource, signal, sys
import numpy as np
from ehi.index.stream import ids, scratch
from ehi.index.stream import Shard, build_folder

scratch._BAND_BYTES, ids._REGION_IDS = 2**22, 2**14
path, num, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
tree = {"kind": "per_node", "nodes": [rng.standard_normal((1, 64, 64))], "scale": 1.0}

def blocks():
    rng = np.random.default_rng(1)
    for _ in range(num // 5000):
        yield rng.standard_normal((5000, 64), np.float32)

def memory(field):
    with open("/proc/self/status") as file:
        return int([line for line in file if line.startswith(field)][0].split()[1])

if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
before = memory("VmRSS")
try:
    build_folder(path, [Shard(blocks, range(num))], tree=tree)
except OSError as error:
    print(error.errno, error)
else:
    print(memory("VmHWM") - before)
"""


def run_child(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, arguments)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_documents(tmp_path):
    sizes = (100_000, 400_000)
    peaks = [int(run_child(tmp_path / f"{size}", size, 0)) for size in sizes]  # KB
    grown = [open_index(tmp_path / f"{size}").index_bytes // 1024 for size in sizes]
    assert grown[1] - grown[0] > 70_000
    assert peaks[1] - peaks[0] < 10_000
    assert peaks[1] < 120_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits file sizes")
@pytest.mark.parametrize("limit", [10_000, 30_000, 300_000])
def test_a_full_disk_is_said_so_and_leaves_nothing(tmp_path, limit):
    said = run_child(tmp_path / "new", 20_000, limit)
    assert said.startswith(f"{errno.EFBIG} ") and "/new is as it was" in said
    assert not os.listdir(tmp_path)
