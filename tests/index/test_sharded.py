"""Shards of an index, also over Ray, answer as the whole index does."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import index_reference as reference
import numpy as np
import pytest

from ehi.index import build_index, open_index, save_index
from ehi.index.search.search import route_queries
from ehi.index.sharded import ShardedIndex, answer, merge_answers, split_index

WIDTH, NUM, K = 8, 203, 9
RNG = np.random.default_rng(5)
FIELDS = ("ids", "scores", "visited", "nodes_scored", "leaves", "rows")
TREE = reference.make_tree("per_node", 2, 3, WIDTH, RNG, hidden=3)


def whole(*shape):
    """Small whole numbers; sums of their products are exact and often tie."""
    return RNG.integers(-2, 3, shape).astype(np.float32)


X, QUERIES = whole(NUM, WIDTH), whole(40, WIDTH)
PQ = {
    "codebooks": whole(4, 16, 2),
    "rotation": np.eye(WIDTH, dtype=np.float32)[::-1],
    "leaf_centroids": whole(9, WIDTH),
}
KINDS = {
    "raw": {"tree": TREE},
    "flat": {"tree": None, "leaf_dtype": "float16"},
    "level": {"tree": reference.make_tree("per_level", 2, 3, WIDTH, RNG), "spill": 3},
    "pq": {"tree": TREE, "spill": 2, "rerank_vectors": True, **PQ},
}
IDS = {"raw": range(1000, 1000 + NUM), "pq": [f"dök/{i}" for i in range(NUM)]}


def make(path, kind, deleted=0):
    """An index of a kind; with `deleted`, it has segments and deleted documents."""
    ids = list(IDS.get(kind, range(NUM)))
    index = build_index(X[:150], ids[:150], **KINDS[kind])
    save_index(index, path, [{"n": n} for n in range(150)])
    index = open_index(path)
    index.add(X[150:], ids[150:], documents=[{"n": n} for n in range(150, NUM)])
    index.delete(ids[deleted // 2 : 3 * deleted : 3])
    if not deleted:
        index.compact()
    return open_index(path)


def search(parts, queries, k, rerank=0, *, beam, min_prob=0.0):
    """What the router returns for the indexes of all parts."""
    sizes = [part.contents.num_rows for part in parts]
    leaves, scored = route_queries(parts[-1], queries, beam, min_prob)
    settings = {"beam": beam, "min_prob": min_prob, "rerank": rerank}
    answers = [answer(part, queries, leaves, k, **settings) for part in parts]
    merged = merge_answers(answers, np.cumsum(sizes) - sizes, k)
    return merged | {"leaves": leaves, "nodes_scored": scored}


def assert_same(found, hits, names=FIELDS):
    for name in names:
        mine = found[name] if isinstance(found, dict) else getattr(found, name)
        expected = getattr(hits, name)
        assert mine.dtype == expected.dtype and (mine == expected).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_parts_find_what_the_whole_finds(tmp_path, kind):
    index = make(tmp_path / "index", kind)
    settings = {"beam": min(4, index.num_leaves)}
    for shards in (1, 3, 40):
        folders = split_index(tmp_path / "index", tmp_path / f"in{shards}", shards)
        parts = [open_index(folder, verify=True) for folder in folders]
        assert sum(part.num_documents for part in parts) == NUM
        for queries in (QUERIES, QUERIES[:1]):
            for k in (K, NUM + 3):
                hits = index.search(queries, k, **settings)
                assert_same(search(parts, queries, k, **settings), hits)
        hits = index.search(QUERIES, K, min_prob=0.2, **settings)
        assert_same(search(parts, QUERIES, K, min_prob=0.2, **settings), hits)
    last = parts[-1]
    assert last.external_ids(np.array([-1, 0])).tolist()[1] == index.external_ids(
        np.array([NUM - last.num_documents])
    )
    assert last.document(0) == index.document(NUM - last.num_documents)


def test_parts_rerank_the_candidates_of_the_whole(tmp_path):
    index = make(tmp_path / "index", "pq")
    folders = split_index(tmp_path / "index", tmp_path / "parts", 4)
    parts = [open_index(folder) for folder in folders]
    for rerank in (K, 25):
        hits = index.search(QUERIES, K, beam=4, rerank=rerank)
        assert_same(search(parts, QUERIES, K, rerank, beam=4), hits)
    with pytest.raises(ValueError, match="rerank=3 candidates are fewer than k=9"):
        search(parts, QUERIES, K, 3, beam=4)


def test_deleted_documents_stay_behind(tmp_path):
    index = make(tmp_path / "index", "pq", deleted=30)
    folders = split_index(tmp_path / "index", tmp_path / "parts", 3)
    parts = [open_index(folder) for folder in folders]
    assert sum(part.contents.num_rows for part in parts) == index.num_documents < NUM
    hits = index.search(QUERIES, K, beam=4)
    # `split_index` numbers rows anew, as `compact` does.
    same = ("ids", "scores", "visited", "leaves")
    assert_same(search(parts, QUERIES, K, beam=4), hits, same)


def test_scores_of_real_numbers_differ_by_rounding_only(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 48)).astype(np.float32)
    tree = reference.make_tree("per_node", 1, 12, 48, rng)
    save_index(build_index(x, range(3000), tree=tree), tmp_path / "index")
    folders = split_index(tmp_path / "index", tmp_path / "parts", 3)
    parts = [open_index(folder) for folder in folders]
    queries = rng.standard_normal((50, 48)).astype(np.float32)
    hits = open_index(tmp_path / "index").search(queries, 10, beam=3)
    found = search(parts, queries, 10, beam=3)
    assert_same(found, hits, ("ids", "visited", "leaves"))
    np.testing.assert_allclose(found["scores"], hits.scores, rtol=1e-5)


def test_bad_folders_are_refused(tmp_path):
    make(tmp_path / "index", "raw")
    make(tmp_path / "other", "flat")
    for bad in (0, NUM + 1):
        with pytest.raises(ValueError, match="shards"):
            split_index(tmp_path / "index", tmp_path / "parts", bad)
    assert not (tmp_path / "parts").exists()
    one, two, three = split_index(tmp_path / "index", tmp_path / "parts", 3)
    foreign = split_index(tmp_path / "other", tmp_path / "foreign", 3)
    copy = shutil.copytree(one, tmp_path / "copy")
    refused = {
        "shard 1 of 3 is missing": [one, three],
        "are the same shard": [one, two, three, copy],
        "are of different indexes": [one, foreign[1], three],
        "is no shard of an index": [tmp_path / "index"],
        "there are no shards": [],
    }
    for message, folders in refused.items():
        with pytest.raises(ValueError, match=message):
            ShardedIndex.start(folders)
    with pytest.raises(FileNotFoundError, match="holds no index"):
        ShardedIndex.start([one, two, tmp_path / "nowhere"])


def test_without_ray_one_sentence(tmp_path, monkeypatch):
    make(tmp_path / "index", "raw")
    folders = split_index(tmp_path / "index", tmp_path / "parts", 2)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'ehi\[ray\]'"):
        ShardedIndex.start(folders)


def test_the_index_does_not_import_ray():
    code = "import sys, ehi.index, ehi.index.sharded; print('ray' in sys.modules)"
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=root)
    assert said.stdout.strip() == b"False", said.stderr


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The whole index, and its parts behind a router."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    folder = tmp_path_factory.mktemp("served")
    index = make(folder / "index", "pq")
    folders = split_index(folder / "index", folder / "parts", 3)
    with ShardedIndex.start(reversed(folders)) as sharded:
        yield index, sharded


def test_ray_shards_answer_as_the_whole(served):
    index, sharded = served
    assert sharded.num_documents == NUM
    mask = np.arange(NUM) % 3 > 0
    for settings in (
        {"beam": 4},
        {"beam": 9, "min_prob": 0.1, "threads": 2},
        {"beam": 3, "rerank": 20},
        {"beam": 9, "deny": IDS["pq"][:100]},
        {"beam": 9, "allow": mask},
    ):
        hits = sharded.search(QUERIES, K, **settings)
        assert hits.answered == 1
        assert_same(hits, index.search(QUERIES, K, **settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beam": 99}, "beam 99 is larger"),
        ({"k": 0}, "k must be at least 1"),
        ({"queries": QUERIES[:, :3]}, "queries must have shape"),
        ({"allow": np.ones(3, bool)}, "these shards have 203 rows"),
    ],
)
def test_ray_shards_refuse_what_an_index_refuses(served, change, message):
    _, sharded = served
    settings = {"queries": QUERIES, "k": K} | change
    with pytest.raises(ValueError, match=message):
        sharded.search(**settings)


def test_a_killed_shard_is_missed_and_comes_back(served):
    import ray

    index, sharded = served
    victim = 1
    pid = ray.get(sharded._actors[victim].pid.remote())
    os.kill(pid, signal.SIGKILL)
    hits = sharded.search(QUERIES, K, beam=4, timeout=0.5)
    rows = np.cumsum([0, *sharded._num_rows])
    gone = np.arange(rows[victim], rows[victim + 1])
    assert hits.answered == 1 - len(gone) / NUM
    mask = ~np.isin(np.arange(NUM), gone)
    assert_same(hits, index.search(QUERIES, K, beam=4, allow=mask))
    deadline = time.monotonic() + 60
    while (hits := sharded.search(QUERIES, K, beam=4)).answered < 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert_same(hits, index.search(QUERIES, K, beam=4))
    assert ray.get(sharded._actors[victim].pid.remote()) != pid


def test_a_closed_router_says_so(tmp_path, served):
    import ray

    make(tmp_path / "index", "raw")
    folders = split_index(tmp_path / "index", tmp_path / "parts", 2)
    sharded = ShardedIndex.start(folders)  # it shares the Ray that runs already
    assert sharded.search(QUERIES, K, beam=2).answered == 1
    sharded.close()
    sharded.close()
    assert ray.is_initialized()
    with pytest.raises(ValueError, match="is closed"):
        sharded.search(QUERIES, K)
